"""The processes that share a long run: their count, their communication, and a check that their settings agree.

`accelerate launch` or `torchrun` starts them. This module is independent of what they compute.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch

from ssd_cache.io.showing import differences
from ssd_cache.runs.run_state import ProfilingError

PATIENCE = timedelta(days=7)
"""Time that a process waits for others. torch waits 10 to 30 minutes, and shares of a long run differ by more."""


class Processes:
    """The processes of a run started by `accelerate launch` or `torchrun`; otherwise only this process.

    Attributes:
        index, count: the index of this process, from 0, and the number of processes.
        device: the device of this process, or None for a free choice.

    Raises:
        ProfilingError: WORLD_SIZE is above 1, but accelerate is not installed or finds another number of processes.
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
            self._state = state = self._accelerate.PartialState(cpu=use_cpu or not has_gpus, timeout=PATIENCE)
            if state.num_processes != wanted:  # each would generate all images and overwrite the others' files
                raise ProfilingError(
                    f"WORLD_SIZE={wanted}, but accelerate finds {state.num_processes} process: start them with "
                    "`accelerate launch`, with --cpu where there is no GPU"
                )
            self.index, self.count, self.device = state.process_index, state.num_processes, state.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows a progress bar."""
        return self.index == 0

    def choose_device(self, device: str) -> str | torch.device:
        """The device to compute on: `device`, but for "auto" the device of this process, if it has one."""
        return self.device if device == "auto" and self.device is not None else device

    def close(self) -> None:
        """Leave the process group; call this at the end of the program."""
        if self.count > 1:
            self._state.destroy_process_group()

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes with different settings; every process must call this method.

        Raises:
            ProfilingError: settings differ; raised in every process, with the values of process 0 and of the first
                process that differs.
        """
        found = self.gather_all(dict(facts))
        for number, other in enumerate(found):
            if differing := differences(found[0], other, ("in process 0", f"in process {number}")):
                raise ProfilingError(
                    f"processes 0 and {number} of {self.count} do not agree: {differing}; give all of them the same"
                )

    def gather_all(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of the processes; a value may be anything that can be pickled."""
        return [value] if self.count == 1 else self._accelerate.utils.gather_object([value])
