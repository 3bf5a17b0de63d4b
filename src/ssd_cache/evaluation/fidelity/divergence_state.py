"""The finished part of `measure_divergence`: the images, and a sum and a count of batches for every level and head.

It is kept in a `run_state.py` state file. What is measured, and in which order, is in `divergence.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssd_cache.io.untrusted import check_like
from ssd_cache.runs.run_state import RunState, check_images, check_same_run, not_a_state, read_state, write_state

FORMAT = "ssd-cache fit 2"
"""The first format was JSON without the images."""

WHAT = "the measurements of ssd-cache fit"

ROUNDING = 1e-6
"""How far below 0 rounding errors may move a divergence."""


@dataclass
class DivergenceState:
    """The progress of `measure_divergence`.

    Attributes:
        images: visual tokens of the first batches, int64 `[images, cells]` each.
        sums: for each level, the KL divergence summed over the images of a head's finished batches, float64
            `[layers, kv_heads]`.
        num_done: for each level, the number of finished batches, int64 `[layers, kv_heads]`.
    """

    images: list[torch.Tensor]
    sums: dict[int, torch.Tensor]
    num_done: dict[int, torch.Tensor]

    @classmethod
    def empty(cls, levels: Sequence[int], shape: tuple[int, int]) -> DivergenceState:
        """The state before the first image."""
        sums = {level: torch.zeros(shape, dtype=torch.float64) for level in levels}
        return cls([], sums, {level: torch.zeros(shape, dtype=torch.int64) for level in levels})

    def save(self, path: Path, settings: Mapping[str, Any], num_batches: int) -> None:
        """Write it to a file, completely or not at all; raises ProfilingError."""
        tensors = {f"images.{index}": tokens for index, tokens in enumerate(self.images)}
        tensors |= {f"sum.{level}": total for level, total in self.sums.items()}
        tensors |= {f"done.{level}": count for level, count in self.num_done.items()}
        is_finished = all(bool((count == num_batches).all()) for count in self.num_done.values())
        write_state(path, FORMAT, RunState(tensors, settings, is_finished=is_finished), WHAT)

    @classmethod
    def load(
        cls, path: Path, settings: Mapping[str, Any], levels: Sequence[int], shape: tuple[int, int], num_cells: int
    ) -> DivergenceState:
        """Read a file that `save` wrote in a run with the same settings.

        Raises:
            ProfilingError: it is another kind of file, or of a run with other settings.
        """
        file = read_state(path, FORMAT, WHAT)
        check_same_run(path, file.settings, settings)
        state = cls.empty(levels, shape)
        tensors = dict(file.tensors)
        try:
            state.images = check_images(tensors, num_cells)
            sums = {f"sum.{level}": total for level, total in state.sums.items()}
            counts = {f"done.{level}": count for level, count in state.num_done.items()}
            check_like(tensors, sums | counts)
            if any((tensors[name] < -ROUNDING).any() for name in (*sums, *counts)):
                raise ValueError("it holds numbers below 0")
            state.sums = {level: tensors[f"sum.{level}"] for level in levels}
            state.num_done = {level: tensors[f"done.{level}"] for level in levels}
        except ValueError as error:
            raise not_a_state(path, WHAT, error) from error
        return state
