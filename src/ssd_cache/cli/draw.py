"""Draws one set of prompts under one policy and keeps count: tokens, bytes, seconds.

The loop over batches with its progress bar. It neither reads options nor writes files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from tqdm import tqdm

from ssd_cache.cache import MemoryStats, SSDCache
from ssd_cache.models import Generator


@dataclass(frozen=True)
class Drawing:
    """The pictures of one policy and what they cost; `memory` is that of the batch that held most."""

    policy: str
    images: list[Image.Image]
    num_tokens: int
    seconds: float
    memory: MemoryStats
    peak_device_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Visual tokens of all pictures over wall time; prompts and sampling are in it, decoding pictures is not."""
        return self.num_tokens / self.seconds


def draw(
    generator: Generator,
    policy: str,
    cache: SSDCache,
    prompts: Sequence[str],
    *,
    batch_size: int,
    guidance_scale: float | None,
    temperature: float | None,
    seed: int,
) -> Drawing:
    """Draw a picture a prompt in batches of `batch_size`; batch number i has the seed `seed + i`."""
    rows, columns = generator.checkpoint.grid
    on_gpu = generator.model.device.type == "cuda"
    parts, memory, seconds = [], MemoryStats(0, 0, 0), 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(generator.model.device)
    with tqdm(
        total=len(prompts) * rows * columns,
        desc=policy,
        unit=" visual tokens",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
    ) as progress:
        for number, start in enumerate(range(0, len(prompts), batch_size)):
            cache.reset()
            started = time.perf_counter()
            tokens = generator.generate(
                prompts[start : start + batch_size],
                cache,
                guidance_scale=guidance_scale,
                temperature=temperature,
                seed=seed + number,
                on_tokens=progress.update,
            ).cpu()  # waits for the device
            seconds += time.perf_counter() - started
            parts.append(tokens)
            memory = max(memory, cache.memory_stats(), key=lambda stats: stats.key_value)
    peak = torch.cuda.max_memory_allocated(generator.model.device) if on_gpu else None
    cache.reset()
    tokens = torch.cat(parts)
    return Drawing(policy, generator.to_images(tokens), tokens.numel(), seconds, memory, peak)
