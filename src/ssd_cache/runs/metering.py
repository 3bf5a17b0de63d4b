"""Measures a part of a run: its wall time, and the peak memory of the process or of the GPU; returns freed memory.

On a CPU, Linux resets and reports the peak of the resident memory, which includes the model's weights. On a GPU, torch
reports the peak of the memory that it allocated.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

PROCESS = Path("/proc/self")

M_MMAP_THRESHOLD = -3
"""The parameter of glibc's `mallopt` from whose value on a block gets pages of its own."""

MAPPED_BYTES, GLIBC_MAPPED_BYTES = 16 << 20, 32 << 20
"""That value in `large_blocks_mapped`, and the one that glibc reaches by itself once a block of that size is freed."""


@dataclass
class Cost:
    """Seconds of wall time, and the peak memory in bytes; None where the system does not report it."""

    seconds: float = 0.0
    peak_bytes: int | None = None


def highest_peak(*costs: Cost) -> int | None:
    """The highest peak of these costs, in bytes; None if the system reports none."""
    return max((cost.peak_bytes for cost in costs if cost.peak_bytes is not None), default=None)


@contextmanager
def metered(device: torch.device, release: bool = True) -> Iterator[Cost]:
    """Measure the block; the result is filled in at its end, also after an exception.

    Without `release`, memory that earlier work has freed may count, as in a run that repeats this work.
    """
    if release:
        release_memory()
    cost, started = Cost(), time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            (PROCESS / "clear_refs").write_text("5")  # resets VmHWM
    try:
        yield cost
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            cost.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            cost.peak_bytes = _peak_resident()
        cost.seconds = time.perf_counter() - started


def release_memory() -> None:
    """Return freed memory of the CPU to the system, so that it is not part of the peak of what follows."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def large_blocks_mapped() -> Iterator[None]:
    """Inside the block, memory of the CPU from `MAPPED_BYTES` on returns to the system as soon as it is freed.

    Otherwise glibc keeps freed blocks of up to 32 MB. They leave gaps that tensors of other sizes do not fit into, and
    a training step then holds about twice the memory of its tensors. With another C library, nothing changes.
    """
    _set_mapped_bytes(MAPPED_BYTES)
    try:
        yield
    finally:
        _set_mapped_bytes(GLIBC_MAPPED_BYTES)


def _set_mapped_bytes(number: int) -> None:
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, number)


def _peak_resident() -> int | None:
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return None
