"""Peak memory of drawing on the CPU: each case in a process of its own, read from Linux's account of it.

A process that has measured another case keeps its peak, and parts of its memory. A GPU's peak is torch's to tell
(`running.py`).
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
    """Resident memory of a process that drew with one case.

    Attributes:
        peak: the most it ever had, in bytes.
        before: what it had with the model loaded and nothing drawn.
    """

    peak: int
    before: int


def can_tell_peak() -> bool:
    """Whether this system tells the peak of a process: Linux does."""
    return STATUS.exists()


def peak_of(name: str, dtype: torch.dtype, case: Case, batch_size: int, grid: Grid | None = None) -> ProcessPeak:
    """Load the model in a new process, fill the cache but for the end of the picture, draw the rest, tell the peak."""
    context = multiprocessing.get_context("forkserver")  # forks from a process that has imported, and drawn nothing
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
    """A field of Linux's account of this process, in bytes.

    VmHWM starts anew with every program; getrusage's ru_maxrss does not: a child's starts at its parent's peak.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")
