"""The roofline: speed of this machine's memory and matrix units, and the resulting lower bound of a step.

Both speeds are measured here, on the device and in the dtype of the run; no figure comes from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ssd_cache.bench.cases import Case
from ssd_cache.bench.sizes import mean_tokens_read
from ssd_cache.bench.subject import Subject
from ssd_cache.cache.quantized import slot_nbytes

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Size of the copied tensor, far larger than the caches of any processor."""

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

    def least_seconds(self, machine: Machine) -> float:
        """The larger of the times for reading all bytes and for making all operations."""
        memory = (self.weight_bytes + self.key_value_bytes) / machine.copy_speed
        return max(memory, self.operations / machine.matrix_speed)


def step_work(subject: Subject, case: Case, batch_size: int, positions: list[int]) -> StepWork:
    """The mean work of a step over these positions."""
    config, rows = subject.config, subject.rows_per_picture * batch_size
    weights = subject.step_weights()
    tokens = mean_tokens_read(subject, case, positions)
    kv_dtype = None if case.is_full else case.make_ssd(subject.head_map).kv_dtype
    of_prompt, of_slot = (
        slot_nbytes(subject.head_dim, subject.model.dtype.itemsize, kind) for kind in (None, kv_dtype)
    )
    of_head = subject.num_prompt * of_prompt + (tokens - subject.num_prompt) * of_slot
    products = sum(weight.numel() for weight in weights if weight.dim() > 1)
    attention = config.num_hidden_layers * config.num_attention_heads * subject.head_dim * tokens
    return StepWork(
        weight_bytes=sum(weight.nbytes for weight in weights),
        key_value_bytes=config.num_hidden_layers * config.num_key_value_heads * rows * of_head,
        operations=rows * (2 * products + 4 * attention),
    )


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """Copy a large tensor and multiply large matrices, `TRIES` times each; the best time counts."""
    return Machine(_copy_speed(dtype, device), _matrix_speed(dtype, device))


def _copy_speed(dtype: torch.dtype, device: torch.device) -> float:
    source = torch.zeros(COPY_BYTES[device.type] // dtype.itemsize, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _matrix_speed(dtype: torch.dtype, device: torch.device) -> float:
    side = MATRIX_SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / _best_seconds(lambda: left @ right, device)


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
