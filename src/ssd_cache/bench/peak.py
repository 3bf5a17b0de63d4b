"""Peak memory of generation on the CPU, as Linux reports it; each case runs in a separate process.

A process that has measured another case keeps that peak and part of that memory. On a GPU, torch reports the peak
(`bench/running.py`).
"""

from __future__ import annotations

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ssd_cache.bench.cases import Case
from ssd_cache.bench.running import generate_windows
from ssd_cache.bench.subject import load_subject
from ssd_cache.layout import Grid

STATUS = Path("/proc/self/status")


def can_read_peak() -> bool:
    """Whether this system reports the peak memory of a process, as Linux does."""
    return STATUS.exists()


def peak_of(name: str, dtype: torch.dtype, case: Case, batch_size: int, grid: Grid | None = None) -> int:
    """Bytes, in a new process: load the model, fill the cache up to the image's last steps, generate these steps."""
    context = multiprocessing.get_context("forkserver")  # the parent has imported modules but generated nothing
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_generate_last, name, dtype, case, batch_size, grid, torch.get_num_threads()).result()


def _generate_last(
    name: str, dtype: torch.dtype, case: Case, batch_size: int, grid: Grid | None, num_threads: int
) -> int:
    torch.set_num_threads(num_threads)
    subject = load_subject(name, dtype, torch.device("cpu"), grid)
    cells = subject.head_map.num_visual_tokens
    with case.running(subject):
        generate_windows(subject, case.make_cache(subject), batch_size, [range(cells - 2, cells)])
    # VmHWM is reset for every program. The ru_maxrss of getrusage is not: a child starts with its parent's peak.
    found = re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no VmHWM")
    return int(found[1]) * 1024
