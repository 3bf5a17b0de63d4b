"""The two rooflines: speed of this machine's memory and matrix units, and the resulting times of a step.

A step cannot take less than the larger of the two times. Their sum is the time of a step that does not overlap them.

Both speeds are measured here, on the device and in the dtype of the run; no figure comes from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ssd_cache.bench.cases import Case
from ssd_cache.bench.subject import Subject
from ssd_cache.cache.eviction import slot_of
from ssd_cache.cache.quantized import slot_nbytes

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Size of the copied tensor on each device that the bench supports, far larger than the caches of any processor."""

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
TRIES = 7


@dataclass(frozen=True)
class Machine:
    """Measured speeds.

    Attributes:
        copy_speed: bytes per second of a large copy, read and written bytes both counted.
        matrix_speed: floating-point operations per second of a large square matrix product.
    """

    copy_speed: float
    matrix_speed: float


@dataclass(frozen=True)
class StepWork:
    """Minimum work of one step in any implementation: bytes to read, operations to make.

    Attributes:
        weight_bytes: the decoder's and the head's weights, read once for the whole batch.
        key_value_bytes: K and V of all rows, mean over the generated steps.
        operations: two per weight and row; four per row, token, query head and head dimension.
    """

    weight_bytes: int
    key_value_bytes: float
    operations: float

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """The times that reading all bytes and executing all operations take."""
        return (self.weight_bytes + self.key_value_bytes) / machine.copy_speed, self.operations / machine.matrix_speed


def step_work(subject: Subject, case: Case, batch_size: int, positions: Sequence[int]) -> StepWork:
    """The mean work of a step over these positions."""
    config, rows, weights = subject.config, subject.rows_per_image * batch_size, subject.step_weights()
    kv_dtype = None if case.is_full else case.make_ssd(subject.head_map).kv_dtype
    of_prompt, of_slot = (
        slot_nbytes(subject.head_dim, subject.model.dtype.itemsize, kind) for kind in (None, kv_dtype)
    )
    visual = mean_tokens_read(subject, case, positions)
    products = sum(weight.numel() for weight in weights if weight.dim() > 1)
    attention = config.num_hidden_layers * config.num_attention_heads * subject.head_dim * (subject.num_prompt + visual)
    heads = config.num_hidden_layers * config.num_key_value_heads
    return StepWork(
        weight_bytes=sum(weight.nbytes for weight in weights),
        key_value_bytes=rows * heads * (subject.num_prompt * of_prompt + visual * of_slot),
        operations=rows * (2 * products + 4 * attention),
    )


def mean_tokens_read(subject: Subject, case: Case, positions: Sequence[int]) -> float:
    """Visual tokens whose K and V a step must read, the new token included: mean over heads and steps.

    A full cache has seen `position + 1` visual tokens. A head with fewer slots than that holds between `slots - buffer`
    and `slots` older ones. Further reads, for example of masked free slots, are overhead and do not count.
    """
    if case.is_full:
        return sum(positions) / len(positions) + 1
    plans = [layer.plan for layer in case.make_ssd(subject.head_map).layers]
    kinds = [(slots, min(plan.buffer, slots)) for plan in plans for slots in plan.num_slots]
    means = {kind: sum(slot_of(position, *kind) + 1 for position in positions) / len(positions) for kind in set(kinds)}
    return sum(means[kind] for kind in kinds) / len(kinds)


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """Copy a large tensor and multiply large matrices, `TRIES` times each; the best time counts."""
    source = torch.zeros(COPY_BYTES[device.type] // dtype.itemsize, dtype=dtype, device=device)
    target, side = torch.zeros_like(source), MATRIX_SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    return Machine(
        copy_speed=2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device),
        matrix_speed=2 * side**3 / _best_seconds(lambda: left @ right, device),
    )


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(TRIES):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
