"""Emu3 in transformers: rows of visual tokens that each end in an end-of-line token, guidance, VQ decoder.

The model's own `generate` generates; `prefix_allowed_tokens_fn` enforces the image grammar, as in transformers'
documentation. Guidance runs in the same batch (`decode/guidance.py`) and equals transformers' own up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Emu3ForConditionalGeneration, Emu3Processor

from ssd_cache.decode.guidance import batched_guidance
from ssd_cache.models.base import Generator
from ssd_cache.models.settings import ResolvedSampling

CLOSING = ("eof_token", "eoi_token", "eos_token")
"""Tokens that follow the last row, one each; the cache does not need them."""

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""Prompt of the unconditional rows, from the model's authors."""


class Emu3Generator(Generator):
    """Generator around `Emu3ForConditionalGeneration`; guidance doubles its rows, [conditional; unconditional]."""

    model_class, processor_class = Emu3ForConditionalGeneration, Emu3Processor
    image_decoder = "model.vqmodel"
    decode_batch = 1  # the decoder needs 1 GB for 720 x 720 pixels
    default_guidance = 3.0

    @staticmethod
    def generates_images(call: Mapping[str, Any]) -> bool:
        """An image needs its grammar function; a call without one generates text."""
        return call.get("prefix_allowed_tokens_fn") is not None

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

    def call_arguments(self, inputs: Mapping[str, torch.Tensor], sampling: ResolvedSampling) -> dict[str, Any]:
        top_k = self.model.generation_config.top_k
        return {
            "guidance_scale": 1.0,  # batched_guidance applies it; a scale in the checkpoint must not apply it again
            "max_new_tokens": self.checkpoint.num_visual_tokens,
            "prefix_allowed_tokens_fn": self.grammar(inputs["input_ids"].shape[1]),
            "top_k": 2048 if top_k is None else top_k,
        }

    def _generate_tokens(self, prompts, cache, sampling, on_tokens) -> torch.Tensor:
        negative = self.prepare([NEGATIVE_PROMPT])
        with batched_guidance(self.model, sampling.guidance_scale, negative["input_ids"], negative["attention_mask"]):
            return super()._generate_tokens(prompts, cache, sampling, on_tokens)

    def grammar(self, num_prompt: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
        """Make `prefix_allowed_tokens_fn`: visual tokens, an end-of-line after each row, then the `CLOSING` tokens.

        The function returns tensors on the device of the tokens. transformers would make one of a list for every token
        and row, and 32,768 numbers take milliseconds.

        Args:
            num_prompt: length of the prompts, padding included.
        """
        rows, columns = self.checkpoint.grid
        tokenizer, mapping = self.processor.tokenizer, self.model.vocabulary_mapping
        last = [[getattr(tokenizer, f"{name}_id")] for name in CLOSING]

        @cache
        def on(device: torch.device) -> list[torch.Tensor]:
            ids = mapping.image_tokens, [mapping.eol_token_id], *last, [tokenizer.pad_token_id]
            return [torch.tensor(those, device=device) for those in ids]

        def allowed(batch_id: int, input_ids: torch.Tensor) -> torch.Tensor:
            visual, end_of_line, *after_grid = on(input_ids.device)
            number = input_ids.shape[0] - num_prompt  # of tokens generated so far
            if number < rows * columns:
                return visual if (number + 1) % columns else end_of_line
            return after_grid[min(number - rows * columns, len(last))]

        return allowed

    def _decode(self, tokens: torch.Tensor) -> list[Image.Image]:
        rows, columns = self.checkpoint.grid
        closed = F.pad(tokens, (0, len(CLOSING)))  # the decoder removes this padding without reading it
        pixels = self.model.decode_image_tokens(image_tokens=closed, height=rows, width=columns - 1)
        return self.processor.postprocess(list(pixels.float().cpu()), return_tensors="PIL.Image.Image")["pixel_values"]
