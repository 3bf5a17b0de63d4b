"""Janus and Janus-Pro in transformers: chat prompt, 576 visual tokens under guidance, VQ decoder.

Everything goes through the model's own `generate` and `decode_image_tokens` and its processor's `postprocess`. No
generation step is reimplemented here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    Cache,
    JanusForConditionalGeneration,
    JanusProcessor,
)

from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import NAME
from ssd_cache.models.base import Checkpoint, Generator, call_settings

DECODE_BATCH = 4
"""Images decoded at once; the decoder's last layers need a few hundred MB for each."""


class JanusGenerator(Generator):
    """Generator around `JanusForConditionalGeneration`; guidance doubles its rows, [conditional; unconditional]."""

    own_guidance = True

    @staticmethod
    def draws(call: Mapping[str, Any]) -> bool:
        """Janus generates text unless the call sets `generation_mode="image"`."""
        return call.get("generation_mode", "text") == "image"

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> JanusGenerator:
        processor = JanusProcessor.from_pretrained(checkpoint.source)
        model = JanusForConditionalGeneration.from_pretrained(checkpoint.source, dtype="auto", attn_implementation=NAME)
        in_float32 = set(model.model.vqmodel.float().parameters())  # images are decoded in float32 at any dtype
        for parameter in set(model.parameters()) - in_float32:  # buffers stay: RoPE's frequencies are float32
            parameter.data = parameter.data.to(dtype)
        return cls(checkpoint, model.to(device).eval(), processor)

    @property
    def visual_head(self) -> torch.nn.Module:
        return self.model.model.generation_head

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Make inputs as in transformers' documentation: the chat template, if there is one, and begin-of-image."""
        texts = list(prompts)
        if self.processor.chat_template is not None:
            chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
            texts = self.processor.apply_chat_template(chats, add_generation_prompt=True)
        inputs = self.processor(
            text=texts,
            generation_mode="image",
            padding=True,
            padding_side="left",
            max_length=None,  # else a tokenizer saved with a fixed length warns that the length is not used
            return_tensors="pt",
        )
        self._warn_of_unknown_words(prompts)
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def draw(
        self,
        prompts: Sequence[str],
        cache: Cache | None,
        guidance_scale: float,
        temperature: float,
        on_tokens: Callable[[int], object] | None,
    ) -> torch.Tensor:
        # without a checkpoint setting, transformers samples from the 50 likeliest tokens, Janus's authors from all
        top_k = self.model.generation_config.top_k or 0
        return self.model.generate(
            **self.prepare(prompts),
            generation_mode="image",
            **{CACHE: cache},
            guidance_scale=guidance_scale,
            generation_kwargs={"boi_token_id": self.processor.tokenizer.boi_token_id},
            **call_settings(temperature, on_tokens, top_k=top_k),
        )

    def is_unconditional(self, num_prompts: int) -> torch.Tensor:
        """transformers' Janus always uses guidance: [conditional; unconditional]."""
        return torch.arange(2 * num_prompts) >= num_prompts

    @torch.no_grad()
    def to_images(self, tokens: torch.Tensor) -> list[Image.Image]:
        images: list[Image.Image] = []
        for part in tokens.to(self.model.device).split(DECODE_BATCH):
            pixels = self.model.decode_image_tokens(part).float().cpu()  # [batch, height, width, 3]
            # without torchvision, transformers' image processor reads no other order
            pixels = pixels.permute(0, 3, 1, 2)
            images += self.processor.postprocess(list(pixels), return_tensors="PIL.Image.Image")["pixel_values"]
        return images

    def _warn_of_unknown_words(self, prompts: Sequence[str]) -> None:
        """Warn of words that a small word-level tokenizer, as in shapes-janus, does not know."""
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token_id is None:
            return
        words = dict.fromkeys(word for prompt in prompts for word in prompt.split())
        unknown = [word for word in words if tokenizer.unk_token_id in tokenizer.encode(word, add_special_tokens=False)]
        if unknown:
            warnings.warn(
                f"{self.checkpoint.name} does not know {', '.join(map(repr, unknown[:10]))} and will not see "
                f"{'it' if len(unknown) == 1 else 'them'}; its captions are like 'a photo of a red circle'",
                stacklevel=2,
            )
