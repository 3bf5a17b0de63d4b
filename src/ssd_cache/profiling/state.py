"""Save, load and gather the sums of a profiling run: on disk after every batch, and between processes.

The file is a state file of `runs/run_state.py`, so an interruption leaves the sums of whole batches. Nothing here
generates images. `profiling/statistics.py` defines the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_cache.io.showing import shown
from ssd_cache.io.untrusted import check_like
from ssd_cache.profiling.statistics import HeadStatistics
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.run_state import ProfilingError, RunState, check_same_run, not_a_state, read_state, write_state

FORMAT = "ssd-cache profile 2"
"""Version 2: the settings name the prompts of the finished batches instead of all prompts."""

ROUNDING, LARGEST = 1e-3, 2.0**53
"""How far below 0 rounding may push a sum of positive terms, and an upper bound for counts of queries."""


def save_state(
    path: Path, statistics: HeadStatistics, num_batches: int, settings: Mapping[str, Any], is_finished: bool = False
) -> None:
    """Write the sums of the first `num_batches` batches atomically.

    Raises:
        ProfilingError: the file cannot be written; an older file is unchanged.
    """
    state = RunState(statistics.state_dict(), settings, {"num_batches": num_batches}, is_finished)
    write_state(path, FORMAT, state, f"the sums of the first {num_batches} batches")


def load_state(
    path: Path,
    statistics: HeadStatistics,
    settings: Mapping[str, Any],
    of_batches: Callable[[int], Mapping[str, Any]] = lambda num_batches: {},
) -> int:
    """Fill empty statistics with the sums in a file that `save_state` wrote; returns their number of batches.

    Args:
        path: the file.
        statistics: empty statistics, changed in place.
        settings: settings of this run.
        of_batches: function from the number of finished batches to further settings of this run.

    Raises:
        ProfilingError: another file, or sums of a run with other settings.
    """
    what = "the sums of a profiling run"
    state = read_state(path, FORMAT, what)
    num_batches = state.counts.get("num_batches")
    if type(num_batches) is not int or num_batches < 0:
        raise not_a_state(path, what, f"num_batches is {shown(num_batches)}")
    check_same_run(path, state.settings, {**settings, **of_batches(num_batches)})
    try:
        check_like(state.tensors, statistics.state_dict())
        for name, value in state.tensors.items():
            if not ((value > -ROUNDING) & (value < LARGEST)).all():
                raise ValueError(f"{name} holds sums below 0, or larger than any run counts")
        if state.tensors["num_pictures"] != state.tensors["num_pictures"].floor():
            raise ValueError("num_pictures is no whole number")
        statistics.load_state_dict(state.tensors)
    except ValueError as error:
        raise not_a_state(path, what, error) from error
    return num_batches


def recorded_batch_size(path: Path) -> int | None:
    """The batch size of the run that wrote a state file; None without a valid file (`load_state` refuses bad files)."""
    try:
        found = read_state(path, FORMAT, "the sums of a profiling run").settings.get("batch_size")
    except ProfilingError:
        return None
    return found if type(found) is int and found > 0 else None


def gather_statistics(processes: Processes, statistics: HeadStatistics) -> list[HeadStatistics]:
    """Gather the sums of every process, in the order of the processes."""
    return [_unflatten(vector, statistics) for vector in processes.gather(_flatten(statistics))]


def statistics_from_main(
    processes: Processes, statistics: HeadStatistics, num_batches: int
) -> tuple[HeadStatistics, int]:
    """Send the main process's sums and number of batches to every process."""
    vector = torch.cat([_flatten(statistics), torch.tensor([num_batches], dtype=torch.float64)])
    vector = processes.from_main(vector)
    return _unflatten(vector[:-1], statistics), int(vector[-1])


def _flatten(statistics: HeadStatistics) -> torch.Tensor:
    return torch.cat([value.flatten() for value in statistics.state_dict().values()])


def _unflatten(vector: torch.Tensor, like: HeadStatistics) -> HeadStatistics:
    shapes = {name: value.shape for name, value in like.state_dict().items()}
    parts = vector.split([shape.numel() for shape in shapes.values()])
    result = like.empty()
    result.load_state_dict({name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)})
    return result
