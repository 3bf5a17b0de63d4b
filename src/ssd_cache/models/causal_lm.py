"""A generator for any causal language model of transformers: plain tokens in a grid that the user states.

It serves models that have no file of their own here. It does not know their prompt format, guidance, grammar or image
decoder. Users can profile heads and compare caches; `to_images` raises. Code in a checkpoint is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedConfig

from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import NAME
from ssd_cache.layout import Grid, ImageLayout
from ssd_cache.models.base import Checkpoint, Generator, call_settings
from ssd_cache.models.settings import GeneratorError


class CausalLMGenerator(Generator):
    """Generator around an `AutoModelForCausalLM` and its tokenizer; one row per prompt, no guidance."""

    default_guidance = None
    is_resizable = True
    no_pictures = "take the tokens (generate(...), or an --output that ends with .safetensors) to its own decoder"

    def __init__(self, checkpoint: Checkpoint, model, processor):
        super().__init__(checkpoint, model, processor)
        rows, columns = checkpoint.grid
        warnings.warn(
            f"{checkpoint.name} is of type {checkpoint.config.model_type!r}, which ssd-cache does not know as an image "
            f"generator: each prompt is followed by {rows} x {columns} plain tokens",
            stacklevel=3,
        )

    @staticmethod
    def layout_of(config: PreTrainedConfig, grid: Grid | None = None) -> ImageLayout:
        if grid is None:
            raise GeneratorError(f"a model of type {config.model_type!r} states no grid: give grid=(rows, columns)")
        return ImageLayout(grid)

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> CausalLMGenerator:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.source, dtype=dtype, attn_implementation=NAME, trust_remote_code=False
        )
        return cls(checkpoint, model.to(device).eval(), tokenizer)

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenize the texts unchanged, without a chat template."""
        if self.processor.pad_token is None:
            self.processor.pad_token = self.processor.eos_token
        inputs = self.processor(list(prompts), padding=True, padding_side="left", return_tensors="pt")
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

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
            min_new_tokens=number,  # no end-of-text token before the grid is full
            max_new_tokens=number,
            **call_settings(temperature, on_tokens, top_k=0),
        )
        return sequences[:, inputs["input_ids"].shape[1] :]
