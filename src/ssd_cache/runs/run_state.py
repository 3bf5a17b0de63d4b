"""The state file of a long run: the results completed so far, and the settings that they depend on.

It is a safetensors file with JSON in its header. It is replaced in one step, so a process killed at any moment leaves
the last complete state. `ResumableState` serves runs that fill tensors in place; other runs interpret what `read_state`
returns.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from ssd_cache.io.showing import ReadableError, differences
from ssd_cache.io.untrusted import WrongFileError, check_like, checked, parse_json, read_tensors
from ssd_cache.io.writing import write_files

REMEDY = "give another file, or delete it to begin anew"


class ProfilingError(ReadableError):
    """A run that cannot start, continue or give valid results; the message names the problem and the remedy."""


class OtherRunError(ProfilingError, WrongFileError):
    """A state file of a run with other settings."""


class NotAStateError(ProfilingError, WrongFileError):
    """A file that is not a state of this kind of run."""


@dataclass(frozen=True)
class RunState:
    """The contents of a state file: results, the settings that they depend on, and the progress, as JSON values."""

    tensors: dict[str, torch.Tensor]
    settings: Mapping[str, Any]
    counts: Mapping[str, Any] = field(default_factory=dict)
    is_finished: bool = False


def write_state(path: Path, kind: str, state: RunState, what: str) -> None:
    """Write the file, completely or not at all; raises ProfilingError, which describes the contents with `what`.

    `kind` is the name and version of the format, such as "ssd-cache profile 2".
    """
    header = {
        "format": kind,
        "settings": json.dumps(state.settings),
        "counts": json.dumps(state.counts),
        "is_finished": json.dumps(state.is_finished),
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    try:
        write_files({path: safetensors.torch.save(tensors, metadata=header)})
    except OSError as error:
        raise ProfilingError(
            f"{path}: {what} cannot be written ({error.strerror}); make room, or give another file"
        ) from error


def read_state(path: Path, kind: str, what: str) -> RunState:
    """Read a file that `write_state` wrote with the same `kind`; raises ProfilingError for other contents."""
    try:
        header, tensors = read_tensors(path)
        if header.get("format") != kind:
            raise ValueError("it is of another kind or version")
        settings, counts = (checked(dict, parse_json(header.get(name, "")), name) for name in ("settings", "counts"))
        finished = parse_json(header.get("is_finished", ""))
    except (OSError, ValueError) as error:
        raise not_a_state(path, what, error) from error
    return RunState(tensors, settings, counts, finished is True)


def check_images(tensors: dict[str, torch.Tensor], cells: int) -> list[torch.Tensor]:
    """Remove and return the tensors `images.0`, `images.1`, ... of a state: visual tokens, int64 `[images, cells]`.

    Raises:
        ValueError: a tensor has another shape or dtype, is empty, or holds negative numbers.
    """
    images: list[torch.Tensor] = []
    while (tokens := tensors.pop(f"images.{len(images)}", None)) is not None:
        rows = tokens.shape[0] if tokens.ndim else 0
        check_like({"images": tokens}, {"images": torch.empty(rows, cells, dtype=torch.int64)})
        if not rows or tokens.min() < 0:
            raise ValueError(f"images.{len(images)} holds no visual tokens")
        images.append(tokens)
    return images


def not_a_state(path: Path, what: str, reason: object) -> NotAStateError:
    """The error for a file with unexpected contents."""
    return NotAStateError(f"{path}: not {what} ({reason}); {REMEDY}")


def check_same_run(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings; raises OtherRunError, which lists every setting that differs."""
    if differing := differences(found, settings):
        raise OtherRunError(f"{path}: the sums of another run ({differing}); {REMEDY}")


def check_state_place(path: Path) -> None:
    """Refuse a state file that cannot be written, before the run starts; raises ProfilingError."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ProfilingError(
            f"{path}: the state of this run cannot be written ({error.strerror}); give another file"
        ) from error


def is_finished(path: Path) -> bool:
    """Whether a file is the state of a finished run of any kind."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("is_finished") == "true"
    except (OSError, SafetensorError):
        return False


class ResumableState:
    """Tensors of results and of progress, none of them below 0, that a run fills in place and saves after every part.

    Args:
        state_file: when it exists, its values are copied into `tensors`; None saves nothing.
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
