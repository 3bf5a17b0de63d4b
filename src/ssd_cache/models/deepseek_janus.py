"""Janus and Janus-Pro as DeepSeek publishes them: for the `janus` package of github.com/deepseek-ai/Janus.

That package has no `generate`; the loop here is that of its script `generation_inference.py`, over any cache, with the
same row order: conditional and unconditional rows alternate. The package is imported only when it is needed, and
nothing in it is patched. docs/models.md explains how to install it beside transformers 5.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel

from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import NAME
from ssd_cache.models.base import Generator
from ssd_cache.models.settings import GeneratorError


class DeepSeekJanusGenerator(Generator):
    """Generator around `MultiModalityCausalLM` and its `VLChatProcessor`.

    If `prompts` repeats one text, its tokens equal those of DeepSeek's script after `torch.manual_seed(seed)`. Texts of
    different length are padded on the left; the script does not support them.
    """

    has_own_guidance = True

    @staticmethod
    def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
        return config.language_config

    @classmethod
    def read_config(cls, folder: str | Path) -> PreTrainedConfig:
        _import_janus()
        return AutoConfig.from_pretrained(folder)

    @classmethod
    def load(cls, checkpoint, dtype: torch.dtype, device: torch.device) -> DeepSeekJanusGenerator:
        janus = _import_janus()
        published: Any = janus.MultiModalityCausalLM

        class Model(published):
            """DeepSeek's class plus the `post_init` call that transformers 5 requires before it loads weights."""

            def __init__(self, config):
                super().__init__(config)
                self.post_init()

        processor = janus.VLChatProcessor.from_pretrained(checkpoint.source)
        model = Model.from_pretrained(checkpoint.source, dtype=dtype)
        model.language_model.set_attn_implementation(NAME)
        model.gen_vision_model.float()  # images are decoded in float32 at any dtype
        return cls(checkpoint, model.to(device).eval(), processor)

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model.language_model

    @property
    def visual_head(self) -> torch.nn.Module:
        return self.model.gen_head

    @property
    def visual_embeddings(self) -> torch.nn.Module:
        return self.model.gen_embed

    def prepare(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Make the rows of both kinds, `[2 * batch, length]`; an unconditional row follows each conditional one."""
        processor, rows = self.processor, []
        for prompt in prompts:
            chat = [{"role": "User", "content": prompt}, {"role": "Assistant", "content": ""}]
            text = processor.apply_sft_template_for_multi_turn_prompts(
                conversations=chat, sft_format=processor.sft_format, system_prompt=""
            )
            given = torch.tensor(processor.tokenizer.encode(text + processor.image_start_tag))
            free = given.clone()
            free[1:-1] = processor.pad_id  # attended to, not masked
            rows += [given, free]
        width, device = max(map(len, rows)), self.language_model.device
        ids = torch.stack([F.pad(row, (width - len(row), 0), value=processor.pad_id) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def _generate_tokens(self, prompts, cache, sampling, on_tokens) -> torch.Tensor:
        model, inputs, steps = self.model, self.prepare(prompts), []
        mask = None if inputs["attention_mask"].all() else inputs["attention_mask"]
        call = {CACHE: DynamicCache() if cache is None else cache, "use_cache": True}
        embeds = model.language_model.get_input_embeddings()(inputs["input_ids"])
        for _ in range(self.processor.num_image_tokens):
            outputs = model.language_model.model(inputs_embeds=embeds, attention_mask=mask, **call)
            given, free = model.gen_head(outputs.last_hidden_state[:, -1]).view(len(prompts), 2, -1).unbind(1)
            logits = free + sampling.guidance_scale * (given - free)
            if sampling.temperature > 0:
                token = torch.multinomial(torch.softmax(logits / sampling.temperature, -1), num_samples=1)
            else:
                token = logits.argmax(-1, keepdim=True)
            steps.append(token)
            if on_tokens is not None:
                on_tokens(len(prompts))
            embeds = model.prepare_gen_img_embeds(token.expand(-1, 2).reshape(-1, 1))
            mask = None if mask is None else F.pad(mask, (0, 1), value=1)
        return torch.cat(steps, 1)

    def is_unconditional(self, num_prompts: int) -> torch.Tensor:
        return torch.arange(2 * num_prompts) % 2 == 1

    def _decode(self, tokens: torch.Tensor) -> list[Image.Image]:
        shape = [len(tokens), 8, *self.checkpoint.grid]  # 8 channels in DeepSeek's script; no configuration states it
        pixels = self.model.gen_vision_model.decode_code(tokens.to(torch.int), shape=shape)
        levels = ((pixels.float().cpu() + 1) / 2 * 255).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return [Image.fromarray(image) for image in levels.numpy()]


def _import_janus() -> Any:
    """Import `janus.models` of DeepSeek's package, which registers its classes with transformers."""
    try:
        return importlib.import_module("janus.models")
    except Exception as error:  # old code with current packages can fail with any exception class
        raise GeneratorError(
            f"this is a checkpoint for DeepSeek's janus package, which cannot be imported here ({error!r}): install "
            "it as docs/models.md says, or use the checkpoint for transformers (deepseek-community/...)"
        ) from error
