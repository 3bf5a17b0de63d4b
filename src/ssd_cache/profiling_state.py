"""What a profiling run keeps on disk and shares between processes: its sums after every batch.

The file is a `run_state.py` state file, so an interruption leaves the sums of whole batches. It does not draw, and
what the sums mean is `statistics.py`'s.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_cache.run_state import RunState, check_same_run, not_a_state, read_state, write_state
from ssd_cache.showing import shown
from ssd_cache.statistics import HeadStatistics, ProfilingError
from ssd_cache.untrusted import check_like

FORMAT = "ssd-cache profile 2"
"""The 2 since the settings name the prompts of the finished batches instead of all prompts."""

ROUNDING, LARGEST = 1e-3, 2.0**53
"""How far below 0 rounding may take a sum of positive terms, and a bound for counts of queries."""


def save_state(
    path: Path, statistics: HeadStatistics, num_batches: int, settings: Mapping[str, Any], is_finished: bool = False
) -> None:
    """Write the sums of the first `num_batches` batches, whole or not at all.

    Raises:
        ProfilingError: it can not be written; an older file is as it was.
    """
    state = RunState(statistics.state_dict(), settings, {"num_batches": num_batches}, is_finished)
    write_state(path, FORMAT, state, f"the sums of the first {num_batches} batches")


def load_state(
    path: Path,
    statistics: HeadStatistics,
    settings: Mapping[str, Any],
    of_batches: Callable[[int], Mapping[str, Any]] = lambda num_batches: {},
) -> int:
    """Fill empty statistics with the sums in a file that `save_state` wrote; returns how many batches they are of.

    Args:
        path: the file.
        statistics: filled.
        settings: of this run.
        of_batches: from the number of finished batches to further settings of this run.

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
    """The batch size of the run that wrote a file of sums; None where there is none. `load_state` refuses bad files."""
    try:
        found = read_state(path, FORMAT, "the sums of a profiling run").settings.get("batch_size")
    except ProfilingError:
        return None
    return found if type(found) is int and found > 0 else None


class Processes:
    """The processes that share a run, as `accelerate launch` and `torchrun` start them; else this one alone.

    Attributes:
        index, count: this process's number, from 0, and how many there are.
        device: where this process should compute, or None to choose freely.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self.device: torch.device | None = None
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if wanted > 1:
            try:
                self._accelerate = importlib.import_module("accelerate")
            except ImportError as error:
                raise ProfilingError(
                    f"WORLD_SIZE={wanted}: several processes need accelerate: pip install accelerate"
                ) from error
            has_gpus = torch.accelerator.is_available() and not torch.backends.mps.is_available()
            use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
            self._state = state = self._accelerate.PartialState(cpu=use_cpu or not has_gpus)
            if state.num_processes != wanted:  # each would draw everything and write over the others' files
                raise ProfilingError(
                    f"WORLD_SIZE={wanted}, but accelerate finds {state.num_processes} process: start them with "
                    "`accelerate launch`, with --cpu where there is no GPU"
                )
            self.index, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows a bar."""
        return self.index == 0

    def choose_device(self, device: str) -> str | torch.device:
        """Where this process computes: as asked for, or where "auto" is asked for, on its own device if it has one."""
        return self.device if device == "auto" and self.device is not None else device

    def close(self) -> None:
        """Leave the group; for the program whose processes these are, at its end."""
        if self.count > 1:
            self._state.destroy_process_group()

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that were given unlike things, such as head maps: each would draw pictures of its own kind.

        All of them have to come here.

        Raises:
            ProfilingError: in every process, naming what the first that differs has, and process 0.
        """
        told = self.gather_all(dict(facts))
        for number, other in enumerate(told):
            differing = [
                f"{name} {told[0].get(name)!r} and {other.get(name)!r}"
                for name in sorted(told[0].keys() | other.keys())
                if told[0].get(name) != other.get(name)
            ]
            if differing:
                raise ProfilingError(
                    f"processes 0 and {number} of {self.count} do not agree: {'; '.join(differing)}; give all of them "
                    "the same"
                )

    def gather(self, statistics: HeadStatistics) -> list[HeadStatistics]:
        """What every process brings, in the order of the processes."""
        if self.count == 1:
            return [statistics]
        vectors = self._accelerate.utils.gather(_flatten(statistics)[None].to(self.device))
        return [_unflatten(vector.cpu(), statistics) for vector in vectors]

    def gather_all(self, value: Any) -> list[Any]:
        """The value of every process, in the order of the processes; anything that can be pickled."""
        return [value] if self.count == 1 else self._accelerate.utils.gather_object([value])

    def from_main(self, statistics: HeadStatistics, num_batches: int) -> tuple[HeadStatistics, int]:
        """The main process's sums and number of batches, in every process."""
        if self.count == 1:
            return statistics, num_batches
        vector = torch.cat([_flatten(statistics), torch.tensor([num_batches], dtype=torch.float64)])
        vector = self._accelerate.utils.broadcast(vector.to(self.device)).cpu()
        return _unflatten(vector[:-1], statistics), int(vector[-1])


def _flatten(statistics: HeadStatistics) -> torch.Tensor:
    return torch.cat([value.flatten() for value in statistics.state_dict().values()])


def _unflatten(vector: torch.Tensor, like: HeadStatistics) -> HeadStatistics:
    shapes = {name: value.shape for name, value in like.state_dict().items()}
    parts = vector.split([shape.numel() for shape in shapes.values()])
    result = like.empty()
    result.load_state_dict({name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)})
    return result
