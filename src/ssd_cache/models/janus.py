"""Janus and Janus-Pro in transformers: chat prompt, 576 visual tokens under guidance, VQ decoder.

Everything goes through the model's own `generate` and `decode_image_tokens` and its processor's `postprocess`. No
generation step is reimplemented here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_cache.io.showing import suggestion
from ssd_cache.models.base import Generator
from ssd_cache.models.settings import ResolvedSampling


class JanusGenerator(Generator):
    """Generator around `JanusForConditionalGeneration`; guidance doubles its rows, [conditional; unconditional]."""

    model_class, processor_class = JanusForConditionalGeneration, JanusProcessor
    image_decoder = "model.vqmodel"
    has_own_guidance = True

    @staticmethod
    def generates_images(call: Mapping[str, Any]) -> bool:
        """Janus generates text unless the call sets `generation_mode="image"`."""
        return call.get("generation_mode", "text") == "image"

    @property
    def visual_head(self) -> torch.nn.Module:
        return self.model.model.generation_head

    @property
    def visual_embeddings(self) -> torch.nn.Module:
        return self.model.model.generation_embeddings

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Make inputs as in transformers' documentation: the chat template, if there is one, and begin-of-image."""
        self.checkpoint.check_captions(prompts)
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

    def call_arguments(self, inputs: Mapping[str, torch.Tensor], sampling: ResolvedSampling) -> dict[str, Any]:
        return {
            "generation_mode": "image",
            "guidance_scale": sampling.guidance_scale,
            "generation_kwargs": {"boi_token_id": self.processor.tokenizer.boi_token_id},
            # without a checkpoint setting, transformers samples from the 50 likeliest tokens, Janus's authors from all
            "top_k": self.model.generation_config.top_k or 0,
        }

    def _decode(self, tokens: torch.Tensor) -> list[Image.Image]:
        pixels = self.model.decode_image_tokens(tokens).float().cpu()  # [batch, height, width, 3]
        # Both of transformers' image processors read channels first. The one on torchvision cannot return PIL images:
        # it passes the value on to a function that refuses it.
        decoded = self.processor.postprocess(list(pixels.permute(0, 3, 1, 2)))["pixel_values"]
        return [Image.fromarray(np.asarray(image).transpose(1, 2, 0)) for image in decoded]

    def _warn_of_unknown_words(self, prompts: Sequence[str]) -> None:
        """Warn of words that a small word-level tokenizer, as in shapes-janus, does not know."""
        tokenizer = self.processor.tokenizer
        if tokenizer.unk_token_id is None:
            return
        words = dict.fromkeys(word for prompt in prompts for word in prompt.split())
        unknown = [word for word in words if tokenizer.unk_token_id in tokenizer.encode(word, add_special_tokens=False)]
        if unknown:
            known = list(tokenizer.get_vocab())
            warnings.warn(
                f"{self.checkpoint.name} does not know "
                f"{', '.join(f'{word!r}{suggestion(word, known)}' for word in unknown[:10])} and will not see "
                f"{'it' if len(unknown) == 1 else 'them'}",
                stacklevel=2,
            )
