"""A checkpoint that is found but not loaded: its facts, its sampling settings and its head map.

`models/find.py` makes it from a name, and reads only its configuration. `Checkpoint.load` loads the weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig

from ssd_cache.cache.cache import decoder_shape
from ssd_cache.head_map.head_map import HeadMap, HeadMapError
from ssd_cache.io.showing import suggestion
from ssd_cache.layout import Grid, ImageLayout
from ssd_cache.model_grids import GRIDS
from ssd_cache.models.base import Generator
from ssd_cache.models.bundled import BUNDLED_MODELS, check_checksums
from ssd_cache.models.settings import GeneratorError, ResolvedSampling, resolve_device, resolve_dtype

HEAD_MAP_FOLDER = "head_map"
"""Subfolder of a checkpoint with the head map for this checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A generator that is found but not loaded yet: the facts that its configuration states.

    Attributes:
        name: the model name that the user gave.
        source: the folder, or the Hub id, for `from_pretrained`.
        family: the class that loads it.
        asked_grid: the grid that the caller asked for, or None.
    """

    name: str
    source: str
    config: PreTrainedConfig
    family: type[Generator]
    asked_grid: Grid | None = None

    @property
    def layout(self) -> ImageLayout:
        """Grid of an image, and the draft grids that are generated before it."""
        if self.config.model_type in GRIDS:
            return GRIDS[self.config.model_type].layout(self.config, self.asked_grid)
        assert self.asked_grid is not None  # `models/find.py` has checked it
        return ImageLayout(self.asked_grid)

    @property
    def grid(self) -> Grid:
        """Rows and columns of visual tokens in an image; end-of-row tokens count as the last columns."""
        return self.layout.grid

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image, including draft grids and end-of-row tokens."""
        return self.layout.num_tokens

    @property
    def num_layers(self) -> int:
        return decoder_shape(self.family.text_config_of(self.config))[0]

    @property
    def num_kv_heads(self) -> int:
        return decoder_shape(self.family.text_config_of(self.config))[1]

    def sampling(
        self, guidance_scale: float | None = None, temperature: float | None = None, seed: int = 0, own=None
    ) -> ResolvedSampling:
        """Check the settings of `Generator.generate`, and replace None by the checkpoint's own value or the default.

        Args:
            own: the generation config that replaces None. Default: read from the checkpoint.

        Raises:
            GeneratorError: a value out of range, or a guidance scale for a model without guidance.
        """
        default = self.family.default_guidance
        if own is None:
            try:
                own = GenerationConfig.from_pretrained(self.source)
            except OSError:  # a checkpoint without generation_config.json
                own = GenerationConfig()
        if temperature is None:
            temperature = 1.0 if own.temperature is None else own.temperature
        if default is None:
            if guidance_scale not in (None, 1):
                raise GeneratorError(
                    f"guidance_scale={guidance_scale}: {self.name} has no guidance; leave guidance_scale out"
                )
            guidance_scale = 1.0
        else:
            guidance_scale = own.guidance_scale or default if guidance_scale is None else guidance_scale
            if not 1 < guidance_scale < math.inf:
                raise GeneratorError(
                    f"guidance_scale={guidance_scale} is out of range: give a number above 1; 1.001 is almost no "
                    "guidance"
                )
        if not 0 <= temperature < math.inf:
            raise GeneratorError(
                f"temperature={temperature} is out of range: give 0 (always the likeliest token) or more; 1 is usual"
            )
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise GeneratorError(f"seed={seed!r} is out of range: give a whole number from 0 to 2**63 - 1")
        return ResolvedSampling(float(guidance_scale), float(temperature), seed)

    def head_map(self, name: str | None = None) -> HeadMap | None:
        """Load a head map for this model and check that it fits; converted to `asked_grid` if that is set.

        Args:
            name: as for `find_head_map`; when not given, the map in the checkpoint's folder, or None if it has none. A
                map made for another model gives a warning.

        Raises:
            HeadMapError: a map that cannot be read, or that does not fit this model.
        """
        if name is None and not os.path.isdir(os.path.join(self.source, HEAD_MAP_FOLDER)):
            return None
        found = find_head_map(self.source if name is None else name)
        if name is not None:
            found.check_made_for(self.name)
        if self.asked_grid is not None:
            found = found.with_layout(self.layout)
        self.check_head_map(found)
        return found

    def check_head_map(self, head_map: HeadMap) -> None:
        """Refuse a map whose shape does not fit this model.

        Raises:
            HeadMapError: layers, KV heads or grid differ.
        """
        head_map.check_fits(self.name, self.num_layers, self.num_kv_heads, self.layout)

    def check_decodable(self) -> None:
        """Raise GeneratorError, before any generation, for a model whose tokens ssd-cache cannot decode to images."""
        if self.family.decoding_hint is not None:
            raise GeneratorError(
                f"{self.name} generates tokens, and ssd-cache cannot decode them: {self.family.decoding_hint}"
            )

    def check_captions(self, prompts: Sequence[str]) -> None:
        """Refuse captions that a bundled model with a closed vocabulary cannot generate.

        Raises:
            GeneratorError: the first of them, with the nearest words of the vocabulary.
        """
        bundled = BUNDLED_MODELS.get(self.name)
        if bundled is None or bundled.parse_caption is None:
            return
        for prompt in prompts:
            try:
                bundled.parse_caption(prompt)
            except ValueError as error:
                raise GeneratorError(f"{self.name}: {error}") from error

    def load(self, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> Generator:
        """Load the model in evaluation mode; see `resolve_dtype` and `resolve_device` for "auto".

        Raises:
            GeneratorError: the weights of a bundled model do not have their checksum.
        """
        if self.name in BUNDLED_MODELS:
            check_checksums(self.name, Path(self.source))
        device = resolve_device(device)
        return self.family.load(self, resolve_dtype(dtype, device), device)


def find_head_map(name: str) -> HeadMap:
    """Load a head map by name: a map's folder or Hub id, a model folder that contains a map, or a bundled model.

    Raises:
        HeadMapError: there is none, or it cannot be read.
    """
    folder = BUNDLED_MODELS[name].folder if name in BUNDLED_MODELS else os.path.expanduser(name)
    own = os.path.join(folder, HEAD_MAP_FOLDER)
    try:
        return HeadMap.from_pretrained(own if os.path.isdir(own) else name)
    except HeadMapError as error:
        if not (nearest := suggestion(name, list(BUNDLED_MODELS))):
            raise
        raise type(error)(f"{error}{nearest}") from error
