"""The state file of a profiling run: the sums of all batches so far.

It has the format of `runs/run_state.py`. `profiling/statistics.py` defines the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssd_cache.io.showing import shown
from ssd_cache.io.untrusted import check_like
from ssd_cache.profiling.statistics import HeadStatistics
from ssd_cache.runs.run_state import ProfilingError, RunState, check_same_run, not_a_state, read_state, write_state

FORMAT, WHAT = "ssd-cache profile 2", "the sums of a profiling run"
"""Version 2: the settings name the prompts of the finished batches instead of all prompts."""

FORMER = frozenset({"margin_chance", "sampled", "entropy", "top", "top_visual"})
"""Sums that earlier versions also stored."""

ROUNDING, LARGEST = 1e-3, 2.0**53
"""How far below 0 rounding may push a sum of positive terms, and an upper bound for counts of queries."""


def save_state(
    path: Path, statistics: HeadStatistics, num_batches: int, settings: Mapping[str, Any], is_finished: bool = False
) -> None:
    """Write the sums of the first `num_batches` batches; raises ProfilingError as `write_state` does."""
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
    state = read_state(path, FORMAT, WHAT)
    num_batches = state.counts.get("num_batches")
    if type(num_batches) is not int or num_batches < 0:
        raise not_a_state(path, WHAT, f"num_batches is {shown(num_batches)}")
    check_same_run(path, state.settings, {**settings, **of_batches(num_batches)})
    sums = {name: value for name, value in state.tensors.items() if name not in FORMER}
    try:
        check_like(sums, statistics.state_dict())
        for name, value in sums.items():
            if not ((value > -ROUNDING) & (value < LARGEST)).all():
                raise ValueError(f"{name} holds sums below 0, or larger than any run counts")
        if sums["num_pictures"] != sums["num_pictures"].floor():
            raise ValueError("num_pictures is not a whole number")
    except ValueError as error:
        raise not_a_state(path, WHAT, error) from error
    statistics.load_state_dict(sums)
    return num_batches


def recorded_batch_size(path: Path) -> int | None:
    """The batch size of the run that wrote a state file; None without a valid file (`load_state` refuses bad files)."""
    try:
        found = read_state(path, FORMAT, WHAT).settings.get("batch_size")
    except ProfilingError:
        return None
    return found if type(found) is int and found > 0 else None
