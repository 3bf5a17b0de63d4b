"""The state file of a profiling run: the sums of all batches so far.

It has the format of `runs/run_state.py`. `profiling/statistics.py` defines the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_cache.io.untrusted import check_like
from ssd_cache.profiling.statistics import HeadStatistics
from ssd_cache.runs.run_state import ProfilingError, RunState, check_same_run, not_a_state, read_state, write_state

FORMAT, WHAT = "ssd-cache profile 2", "the sums of a profiling run"

ROUNDING, LARGEST = 1e-3, 2.0**53
"""How far below 0 rounding may push a sum of positive terms, and an upper bound for counts of queries."""


def save_state(
    path: Path, statistics: HeadStatistics, num_batches: int, settings: Mapping[str, Any], is_finished: bool = False
) -> None:
    """Write the sums of the first `num_batches` batches; raises ProfilingError as `write_state` does."""
    state = RunState(_tensors(statistics), settings, {"num_batches": num_batches}, is_finished)
    write_state(path, FORMAT, state, f"the sums of the first {num_batches} batches")


def load_state(path: Path, statistics: HeadStatistics, settings_of: Callable[[int], Mapping[str, Any]]) -> int:
    """Fill empty statistics with the sums in a file that `save_state` wrote; returns their number of batches.

    `settings_of` gives the settings of this run after a number of batches. Raises ProfilingError for another file, and
    for sums of a run with other settings.
    """
    state = read_state(path, FORMAT, WHAT)
    num_batches, sums = state.counts.get("num_batches"), state.tensors
    if type(num_batches) is not int or not 0 <= num_batches < LARGEST:
        raise not_a_state(path, WHAT, "num_batches is not a count")
    settings = settings_of(num_batches)
    check_same_run(path, state.settings, settings)
    try:
        check_like(sums, _tensors(statistics))
        for name, value in sums.items():
            if not ((value > -ROUNDING) & (value < LARGEST)).all():
                raise ValueError(f"{name} holds sums below 0, or larger than any run counts")
        if sums["num_pictures"] != settings["num_prompts"]:
            raise ValueError(f"{sums['num_pictures']:g} images of {settings['num_prompts']} prompts")
        statistics.num_images = settings["num_prompts"]
        for name, value in statistics.sums.items():
            value.copy_(sums[name])
        shares = [statistics.offset_share(), statistics.prompt_share(), statistics.margin_share()]
        for level in statistics.levels:
            shares += [statistics.retained(kind, level.num_slots) for kind in ("spatial", "semantic")]
        if not all(share.float().isfinite().all() for share in shares):
            raise ValueError("its sums have no finite ratio")
    except ValueError as error:
        raise not_a_state(path, WHAT, error) from error
    return num_batches


def recorded_batch_size(path: Path) -> int | None:
    """The batch size of the run that wrote a state file; None without a valid file (`load_state` refuses bad files)."""
    try:
        found = read_state(path, FORMAT, WHAT).settings.get("batch_size")
    except ProfilingError:
        return None
    return found if type(found) is int and found > 0 else None


def _tensors(statistics: HeadStatistics) -> dict[str, torch.Tensor]:
    # the files keep the former name of num_images
    return statistics.sums | {"num_pictures": torch.tensor(statistics.num_images, dtype=torch.float64)}
