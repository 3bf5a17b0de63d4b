"""Peak memory of generation on the CPU, as Linux reports it; each case runs in a separate process.

A process that has measured another case keeps that peak and part of that memory. On a GPU, torch reports the peak
(`bench/running.py`).
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ssd_cache.bench.cases import Case
from ssd_cache.bench.running import draw_stretches
from ssd_cache.bench.stretches import last_steps
from ssd_cache.bench.subject import load_subject
from ssd_cache.layout import Grid

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class ProcessPeak:
    """Resident memory of a process that generated with one case.

    Attributes:
        peak: peak of the process, in bytes.
        before: bytes with the model loaded, before generation.
    """

    peak: int
    before: int


def can_tell_peak() -> bool:
    """Whether this system reports the peak memory of a process, as Linux does."""
    return STATUS.exists()


def peak_of(name: str, dtype: torch.dtype, case: Case, batch_size: int, grid: Grid | None = None) -> ProcessPeak:
    """Measure in a new process: load the model, fill the cache up to the image's last steps, generate these steps."""
    context = multiprocessing.get_context("forkserver")  # the parent has imported modules but generated nothing
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_draw_last, name, dtype, case, batch_size, grid, torch.get_num_threads()).result()


def _draw_last(
    name: str, dtype: torch.dtype, case: Case, batch_size: int, grid: Grid | None, num_threads: int
) -> ProcessPeak:
    torch.set_num_threads(num_threads)
    subject = load_subject(name, dtype, torch.device("cpu"), grid)
    before = _status("VmRSS")
    with case.running(subject):
        draw_stretches(subject, case.make_cache(subject), batch_size, last_steps(subject.head_map.num_visual_tokens))
    return ProcessPeak(_status("VmHWM"), before)


def _status(field: str) -> int:
    """A field of this process's status file on Linux, in bytes.

    VmHWM is reset for every program. The ru_maxrss of getrusage is not: a child starts with its parent's peak.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")
