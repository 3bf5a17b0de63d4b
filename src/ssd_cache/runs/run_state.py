"""The state file of a long run: the results that are finished so far, and the settings that they depend on.

A safetensors file with JSON in its header, replaced in one step, so that a process killed at any moment leaves the last
whole state. What the tensors mean, and whether their shapes are right, is for the callers.
"""

from __future__ import annotations

import json
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
    """A profiling run that can not begin, go on, or be trusted: what was found, and the remedy."""


class OtherRunError(ProfilingError, WrongFileError):
    """A state file of a run with other settings."""


class NotAStateError(ProfilingError, WrongFileError):
    """A file with other contents than a state of this kind of run."""


@dataclass(frozen=True)
class RunState:
    """The contents of a state file.

    Attributes:
        tensors: the results.
        settings: everything that the results depend on, as JSON.
        counts: how far the run has come, as JSON.
        is_finished: whether the run has nothing left to do.
    """

    tensors: dict[str, torch.Tensor]
    settings: Mapping[str, Any]
    counts: Mapping[str, Any] = field(default_factory=dict)
    is_finished: bool = False


def write_state(path: Path, kind: str, state: RunState, what: str) -> None:
    """Write the file, whole or not at all.

    Args:
        path: the file; its folder is made when missing.
        kind: name and version of the format, "ssd-cache profile 2".
        state: the contents.
        what: the contents in words, for the error.

    Raises:
        ProfilingError: the file cannot be written; an older file is left as it was.
    """
    header = {
        "format": kind,
        "settings": json.dumps(state.settings),
        "counts": json.dumps(state.counts),
        "is_finished": json.dumps(state.is_finished),
    }
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: safetensors.torch.save(tensors, metadata=header)})
    except OSError as error:
        raise ProfilingError(
            f"{path}: {what} can not be written ({error.strerror}); make room, or give another file"
        ) from error


def read_state(path: Path, kind: str, what: str) -> RunState:
    """Read a file that `write_state` wrote with the same `kind`.

    Raises:
        ProfilingError: anything else; `what` names the expected contents.
    """
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
    """Take the tensors `images.0`, `images.1`, ... out of a state: visual tokens, int64 `[images, cells]` each.

    Raises:
        ValueError: one has another shape or dtype, or holds negative numbers.
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
    """The error for a file with other contents than expected."""
    return NotAStateError(f"{path}: not {what} ({reason}); {REMEDY}")


def check_same_run(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings; raises OtherRunError, which names every setting that differs."""
    if differing := differences(found, settings):
        raise OtherRunError(f"{path}: the sums of another run ({differing}); {REMEDY}")


def check_state_place(path: Path) -> None:
    """Refuse, before a run starts, a state file that could not be written; raises ProfilingError."""
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
    """Whether a file is the state of a run, of any kind, that has nothing left to do."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("is_finished") == "true"
    except (OSError, SafetensorError):
        return False
