"""What every generator offers: prompts to visual tokens, visual tokens to pictures, and the facts a cache needs.

A model family subclasses `Generator`, states its facts and fills in five short methods (see `janus.py`). Which
checkpoint a name means is `find.py`'s business; what is kept of the visual tokens is the cache's.
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
from ssd_cache.layout import count_cells
from ssd_cache.models.settings import GeneratorError, check_drawing, check_texts, resolve_device, resolve_dtype

BUNDLED = "shapes-janus"
"""The small trained model that travels with the package."""

BUNDLED_FOLDER = Path(__file__).parents[1] / "shapes" / "checkpoint"

HEAD_MAP_FOLDER = "head_map"
"""A checkpoint's own head map, inside its folder."""


def find_head_map(name: str) -> HeadMap:
    """The head map of a name: a map's folder or Hub id, the folder of a model that carries one, or `BUNDLED`.

    Raises:
        HeadMapError: there is none, or it can not be read.
    """
    carried = (BUNDLED_FOLDER if name == BUNDLED else Path(os.path.expanduser(name))) / HEAD_MAP_FOLDER
    try:
        return HeadMap.from_pretrained(carried if os.path.isdir(carried) else name)
    except HeadMapError as error:
        if not (nearest := suggestion(name, [BUNDLED])):
            raise
        raise type(error)(f"{error}{nearest}") from error


class Generator(ABC):
    """A loaded image model with its processor; made by `Checkpoint.load`, or by `generator_of` around a model.

    Attributes:
        checkpoint: where it comes from, its grid and numbers of layers and heads.
        model: the transformers model; from `Checkpoint.load` in evaluation mode, with the attention "ssd".
        processor: the transformers processor.

    A family's facts, for the class as a whole:
        own_guidance: whether the model's `generate` draws guidance's rows itself, in one batch. If not, `enable` does
            it for a call with `guidance_scale` (see `guidance.py`).
        default_guidance: the scale for a checkpoint that names none; None for a family that is not guided.
        is_resizable: whether pictures of another size than `grid_of` says can be asked for.
        no_pictures: what becomes of the tokens of a family that `to_images` makes no pictures of; None for the others.
    """

    own_guidance: bool = False
    default_guidance: float | None = 5.0
    is_resizable: bool = False
    no_pictures: str | None = None

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, processor: ProcessorMixin):
        self.checkpoint, self.model, self.processor = checkpoint, model, processor

    @staticmethod
    @abstractmethod
    def grid_of(config: PreTrainedConfig) -> tuple[int, int]:
        """Rows and columns of visual tokens in a picture; tokens that end a row are its last columns."""

    @staticmethod
    def previews_of(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Grids that are drawn before a picture of this one, in order; none as a rule."""
        return ()

    @staticmethod
    def draws(call: Mapping[str, Any]) -> bool:
        """Whether a call of the model's `generate` with these keyword arguments draws a picture, not text."""
        return True

    @staticmethod
    def rasters_of_call(call: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]] | None:
        """Grid and previews of the pictures that such a call draws, where its arguments tell; None where not."""
        return None

    @staticmethod
    def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
        """The decoder's own configuration, with its numbers of layers and heads."""
        return config.get_text_config(decoder=True)

    @classmethod
    def read_config(cls, folder: str | Path) -> PreTrainedConfig:
        """The configuration in a folder.

        Raises:
            GeneratorError: a package that the family needs is missing.
            OSError, ValueError, KeyError, TypeError: as transformers has it, for a file that can not be read.
        """
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)

    @classmethod
    @abstractmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Generator:
        """The model and processor of a checkpoint."""

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model whose attention has to be "ssd"; a part of `model` where that is no such model."""
        return self.model

    @property
    def visual_head(self) -> torch.nn.Module | None:
        """What scores visual tokens; the head for all tokens unless the family has one of its own for pictures."""
        return self.model.get_output_embeddings()

    @abstractmethod
    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Inputs for the model's own `generate`, left-padded `[batch, prompt length]`, on the model's device."""

    @abstractmethod
    def draw(self, prompts, cache, guidance_scale, temperature, on_tokens) -> torch.Tensor:
        """Visual tokens `[batch, cells]` with settings that were checked; see `generate`."""

    def is_unconditional(self, num_prompts: int) -> torch.Tensor:
        """Which of the decoder's rows for that many prompts guidance draws without them, boolean `[rows]`."""
        return torch.zeros(num_prompts, dtype=torch.bool)

    def to_images(self, tokens: torch.Tensor) -> list[Image.Image]:
        """Pictures of visual tokens `[batch, cells]`, decoded a few at a time, in float32 after `load`.

        Raises:
            GeneratorError: a model whose tokens something else makes pictures of.
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
        """Draw one picture a prompt, all in one batch; returns visual tokens `[batch, cells]`, previews first.

        The seed belongs to the batch: the same prompts in the same order give the same pictures, a prompt alone or in
        another batch does not. torch's own generators are left as they were.

        Args:
            prompts: one text a picture; repeat a prompt to draw it several times.
            cache: a cache fresh from its constructor or `reset()`; the model's own default when not given.
            guidance_scale: above 1, for a model that is guided; the checkpoint's own when not given.
            temperature: 0 always takes the likeliest token; the checkpoint's own when not given.
            seed: of the batch.
            on_tokens: called at every step with the number of visual tokens drawn in it.

        Raises:
            GeneratorError: no list of prompts, none in it, an empty one, or a setting out of range.
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
        """The checkpoint's own guidance scale, or its family's; 1 where there is no guidance."""
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
    """A generator that was found and not loaded yet: what its configuration alone tells.

    Attributes:
        name: the model as its user named it.
        source: the folder, or the Hub id, for `from_pretrained`.
        config: its configuration.
        family: the class that loads it.
        asked_grid: the grid that was asked for, if one was.
    """

    name: str
    source: str
    config: PreTrainedConfig
    family: type[Generator]
    asked_grid: tuple[int, int] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens in a picture; tokens that end a row are its last columns."""
        return self.asked_grid or self.family.grid_of(self.config)

    @property
    def previews(self) -> tuple[tuple[int, int], ...]:
        """Grids that are drawn before the picture, in order; none as a rule."""
        return self.family.previews_of(self.grid)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of a picture, previews and tokens that end rows included."""
        return count_cells(self.grid, self.previews)

    @property
    def num_layers(self) -> int:
        return decoder_shape(self.family.text_config_of(self.config))[0]

    @property
    def num_kv_heads(self) -> int:
        return decoder_shape(self.family.text_config_of(self.config))[1]

    def head_map(self, name: str | None = None) -> HeadMap | None:
        """A head map for this model; for the grid that was asked for, if one was.

        Args:
            name: as for `find_head_map`; when not given, the map that travels in the checkpoint's folder, if there is
                one. A map that names another model is warned of.

        Raises:
            HeadMapError: a map that can not be read.
        """
        if name is None:
            folder = Path(self.source) / HEAD_MAP_FOLDER
            found = HeadMap.from_pretrained(folder) if folder.is_dir() else None
        else:
            found = find_head_map(name)
            found.check_made_for(self.name)
        if found is None or self.asked_grid is None:
            return found
        return found.with_grid(self.grid, self.previews)

    def check_head_map(self, head_map: HeadMap) -> None:
        """Refuse a map of another model's shape.

        Raises:
            HeadMapError: layers, KV heads or grid differ.
        """
        head_map.check_fits(self.name, self.num_layers, self.num_kv_heads, self.grid, self.previews)

    def check_pictures(self) -> None:
        """Refuse, before anything is drawn, a model whose tokens become no pictures here; raises GeneratorError."""
        if self.family.no_pictures is not None:
            raise GeneratorError(
                f"{self.name} draws tokens, and ssd-cache can not decode them: {self.family.no_pictures}"
            )

    def load(self, dtype: str | torch.dtype = "auto", device: str | torch.device = "auto") -> Generator:
        """The model itself, in evaluation mode; see `resolve_dtype` and `resolve_device` for "auto"."""
        device = resolve_device(device)
        return self.family.load(self, resolve_dtype(dtype, device), device)


def call_settings(temperature: float, on_tokens: Callable[[int], object] | None, **sampling) -> dict[str, Any]:
    """What a model's own `generate` is told of temperature and progress; `sampling` where tokens are sampled at all."""
    settings = {"do_sample": True, "temperature": temperature, **sampling} if temperature > 0 else {"do_sample": False}
    return settings | {"logits_processor": LogitsProcessorList([] if on_tokens is None else [_Ticker(on_tokens)])}


class _Ticker(LogitsProcessor):
    """Reports every step of a generation and changes nothing."""

    def __init__(self, on_tokens: Callable[[int], object]):
        self.on_tokens = on_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.on_tokens(input_ids.shape[0])
        return scores
