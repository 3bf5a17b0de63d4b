"""What a profiling run keeps on disk and shares between processes: its sums after every batch.

The file is safetensors with the run's settings in its header, and is replaced in one step, so an interruption leaves
the sums of whole batches. It does not draw, and what the sums mean is `statistics.py`'s.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ssd_cache.showing import differences
from ssd_cache.statistics import HeadStatistics, ProfilingError
from ssd_cache.untrusted import check_like, checked, parse_json, read_count, read_tensors
from ssd_cache.writing import write_files

FORMAT = "ssd-cache profile 1"

ROUNDING, LARGEST = 1e-3, 2.0**53
"""How far below 0 rounding may take a sum of positive terms, and a bound for counts of queries."""


def save_state(path: Path, statistics: HeadStatistics, num_batches: int, settings: Mapping[str, Any]) -> None:
    """Write the sums of the first `num_batches` batches, whole or not at all.

    Raises:
        ProfilingError: it can not be written; an older file is as it was.
    """
    header = {"format": FORMAT, "num_batches": str(num_batches), "settings": json.dumps(settings)}
    try:
        write_files({path: safetensors.torch.save(statistics.state_dict(), metadata=header)})
    except OSError as error:
        raise ProfilingError(
            f"{path}: the sums of the first {num_batches} batches can not be written ({error.strerror}); make room, or "
            "give another file"
        ) from error


def load_state(path: Path, statistics: HeadStatistics, settings: Mapping[str, Any]) -> int:
    """Fill empty statistics with the sums in a file that `save_state` wrote; returns how many batches they are of.

    Raises:
        ProfilingError: another file, or sums of a run with other settings.
    """
    try:
        header, sums = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError("it is of another kind or version")
        found = checked(dict, parse_json(header.get("settings", "")), "settings")
        num_batches = read_count(header, "num_batches")
        check_same_run(path, found, settings)
        check_like(sums, statistics.state_dict())
        for name, value in sums.items():
            if not ((value > -ROUNDING) & (value < LARGEST)).all():
                raise ValueError(f"{name} holds sums below 0, or larger than any run counts")
        if sums["num_pictures"] != sums["num_pictures"].floor():
            raise ValueError("num_pictures is no whole number")
        statistics.load_state_dict(sums)
    except ProfilingError:
        raise
    except (OSError, ValueError) as error:
        raise ProfilingError(
            f"{path}: not the sums of a profiling run ({error}); give another file, or delete it to begin anew"
        ) from error
    return num_batches


def check_same_run(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to go on from a file that a run with other settings has left; raises ProfilingError, naming them."""
    if differing := differences(found, settings):
        raise ProfilingError(
            f"{path}: the sums of another run ({differing}); give another file, or delete it to begin anew"
        )


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
