"""GLM-Image's autoregressive part in transformers: a small preview of the picture, then the picture, with M-RoPE.

It draws tokens; pictures are made of them by the diffusion part, in diffusers' `GlmImagePipeline`, which calls
`generate` itself: put `enable(pipe.vision_language_encoder, head_map, ...)` around `pipe(...)`. It is not guided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    Cache,
    GlmImageForConditionalGeneration,
    PreTrainedConfig,
)

from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import NAME
from ssd_cache.model_grids import GRIDS
from ssd_cache.models.base import Checkpoint, Generator, call_settings

PATCH = 32
"""Pixels of a picture's side to a token."""


class GlmImageGenerator(Generator):
    """`GlmImageForConditionalGeneration` as a generator of tokens, the preview's first; its rows are the prompts'."""

    default_guidance = None
    is_resizable = GRIDS["glm_image"].is_resizable
    no_pictures = (
        "they become pictures in GLM-Image's diffusion part: load diffusers' GlmImagePipeline, and call pipe(...) "
        "inside `with ssd_cache.enable(pipe.vision_language_encoder, ...)`"
    )

    @staticmethod
    def grid_of(config: PreTrainedConfig) -> tuple[int, int]:
        """36 x 24, for the processor's own 1152 x 768 pixels."""
        return GRIDS["glm_image"].grid_of(config)

    @staticmethod
    def previews_of(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """About 256 cells in the picture's proportions, as the processor works them out."""
        return GRIDS["glm_image"].previews_of(grid)

    @staticmethod
    def rasters_of_call(call: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[tuple[int, int], ...]] | None:
        """Of a row's grids, pictures in the prompt come first; then what is drawn, the last of them first."""
        grids, counts, ids = (call.get(name) for name in ("image_grid_thw", "images_per_sample", "input_ids"))
        if grids is None or ids is None:
            return None
        of_row = grids[: int(counts[0])] if counts is not None else grids
        pictures = 0 if call.get("pixel_values") is None else len(of_row) - 1  # then no preview is drawn
        *previews, (rows, columns) = reversed(of_row[pictures:, 1:].tolist())
        return (rows, columns), tuple(map(tuple, previews))

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> GlmImageGenerator:
        processor = AutoProcessor.from_pretrained(checkpoint.source)
        model = GlmImageForConditionalGeneration.from_pretrained(checkpoint.source, dtype=dtype)
        model.set_attn_implementation({"text_config": NAME})
        return cls(checkpoint, model.to(device).eval(), processor)

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """As diffusers' pipeline does it for text to image."""
        rows, columns = self.checkpoint.grid
        chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts]
        inputs = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            padding=True,
            target_h=rows * PATCH,
            target_w=columns * PATCH,
            return_dict=True,
            return_tensors="pt",
        )
        return dict(inputs.to(self.model.device))

    def draw(
        self,
        prompts: Sequence[str],
        cache: Cache | None,
        guidance_scale: float,
        temperature: float,
        on_tokens: Callable[[int], object] | None,
    ) -> torch.Tensor:
        inputs, number = self.prepare(prompts), self.checkpoint.num_visual_tokens
        sequences = self.model.generate(
            **inputs,
            **{CACHE: cache},
            min_new_tokens=number,  # no end of picture before its last cell
            max_new_tokens=number,
            **call_settings(temperature, on_tokens),
        )
        return sequences[:, inputs["input_ids"].shape[1] :]
