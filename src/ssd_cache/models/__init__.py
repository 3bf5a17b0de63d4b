"""Generators: the image models that ssd-cache knows how to prompt, draw with and decode.

`find_generator("shapes-janus" | folder | Hub id)` reads a checkpoint's configuration alone, so that mistakes show
before gigabytes are loaded; `.load()` gives the `Generator`. One small file a model family; no caching happens here.
"""

from ssd_cache.models.base import BUNDLED, Checkpoint, Generator
from ssd_cache.models.causal_lm import CausalLMGenerator
from ssd_cache.models.deepseek_janus import DeepSeekJanusGenerator
from ssd_cache.models.emu3 import Emu3Generator
from ssd_cache.models.find import FAMILIES, find_generator, generator_of
from ssd_cache.models.glm_image import GlmImageGenerator
from ssd_cache.models.janus import JanusGenerator
from ssd_cache.models.settings import GeneratorError, check_drawing, resolve_device, resolve_dtype

__all__ = [
    "BUNDLED",
    "FAMILIES",
    "CausalLMGenerator",
    "Checkpoint",
    "DeepSeekJanusGenerator",
    "Emu3Generator",
    "Generator",
    "GeneratorError",
    "GlmImageGenerator",
    "JanusGenerator",
    "check_drawing",
    "find_generator",
    "generator_of",
    "resolve_device",
    "resolve_dtype",
]
