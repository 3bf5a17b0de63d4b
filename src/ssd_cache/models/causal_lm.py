"""A generator for any causal language model of transformers: plain tokens in a grid that the user states.

It serves models that have no file of their own here. It does not know their prompt format, guidance, grammar or image
decoder. Users can profile heads and compare caches; `to_images` raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssd_cache.models.base import Generator
from ssd_cache.models.settings import ResolvedSampling


class CausalLMGenerator(Generator):
    """Generator around an `AutoModelForCausalLM` and its tokenizer; one row per prompt, no guidance."""

    model_class, processor_class = AutoModelForCausalLM, AutoTokenizer
    decoding_hint = "take the tokens (generate(...), or an --output that ends with .safetensors) to its own decoder"
    default_guidance = None

    def __init__(self, checkpoint, model, processor):
        super().__init__(checkpoint, model, processor)
        rows, columns = checkpoint.grid
        warnings.warn(
            f"{checkpoint.name} is of type {checkpoint.config.model_type!r}, which ssd-cache does not know as an image "
            f"generator: each prompt is followed by {rows} x {columns} plain tokens",
            stacklevel=3,
        )

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenize the texts unchanged, without a chat template."""
        if self.processor.pad_token is None:
            self.processor.pad_token = self.processor.eos_token
        inputs = self.processor(list(prompts), padding=True, padding_side="left", return_tensors="pt")
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def call_arguments(self, inputs: Mapping[str, torch.Tensor], sampling: ResolvedSampling) -> dict[str, Any]:
        return super().call_arguments(inputs, sampling) | {"top_k": 0}
