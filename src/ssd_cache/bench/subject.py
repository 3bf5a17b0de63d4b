"""The measured model and its generation loop: Janus with its own `generate`, others step by step, most with guidance.

`fill` fills a cache up to any point of an image, and `draw` continues from there, so that late steps can be timed
without generating the early ones. Nothing is timed here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import (
    AttentionInterface,
    Cache,
    GlmImageForConditionalGeneration,
    JanusForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from ssd_cache._compat import CACHE
from ssd_cache.bench.shapes import SHAPES, make_model
from ssd_cache.cache.attention import NAME
from ssd_cache.cache.cache import SSDCache
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import GeneratorError, find_generator

GUIDANCE_SCALE = 5.0
NUM_PROMPT = 16
"""Prompt length in tokens for a checkpoint."""

RANDOM_LABELS = "half of the heads spatial, drawn at random"

OnStep = Callable[[], object]


@dataclass
class Subject(ABC):
    """The model to measure, with its head map and prompt length.

    Attributes:
        name: the model name that the user gave.
        model: a transformers model in evaluation mode.
        head_map: labels of its heads, and the grid.
        num_prompt: tokens of a prompt.
    """

    name: str
    model: PreTrainedModel
    head_map: HeadMap
    num_prompt: int

    rows_per_picture: ClassVar[int] = 2
    """Batch rows per image; two with guidance."""

    @property
    def config(self):
        """The decoder's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def head_dim(self) -> int:
        """Dimension of a key of one head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def length(self) -> int:
        """Tokens of a whole image, prompt included."""
        return self.num_prompt + self.head_map.num_visual_tokens

    @abstractmethod
    def step_weights(self) -> list[torch.Tensor]:
        """Weights that every step reads completely; no embedding tables, since a step reads only a few rows of them."""

    @abstractmethod
    def set_attention(self, name: str) -> None:
        """Set the decoder's attention."""

    @abstractmethod
    def draw(self, cache: Cache, batch_size: int, num_tokens: int, on_step: OnStep) -> None:
        """Generate visual tokens of `batch_size` images, from the prompt or from the current end of the cache.

        Args:
            cache: an empty cache, or one that `fill` filled.
            batch_size: images, with `rows_per_picture` rows each.
            num_tokens: steps.
            on_step: called at every step, between the decoder and the sampling.
        """

    @torch.no_grad()
    def fill(self, cache: Cache, batch_size: int, length: int) -> None:
        """Fill a cache up to `length` tokens, prompt included, with random keys, values and queries.

        A full cache receives all tokens in one update. `SSDCache` receives visual tokens one by one, with queries.
        """
        decoder, config = self.model.get_decoder(), self.config
        shape = self.rows_per_picture * batch_size, config.num_key_value_heads
        attend = AttentionInterface()[NAME]
        options = {"device": self.model.device, "dtype": self.model.dtype}
        seen = int(cache.get_seq_length())
        one_by_one = isinstance(cache, SSDCache)
        # the prompt runs through the model, because the cache decides at the prompt how later steps run
        if one_by_one and seen == 0:
            embeds = torch.randn(shape[0], self.num_prompt, config.hidden_size, **options)
            decoder(inputs_embeds=embeds, **{CACHE: cache}, use_cache=True)
            seen = self.num_prompt
        while seen < length:
            new = 1 if one_by_one else length - seen
            states = torch.randn(*shape, new, self.head_dim, **options)
            query = states.repeat_interleave(config.num_attention_heads // shape[1], dim=1)
            for index, layer in enumerate(decoder.layers):
                keys, values = cache.update(states, states, index)
                if one_by_one:
                    attend(layer.self_attn, query, keys, values, None, scaling=self.head_dim**-0.5)
            seen += new


class JanusSubject(Subject):
    """Janus with its own `generate`, including sampling, guidance and masks."""

    def step_weights(self) -> list[torch.Tensor]:
        inner = self.model.model
        parts = (
            inner.language_model.layers,
            inner.language_model.norm,
            inner.generation_head,
            inner.generation_aligner,
        )
        return [weight for part in parts for weight in part.parameters()]

    def set_attention(self, name: str) -> None:
        self.model.set_attn_implementation({"text_config": name})

    def draw(self, cache: Cache, batch_size: int, num_tokens: int, on_step: OnStep) -> None:
        model, seen = self.model, int(cache.get_seq_length())
        ids = model.generation_config
        prompt = torch.randint(10, 60, (batch_size, self.num_prompt), generator=torch.Generator().manual_seed(0))
        prompt[:, 0], prompt[:, -1] = ids.bos_token_id, ids.generation_kwargs["boi_token_id"]
        prompt = prompt.clamp(max=self.config.vocab_size - 1).to(model.device)
        if seen:
            prompt = prompt[:, -1:]  # the last token before the next step; all earlier tokens are in the cache
        config = model.model.vision_model.config
        whole, config.num_image_tokens = config.num_image_tokens, num_tokens
        try:
            model.generate(
                prompt,
                attention_mask=prompt.new_ones(batch_size, seen + prompt.shape[1]),
                generation_mode="image",
                **{CACHE: cache},
                guidance_scale=GUIDANCE_SCALE,
                do_sample=True,
                logits_processor=LogitsProcessorList([_Ticker(on_step)]),
            )
        finally:
            config.num_image_tokens = whole


class CausalSubject(Subject):
    """A causal language model, run step by step: both rows of an image get the token sampled with guidance."""

    def step_weights(self) -> list[torch.Tensor]:
        decoder = self.model.get_decoder()
        return [*decoder.layers.parameters(), *decoder.norm.parameters(), *self.model.lm_head.parameters()]

    def set_attention(self, name: str) -> None:
        self.model.set_attn_implementation(name)

    @torch.no_grad()
    def draw(self, cache: Cache, batch_size: int, num_tokens: int, on_step: OnStep) -> None:
        num_ids = 1 if int(cache.get_seq_length()) else self.num_prompt
        shape = self.rows_per_picture * batch_size, num_ids
        ids = torch.randint(10, 60, shape, generator=torch.Generator().manual_seed(0))
        ids = ids.clamp(max=self.config.vocab_size - 1).to(self.model.device)
        for _ in range(num_tokens):
            output = self.model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            on_step()
            scores = self.guided(output.logits[:, -1].float())
            ids = torch.multinomial(scores.softmax(-1), num_samples=1).repeat(self.rows_per_picture, 1)

    def guided(self, scores: torch.Tensor) -> torch.Tensor:
        """Combine the logits of all rows into the logits for sampling, `[images, vocabulary]`."""
        conditional, unconditional = scores.chunk(2)
        return unconditional + GUIDANCE_SCALE * (conditional - unconditional)


class GlmImageSubject(CausalSubject):
    """GLM-Image's autoregressive part, without guidance.

    It gets no grid arguments and therefore uses text positions, because a step that starts in the middle of an image
    has no prompt from which M-RoPE positions could be counted. Text positions cost the same as M-RoPE's.
    """

    rows_per_picture = 1

    def set_attention(self, name: str) -> None:
        self.model.set_attn_implementation({"text_config": name})

    def guided(self, scores: torch.Tensor) -> torch.Tensor:
        return scores


SUBJECTS: dict[type[PreTrainedModel], type[Subject]] = {
    GlmImageForConditionalGeneration: GlmImageSubject,
    JanusForConditionalGeneration: JanusSubject,
}
"""Models that do not run as a `CausalSubject`."""


def find_head_map(name: str, grid: tuple[int, int] | None = None) -> HeadMap:
    """Find the head map for a measurement, without loading weights: the model's own map, or random labels.

    Args:
        name: a shape of `SHAPES`, or a checkpoint as for `find_generator`.
        grid: rows and columns for a checkpoint, as for `find_generator`.

    Raises:
        GeneratorError: an unknown name, or a grid that the model does not generate.
    """
    if name in SHAPES:
        config, own = SHAPES[name].make_config().get_text_config(decoder=True), SHAPES[name].grid
        if grid not in (None, own):
            raise GeneratorError(f"grid={grid}: the shape {name} has a grid of {own[0]} x {own[1]}; leave grid out")
        return random_map(config.num_hidden_layers, config.num_key_value_heads, own)
    checkpoint = find_generator(name, grid)
    labels = checkpoint.head_map()
    if labels is None:
        labels = random_map(checkpoint.num_layers, checkpoint.num_kv_heads, checkpoint.grid)
        labels = labels.with_layout(checkpoint.layout)
    return labels


def load_subject(name: str, dtype: torch.dtype, device: torch.device, grid: tuple[int, int] | None = None) -> Subject:
    """Load a model by name, with the head map of `find_head_map`; raises GeneratorError as that function does."""
    if name in SHAPES:
        model, num_prompt = make_model(SHAPES[name], dtype, device), SHAPES[name].num_prompt
    else:
        model, num_prompt = find_generator(name, grid).load(dtype, device).language_model, NUM_PROMPT
    if not hasattr(model.get_decoder(), "layers") or not hasattr(model.get_decoder(), "norm"):
        raise GeneratorError(
            f"{name} is a {type(model).__name__}, and the bench measures models that are built as Llama is"
        )
    family = next((subject for kind, subject in SUBJECTS.items() if isinstance(model, kind)), CausalSubject)
    return family(name, model, find_head_map(name, grid), num_prompt)


def random_map(num_layers: int, num_kv_heads: int, grid: tuple[int, int]) -> HeadMap:
    """Random labels for a model without a map; the speed of a cache hardly depends on the labels."""
    labels = torch.rand(num_layers, num_kv_heads, generator=torch.Generator().manual_seed(0)) < 0.5
    return HeadMap(labels, grid, method=RANDOM_LABELS)


class _Ticker(LogitsProcessor):
    """Calls `on_step` at every step; does not change the logits."""

    def __init__(self, on_step: OnStep):
        self.on_step = on_step

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.on_step()
        return scores
