"""Check of a preparation before the weights are loaded: how long its images will take at least.

It needs only the configuration. The plan measures the real run later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ssd_cache.models import Checkpoint
from ssd_cache.preparing.stages import LEARNED_AT_ONCE, NUM_CHECKED, NUM_PROFILED
from ssd_cache.profiling.measuring import DEFAULT_BATCH_SIZE
from ssd_cache.runs.limits import refuse_long_run, step_seconds
from ssd_cache.training.recording import BATCHES_AT_ONCE

SHORTER = "--quick to leave learning out"
"""The option that shortens a preparation, for messages."""


def check_hours(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    stages: Sequence[str],
    num_prompts: int,
    batch_size: int | None,
    max_hours: float,
) -> None:
    """Refuse a run whose images alone take longer than `max_hours`; raises ProfilingError with the estimate."""
    total = 0.0
    for stage, size, number in (
        ("profile", batch_size or DEFAULT_BATCH_SIZE, min(NUM_PROFILED, num_prompts - NUM_CHECKED)),
        ("learn", BATCHES_AT_ONCE * LEARNED_AT_ONCE, num_prompts - NUM_CHECKED),
    ):
        if stage in stages:
            rows = min(size, number) * (1 if checkpoint.family.default_guidance is None else 2)
            step = step_seconds(checkpoint, dtype, device, rows)
            total += math.ceil(number / size) * checkpoint.num_visual_tokens * step
    refuse_long_run(checkpoint, device, total, max_hours, SHORTER, " for its images alone")
