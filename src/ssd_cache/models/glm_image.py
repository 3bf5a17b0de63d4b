"""GLM-Image's autoregressive part in transformers: a small draft grid, then the image, with M-RoPE.

It generates tokens. The diffusion part in diffusers' `GlmImagePipeline` makes images from them and calls `generate`
itself: put `enable(pipe.vision_language_encoder, head_map, ...)` around `pipe(...)`. There is no guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GlmImageForConditionalGeneration

from ssd_cache.layout import ImageLayout
from ssd_cache.models.base import Generator

PATCH = 32
"""Side of one token in pixels."""


class GlmImageGenerator(Generator):
    """Token generator around `GlmImageForConditionalGeneration`; draft grid tokens come first; one row per prompt."""

    model_class = GlmImageForConditionalGeneration
    decoding_hint = (
        "GLM-Image's diffusion part makes the images: load diffusers' GlmImagePipeline, and call pipe(...) inside "
        "`with ssd_cache.enable(pipe.vision_language_encoder, ...)`"
    )
    default_guidance = None

    @staticmethod
    def layout_of_call(call: Mapping[str, Any]) -> ImageLayout | None:
        """Read the generated grids of a row. The call lists the input images' first, then these in reverse order."""
        grids, counts, ids = (call.get(name) for name in ("image_grid_thw", "images_per_sample", "input_ids"))
        if grids is None or ids is None:
            return None
        of_row = grids[: int(counts[0])] if counts is not None else grids
        # with input images, the model generates no draft grid
        num_inputs = 0 if call.get("pixel_values") is None else len(of_row) - 1
        *draft_grids, grid = reversed(of_row[num_inputs:, 1:].tolist())
        return ImageLayout(grid, draft_grids)

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Make inputs in the same way as diffusers' pipeline for text to image."""
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
