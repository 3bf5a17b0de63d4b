"""Checks of a preparation before the weights are loaded: whether they fit into memory, and how long images will take.

Both need only the configuration. The plan measures the real run later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ssd_cache.models import Checkpoint, GeneratorError
from ssd_cache.preparing.plan import duration, memory
from ssd_cache.preparing.stages import LEARNED_AT_ONCE, NUM_CHECKED, NUM_PROFILED
from ssd_cache.profiling.measuring import DEFAULT_BATCH_SIZE
from ssd_cache.runs.batching import free_memory
from ssd_cache.runs.metering import metered
from ssd_cache.runs.run_state import ProfilingError
from ssd_cache.training.recording import BATCHES_AT_ONCE


def check_weights_fit(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse weights that are larger than the free memory; raises GeneratorError."""
    config, free = checkpoint.family.text_config_of(checkpoint.config), free_memory(device)
    num_bytes = (_num_layer_weights(checkpoint) + 2 * config.vocab_size * config.hidden_size) * dtype.itemsize
    if free is not None and num_bytes > free:
        name = str(dtype).removeprefix("torch.")
        raise GeneratorError(
            f"the weights of {checkpoint.name} take about {memory(num_bytes)} in {name}, and {memory(free)} are free "
            f"on {device}: give another --device, or {'--dtype bfloat16' if dtype.itemsize > 2 else 'free some'}"
        )


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
    refuse_long_run(checkpoint, device, total, max_hours, " for its images alone")


def refuse_long_run(
    checkpoint: Checkpoint, device: torch.device, seconds: float, max_hours: float, what: str = ""
) -> None:
    """Raise ProfilingError for an estimate above `max_hours`."""
    if seconds > 3600 * max_hours:
        raise ProfilingError(
            f"{checkpoint.name} is estimated to take {duration(seconds)}{what} on {device}, more than {max_hours:g} h: "
            "give --yes to run it anyway (max_hours=None), --quick to leave learning out, or another --device"
        )


def step_seconds(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, rows: int) -> float:
    """A low estimate of a decoder step on some rows: the time of one product, times the weights of all layers."""
    config = checkpoint.family.text_config_of(checkpoint.config)
    weight = torch.ones(config.intermediate_size, config.hidden_size, dtype=dtype, device=device)
    states = torch.ones(rows, config.hidden_size, dtype=dtype, device=device)
    for _ in range(3):  # the first ones include one-time work
        with metered(device) as cost:
            torch.nn.functional.linear(states, weight)
    return cost.seconds * _num_layer_weights(checkpoint) / weight.numel()


def _num_layer_weights(checkpoint: Checkpoint) -> int:
    """Weights of the decoder's layers, as in Llama."""
    config = checkpoint.family.text_config_of(checkpoint.config)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * head_dim * (heads + checkpoint.num_kv_heads)
    return checkpoint.num_layers * (attention + 3 * hidden * config.intermediate_size)
