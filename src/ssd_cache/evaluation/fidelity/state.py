"""The state file of a measurement: tensors that the run fills in place, saves after every part, and resumes from.

`runs/run_state.py` defines the file. The measurements in `measure.py` and `divergence.py` define the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_cache.io.untrusted import check_like
from ssd_cache.runs.run_state import RunState, check_same_run, check_state_place, not_a_state, read_state, write_state


class MeasurementState:
    """Tensors of results and of progress, none of them below 0, and their file; without a file, nothing is saved.

    Args:
        state_file: when it exists, its numbers are copied into `tensors`.
        kind: name and version of the format.
        what: a description of the contents, for error messages.
        settings: everything that the results depend on, as JSON values.
        tensors: by name; the run changes them in place.

    Attributes:
        is_resumed: whether the file existed.

    Raises:
        ProfilingError: the file has other contents, is of a run with other settings, or cannot be written.
    """

    def __init__(
        self,
        state_file: str | os.PathLike[str] | None,
        kind: str,
        what: str,
        settings: Mapping[str, Any],
        tensors: dict[str, torch.Tensor],
    ):
        self.kind, self.what, self.settings, self.tensors = kind, what, settings, tensors
        self.path = None if state_file is None else Path(state_file)
        self.is_resumed = self.path is not None and self.path.exists()
        if self.path is None:
            return
        check_state_place(self.path)
        if not self.is_resumed:
            return
        file = read_state(self.path, kind, what)
        check_same_run(self.path, file.settings, settings)
        try:
            check_like(file.tensors, tensors)
            if any((tensor < 0).any() for tensor in file.tensors.values()):
                raise ValueError("it holds numbers below 0")
        except ValueError as error:
            raise not_a_state(self.path, what, error) from error
        for name, tensor in tensors.items():
            tensor.copy_(file.tensors[name])

    def save(self, is_finished: bool = False) -> None:
        """Write the file, completely or not at all; raises ProfilingError."""
        if self.path is not None:
            write_state(self.path, self.kind, RunState(self.tensors, self.settings, is_finished=is_finished), self.what)
