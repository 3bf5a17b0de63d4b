"""Generate images of a list of prompts under one policy, and measure tokens, bytes and seconds.

Holds the loop over batches with its progress bar. Several processes share the batches. It neither reads options nor
writes files.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ssd_cache.cache.cache import MemoryStats, SSDCache
from ssd_cache.models import Generator
from ssd_cache.runs.processes import Processes


@dataclass(frozen=True)
class Drawing:
    """Visual tokens `[images, cells]` of one policy, with their memory and time.

    `memory` is the maximum over batches. `seconds` is the maximum over processes.
    """

    policy: str
    tokens: torch.Tensor
    seconds: float
    memory: MemoryStats
    peak_device_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Visual tokens of all images over wall time. The time includes prompts and sampling, not image decoding."""
        return self.tokens.numel() / self.seconds


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
    processes: Processes,
) -> Drawing:
    """Generate one image a prompt in batches of `batch_size`. Batch number i has the seed `seed + i` in any process.

    The processes take turns with the batches, and each process returns the tokens of all batches.
    """
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    own = range(processes.index, len(batches), processes.count)
    on_gpu = generator.model.device.type == "cuda"
    parts, memory, seconds = {}, MemoryStats(0, 0, 0), 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(generator.model.device)
    with tqdm(
        total=generator.checkpoint.num_visual_tokens * sum(len(batches[number]) for number in own),
        desc=policy,
        unit=" visual tokens",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # print fewer lines into a log file
        disable=not processes.is_main,
    ) as progress:
        for number in own:
            cache.reset()
            started = time.perf_counter()
            tokens = generator.generate(
                batches[number],
                cache,
                guidance_scale=guidance_scale,
                temperature=temperature,
                seed=seed + number,
                on_tokens=progress.update,
            ).cpu()  # waits for the device
            seconds += time.perf_counter() - started
            parts[number] = tokens
            memory = max(memory, cache.memory_stats(), key=lambda stats: stats.key_value)
    peak = torch.cuda.max_memory_allocated(generator.model.device) if on_gpu else None
    cache.reset()
    drawn = processes.gather_all((parts, seconds, memory, peak))
    parts = {number: tokens for others, *_ in drawn for number, tokens in others.items()}
    return Drawing(
        policy,
        torch.cat([parts[number] for number in range(len(batches))]),
        max(seconds for _, seconds, _, _ in drawn),
        max((memory for _, _, memory, _ in drawn), key=lambda stats: stats.key_value),
        None if peak is None else max(peak for *_, peak in drawn),
    )
