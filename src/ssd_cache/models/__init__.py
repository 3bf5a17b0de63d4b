"""Generators: the image models that ssd-cache can prompt, run and decode.

`find_generator(bundled model | folder | Hub id)` reads only a checkpoint's configuration, so mistakes show before
gigabytes are loaded. `.load()` returns the `Generator`. Each model family has one small file. No caching happens here.
"""

from ssd_cache.models.base import Generator
from ssd_cache.models.bundled import BUNDLED, BUNDLED_MODELS
from ssd_cache.models.causal_lm import CausalLMGenerator
from ssd_cache.models.checkpoint import Checkpoint, find_head_map
from ssd_cache.models.deepseek_janus import DeepSeekJanusGenerator
from ssd_cache.models.emu3 import Emu3Generator
from ssd_cache.models.find import FAMILIES, find_generator, generator_of
from ssd_cache.models.glm_image import GlmImageGenerator
from ssd_cache.models.janus import JanusGenerator
from ssd_cache.models.settings import GeneratorError, ResolvedSampling, resolve_device, resolve_dtype

__all__ = [
    "BUNDLED",
    "BUNDLED_MODELS",
    "FAMILIES",
    "CausalLMGenerator",
    "Checkpoint",
    "DeepSeekJanusGenerator",
    "Emu3Generator",
    "Generator",
    "GeneratorError",
    "GlmImageGenerator",
    "JanusGenerator",
    "ResolvedSampling",
    "find_generator",
    "find_head_map",
    "generator_of",
    "resolve_device",
    "resolve_dtype",
]
