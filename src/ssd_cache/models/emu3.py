"""Emu3 in transformers: rows of visual tokens that each end in an end-of-line token, guidance, VQ decoder.

The model's own `generate` generates; `prefix_allowed_tokens_fn` enforces the image grammar, as in transformers'
documentation. Guidance runs in the same batch (`decode/guidance.py`) and equals transformers' own up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    Cache,
    Emu3ForConditionalGeneration,
    Emu3Processor,
)

from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import NAME
from ssd_cache.decode.guidance import batched_guidance
from ssd_cache.model_grids import GRIDS
from ssd_cache.models.base import Checkpoint, Generator, call_settings

CLOSING = ("eof_token", "eoi_token", "eos_token")
"""Tokens that follow the last row, one each; the cache does not need them."""

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""Prompt of the unconditional rows, from the model's authors."""


class Emu3Generator(Generator):
    """Generator around `Emu3ForConditionalGeneration`; guidance doubles its rows, [conditional; unconditional]."""

    default_guidance = 3.0
    is_resizable = GRIDS["emu3"].is_resizable
    negative_prompt = NEGATIVE_PROMPT

    @staticmethod
    def draws(call: Mapping[str, Any]) -> bool:
        """An image needs its grammar function; a call without one generates text."""
        return call.get("prefix_allowed_tokens_fn") is not None

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Emu3Generator:
        processor = Emu3Processor.from_pretrained(checkpoint.source)
        model = Emu3ForConditionalGeneration.from_pretrained(checkpoint.source, dtype=dtype)
        model.set_attn_implementation({"text_config": NAME})
        model.model.vqmodel.float()  # images are decoded in float32 at any dtype
        return cls(checkpoint, model.to(device).eval(), processor)

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenize the texts, followed by begin-of-image and the image size in tokens."""
        rows, columns = self.checkpoint.grid
        width, side = columns - 1, self.processor.downsample_ratio
        inputs = self.processor(
            text=list(prompts),
            return_for_image_generation=True,
            ratio=f"{width}:{rows}",
            image_area=rows * width * side**2,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def draw(
        self,
        prompts: Sequence[str],
        cache: Cache | None,
        guidance_scale: float,
        temperature: float,
        on_tokens: Callable[[int], object] | None,
    ) -> torch.Tensor:
        rows, columns = self.checkpoint.grid
        inputs, negative = self.prepare(prompts), self.prepare([self.negative_prompt])
        top_k = self.model.generation_config.top_k
        with batched_guidance(self.model, guidance_scale, negative["input_ids"], negative["attention_mask"]):
            sequences = self.model.generate(
                **inputs,
                **{CACHE: cache},
                guidance_scale=1.0,  # batched_guidance applies it; a scale in the checkpoint must not apply it again
                max_new_tokens=rows * columns,
                prefix_allowed_tokens_fn=self.grammar(inputs["input_ids"].shape[1]),
                **call_settings(temperature, on_tokens, top_k=2048 if top_k is None else top_k),
            )
        return sequences[:, inputs["input_ids"].shape[1] :]

    def grammar(self, num_prompt: int) -> Callable[[int, torch.Tensor], list[int]]:
        """Make `prefix_allowed_tokens_fn`: visual tokens, an end-of-line after each row, then the `CLOSING` tokens.

        Args:
            num_prompt: length of the prompts, padding included.
        """
        layout = self.checkpoint.layout
        tokenizer, mapping = self.processor.tokenizer, self.model.vocabulary_mapping
        closing = [[getattr(tokenizer, f"{name}_id")] for name in CLOSING]
        visual, end_of_line = mapping.image_tokens, [mapping.eol_token_id]

        def allowed(batch_id: int, input_ids: torch.Tensor) -> list[int]:
            drawn = input_ids.shape[0] - num_prompt
            if drawn < layout.num_tokens:
                is_row_end = layout.place_of(drawn)[-1] == layout.widest - 1
                return end_of_line if is_row_end else visual
            after = drawn - layout.num_tokens
            return closing[after] if after < len(closing) else [tokenizer.pad_token_id]

        return allowed

    def is_unconditional(self, num_prompts: int) -> torch.Tensor:
        return torch.arange(2 * num_prompts) >= num_prompts

    @torch.no_grad()
    def to_images(self, tokens: torch.Tensor) -> list[Image.Image]:
        rows, columns = self.checkpoint.grid
        images: list[Image.Image] = []
        for picture in tokens.to(self.model.device).split(1):  # the decoder needs 1 GB for 720 x 720 pixels
            closed = F.pad(picture, (0, len(CLOSING)))  # the decoder removes this padding without reading it
            pixels = self.model.decode_image_tokens(image_tokens=closed, height=rows, width=columns - 1)
            images += self.processor.postprocess(list(pixels.float().cpu()), return_tensors="PIL.Image.Image")[
                "pixel_values"
            ]
        return images
