"""Draw the same pictures with several caches in turn and time them: tokens per second and bytes of K and V.

Rounds are interleaved, so that a machine that slows down slows all alike; the first round warms up and is not counted.
It measures transformers' own `generate`, sampling and guidance included, not the cache alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
)

from ssd_cache.attention import NAME
from ssd_cache.cache import SSDCache
from ssd_cache.fast_decode import fast_decode
from ssd_cache.head_map import HeadMap

SHAPES = {"small-cpu": {"hidden_size": 512, "num_layers": 8, "num_heads": 8}}
"""Decoders by shape, with random weights: what a step costs does not depend on what the weights say."""

PROMPT_LENGTH = 16


@dataclass(frozen=True)
class Case:
    """A cache to measure: how to make a fresh one, the attention it runs with, and whether steps are compiled."""

    name: str
    make_cache: Callable[[], Cache]
    attention: str = NAME
    is_fast: bool = False


@dataclass
class Measurement:
    """What was measured of a case: seconds a round, and bytes of K and V after the last token."""

    name: str
    num_tokens: int
    seconds: list[float] = field(default_factory=list)
    nbytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Visual tokens of all pictures over the median round's seconds."""
        return self.num_tokens / statistics.median(self.seconds)


def random_janus(
    hidden_size: int, num_layers: int, num_heads: int, dtype: torch.dtype = torch.float32
) -> JanusForConditionalGeneration:
    """A `JanusForConditionalGeneration` with random weights and 576 visual tokens, tiny but for its decoder."""
    torch.manual_seed(0)
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 11 // 4,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads,
            "max_position_embeddings": 1024,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "mlp_ratio": 1.0,
            "projection_dim": hidden_size,
            "depth": 1,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16384,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 0,
            "projection_dim": hidden_size,
            "image_token_embed_dim": hidden_size,
        },
        image_token_id=6,
    )
    model = JanusForConditionalGeneration(config).to(dtype).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, generation_kwargs={"boi_token_id": 4}
    )
    return model


def default_cases(model: PreTrainedModel, head_map: HeadMap) -> list[Case]:
    """transformers' own full caches, SSD at three budgets, compiled and without a buffer, and the baselines at 20%."""
    config = model.config.get_text_config(decoder=True)
    length = PROMPT_LENGTH + head_map.num_visual_tokens

    def ssd(budget: float, buffer: int | None = None, policy: str = "ssd") -> Callable[[], Cache]:
        return lambda: SSDCache.from_policy(policy, head_map, budget, buffer=buffer)

    return [
        Case("DynamicCache", DynamicCache, "sdpa"),
        Case("StaticCache", lambda: StaticCache(config=config, max_cache_len=length), "sdpa"),
        Case("ssd 100%", ssd(1.0)),
        Case("ssd 50%", ssd(0.5)),
        Case("ssd 20%", ssd(0.2)),
        Case("ssd 20%, fast_decode", ssd(0.2), is_fast=True),
        Case("ssd 20%, buffer 1", ssd(0.2, 1)),
        Case("h2o 20%", ssd(0.2, policy="h2o")),
        Case("streaming-llm 20%", ssd(0.2, policy="streaming-llm")),
    ]


def measure(
    model: PreTrainedModel,
    cases: Sequence[Case],
    *,
    batch_size: int,
    rounds: int = 3,
    guidance_scale: float = 5.0,
    progress: bool = False,
) -> Iterator[list[Measurement]]:
    """Time every case once a round, one uncounted round first; yields all measurements after each round.

    Args:
        model: a Janus; its decoder's attention is set for every case and set back at the end.
        cases: what to measure.
        batch_size: pictures drawn at once; guidance doubles the rows.
        rounds: counted rounds.
        progress: show a bar over the batches of pictures.
    """
    before = model.config.get_text_config(decoder=True)._attn_implementation
    prompt = torch.randint(10, 60, (batch_size, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    prompt[:, 0], prompt[:, -1] = 1, model.generation_config.generation_kwargs["boi_token_id"]
    prompt = prompt.clamp(max=model.config.text_config.vocab_size - 1).to(model.device)
    cells = model.config.vision_config.num_image_tokens
    results = [Measurement(case.name, batch_size * cells) for case in cases]
    bar = tqdm(total=(rounds + 1) * len(cases), unit="batch", disable=not progress)
    try:
        for turn in range(rounds + 1):
            for case, result in zip(cases, results, strict=True):
                bar.set_description(case.name)
                model.set_attn_implementation({"text_config": case.attention})
                cache = case.make_cache()
                torch.manual_seed(0)
                _synchronize(model.device)
                start = time.perf_counter()
                with fast_decode(model) if case.is_fast else nullcontext():
                    model.generate(
                        prompt,
                        attention_mask=torch.ones_like(prompt),
                        generation_mode="image",
                        past_key_values=cache,
                        guidance_scale=guidance_scale,
                        do_sample=True,
                    )
                _synchronize(model.device)
                if turn > 0:
                    result.seconds.append(time.perf_counter() - start)
                result.nbytes = sum(_layer_nbytes(layer) for layer in cache.layers)
                bar.update()
            if turn > 0:
                yield results
    finally:
        bar.close()
        model.set_attn_implementation({"text_config": before})


def _layer_nbytes(layer) -> int:
    """Bytes of K and V of a cache layer, ours or transformers' own."""
    return layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes + layer.values.nbytes


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
