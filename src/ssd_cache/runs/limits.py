"""Checks before a long run: whether the weights fit into memory, and whether it takes longer than its user allows.

They need only the configuration of a checkpoint. `runs/plan.py` has the estimate from measured first batches.
"""

from __future__ import annotations

import torch

from ssd_cache.models import Checkpoint, GeneratorError
from ssd_cache.runs.batching import free_memory
from ssd_cache.runs.metering import metered
from ssd_cache.runs.plan import duration, memory
from ssd_cache.runs.run_state import ProfilingError


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


def refuse_long_run(
    checkpoint: Checkpoint,
    device: torch.device,
    seconds: float,
    max_hours: float,
    shorter: str,
    what: str = "",
) -> None:
    """Raise ProfilingError for an estimate above `max_hours`; `shorter` is the option that shortens the run."""
    if seconds > 3600 * max_hours:
        raise ProfilingError(
            f"{checkpoint.name} is estimated to take {duration(seconds)}{what} on {device}, more than {max_hours:g} h: "
            f"give --yes to run it anyway (max_hours=None), {shorter}, or another --device"
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
