"""The generator interface: prompts to visual tokens, visual tokens to images, and the facts a cache needs.

A model family subclasses `Generator`, states its facts and implements five short methods (see `models/janus.py`).
`models/find.py` finds the checkpoint that a name means. The cache decides which visual tokens are kept.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    Cache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from ssd_cache.cache.cache import decoder_shape
from ssd_cache.head_map.head_map import HeadMap, HeadMapError
from ssd_cache.io.suggesting import suggestion
from ssd_cache.layout import Grid, ImageLayout
from ssd_cache.model_grids import GRIDS
from ssd_cache.models.settings import GeneratorError, check_drawing, check_texts, resolve_device, resolve_dtype

BUNDLED = "shapes-janus"
"""Name of the small trained model that is bundled with the package."""

BUNDLED_FOLDER = Path(__file__).parents[1] / "shapes" / "checkpoint"

HEAD_MAP_FOLDER = "head_map"
"""Subfolder of a checkpoint that holds its own head map."""


def find_head_map(name: str) -> HeadMap:
    """Load a head map by name: a map's folder or Hub id, a model folder that contains a map, or `BUNDLED`.

    Raises:
        HeadMapError: there is none, or it cannot be read.
    """
    carried = (BUNDLED_FOLDER if name == BUNDLED else Path(os.path.expanduser(name))) / HEAD_MAP_FOLDER
    try:
        return HeadMap.from_pretrained(carried if os.path.isdir(carried) else name)
    except HeadMapError as error:
        if not (nearest := suggestion(name, [BUNDLED])):
            raise
        raise type(error)(f"{error}{nearest}") from error


class Generator(ABC):
    """A loaded image model with its processor. `Checkpoint.load` makes it, or `generator_of` wraps a loaded model.

    Attributes:
        checkpoint: its source, grid, and numbers of layers and heads.
        model: the transformers model; from `Checkpoint.load` it is in evaluation mode and uses the attention "ssd".
        processor: the transformers processor.

    Class attributes that state facts of the family:
        own_guidance: whether the model's `generate` runs the guidance rows itself, in one batch. If not, `enable`
            adds them for a call with `guidance_scale` (see `decode/guidance.py`).
        default_guidance: the scale for a checkpoint that names none; None for a family without guidance.
        is_resizable: whether a caller can choose another grid than `layout_of` returns by default.
        no_pictures: how to decode the tokens of a family that `to_images` cannot decode; None for the others.
    """

    own_guidance: bool = False
    default_guidance: float | None = 5.0
    is_resizable: bool = False
    no_pictures: str | None = None

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, processor: ProcessorMixin):
        self.checkpoint, self.model, self.processor = checkpoint, model, processor

    @staticmethod
    def layout_of(config: PreTrainedConfig, grid: Grid | None = None) -> ImageLayout:
        """Layout of an image of the usual size, or of `grid`; by default from `model_grids.py`."""
        return GRIDS[config.model_type].layout(config, grid)

    @staticmethod
    def draws(call: Mapping[str, Any]) -> bool:
        """Whether a call of the model's `generate` with these keyword arguments generates an image, not text."""
        return True

    @staticmethod
    def layout_of_call(call: Mapping[str, Any]) -> ImageLayout | None:
        """Layout of the images that such a call generates; None if the arguments do not state it."""
        return None

    @staticmethod
    def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
        """The decoder's own configuration, with its numbers of layers and heads."""
        return config.get_text_config(decoder=True)

    @classmethod
    def read_config(cls, folder: str | Path) -> PreTrainedConfig:
        """Read the configuration in a folder.

        Raises:
            GeneratorError: a package that the family needs is missing.
            OSError, ValueError, KeyError, TypeError: from transformers, for a file that cannot be read.
        """
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)

    @classmethod
    @abstractmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Generator:
        """Load the model and processor of a checkpoint."""

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model whose attention must be "ssd"; a part of `model` if `model` has no such setting."""
        return self.model

    @property
    def visual_head(self) -> torch.nn.Module | None:
        """The module that computes logits of visual tokens; the output head unless the family has a separate one."""
        return self.model.get_output_embeddings()

    @abstractmethod
    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Make inputs for the model's own `generate`, left-padded `[batch, prompt length]`, on the model's device."""

    @abstractmethod
    def draw(self, prompts, cache, guidance_scale, temperature, on_tokens) -> torch.Tensor:
        """Generate visual tokens `[batch, cells]` with settings that are already checked; see `generate`."""

    def is_unconditional(self, num_prompts: int) -> torch.Tensor:
        """Which decoder rows are unconditional guidance rows, for this number of prompts; boolean `[rows]`."""
        return torch.zeros(num_prompts, dtype=torch.bool)

    def to_images(self, tokens: torch.Tensor) -> list[Image.Image]:
        """Decode visual tokens `[batch, cells]` to images, a few at a time, in float32 after `load`.

        Raises:
            GeneratorError: a model whose tokens ssd-cache cannot decode.
        """
        self.checkpoint.check_pictures()
        raise NotImplementedError(f"{type(self).__name__} states no_pictures, or has to_images of its own")

    def generate(
        self,
        prompts: Sequence[str],
        cache: Cache | None = None,
        *,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
        on_tokens: Callable[[int], object] | None = None,
    ) -> torch.Tensor:
        """Generate one image per prompt, all in one batch; returns visual tokens `[batch, cells]`, draft grids first.

        The seed applies to the batch: the same prompts in the same order give the same images. A prompt alone or in
        another batch gives another image. The state of torch's global generators is restored.

        Args:
            prompts: one text per image; repeat a prompt to generate several images of it.
            cache: a new cache, or one after `reset()`; the model's own default when not given.
            guidance_scale: above 1, for a model with guidance; the checkpoint's own when not given.
            temperature: 0 always takes the likeliest token; the checkpoint's own when not given.
            seed: seed of the batch.
            on_tokens: called at every step with the number of visual tokens that the step generated.

        Raises:
            GeneratorError: `prompts` is not a list, is empty, or contains an empty text; or a setting is out of range.
        """
        check_texts(prompts)
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        temperature = self.temperature if temperature is None else temperature
        if self.default_guidance is None and guidance_scale != 1.0:
            raise GeneratorError(
                f"guidance_scale={guidance_scale}: {self.checkpoint.name} is not guided; leave guidance_scale out"
            )
        check_drawing(None if self.default_guidance is None else guidance_scale, temperature, seed)
        device = self.model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            return self.draw(prompts, cache, guidance_scale, temperature, on_tokens)

    @property
    def guidance_scale(self) -> float:
        """The checkpoint's own guidance scale, or the family's default; 1 for a family without guidance."""
        return 1.0 if self.default_guidance is None else self._setting("guidance_scale", self.default_guidance)

    @property
    def temperature(self) -> float:
        """The checkpoint's own temperature, or 1."""
        return self._setting("temperature", 1.0)

    def _setting(self, name: str, default: float) -> float:
        value = getattr(getattr(self.model, "generation_config", None), name, None)
        return default if value is None else float(value)


@dataclass(frozen=True)
class Checkpoint:
    """A generator that is found but not loaded yet: the facts that its configuration states.

    Attributes:
        name: the model name that the user gave.
        source: the folder, or the Hub id, for `from_pretrained`.
        config: its configuration.
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
        return self.family.layout_of(self.config, self.asked_grid)

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

    def head_map(self, name: str | None = None) -> HeadMap | None:
        """Load a head map for this model, converted to `asked_grid` if that is set.

        Args:
            name: as for `find_head_map`; when not given, the map in the checkpoint's folder, if there is one. A map
                made for another model gives a warning.

        Raises:
            HeadMapError: a map that cannot be read.
        """
        if name is None:
            folder = Path(self.source) / HEAD_MAP_FOLDER
            found = HeadMap.from_pretrained(folder) if folder.is_dir() else None
        else:
            found = find_head_map(name)
            found.check_made_for(self.name)
        if found is None or self.asked_grid is None:
            return found
        return found.with_layout(self.layout)

    def check_head_map(self, head_map: HeadMap) -> None:
        """Refuse a map whose shape does not fit this model.

        Raises:
            HeadMapError: layers, KV heads or grid differ.
        """
        head_map.check_fits(self.name, self.num_layers, self.num_kv_heads, self.layout)

    def check_pictures(self) -> None:
        """Raise GeneratorError, before any generation, for a model whose tokens ssd-cache cannot decode to images."""
        if self.family.no_pictures is not None:
            raise GeneratorError(
                f"{self.name} draws tokens, and ssd-cache can not decode them: {self.family.no_pictures}"
            )

    def load(self, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> Generator:
        """Load the model in evaluation mode; see `resolve_dtype` and `resolve_device` for "auto"."""
        device = resolve_device(device)
        return self.family.load(self, resolve_dtype(dtype, device), device)


def call_settings(temperature: float, on_tokens: Callable[[int], object] | None, **sampling) -> dict[str, Any]:
    """Arguments for a model's own `generate`: temperature, progress and, if tokens are sampled, `sampling`."""
    settings = {"do_sample": True, "temperature": temperature, **sampling} if temperature > 0 else {"do_sample": False}
    return settings | {"logits_processor": LogitsProcessorList([] if on_tokens is None else [_Ticker(on_tokens)])}


class _Ticker(LogitsProcessor):
    """Calls `on_tokens` at every generation step; does not change the logits."""

    def __init__(self, on_tokens: Callable[[int], object]):
        self.on_tokens = on_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.on_tokens(input_ids.shape[0])
        return scores
