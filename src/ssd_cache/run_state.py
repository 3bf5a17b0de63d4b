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

from ssd_cache.statistics import ProfilingError
from ssd_cache.writing import write_files

REMEDY = "give another file, or delete it to begin anew"


class OtherRunError(ProfilingError):
    """A state file of a run with other settings."""


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
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != kind:
                raise ValueError("it is of another kind or version")
            settings, counts = json.loads(header["settings"]), json.loads(header["counts"])
            is_finished = json.loads(header["is_finished"])
            if not isinstance(settings, dict) or not isinstance(counts, dict):
                raise ValueError("its settings are no JSON object")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, since it is no dict
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise not_a_state(path, what, error) from error
    return RunState(tensors, settings, counts, is_finished is True)


def not_a_state(path: Path, what: str, reason: object) -> ProfilingError:
    """The error for a file with other contents than expected."""
    return ProfilingError(f"{path}: not {what} ({reason}); {REMEDY}")


def check_same_run(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings; raises OtherRunError, which names every setting that differs."""
    differing = [
        f"{name} {found.get(name)!r} there, {settings.get(name)!r} now"
        for name in sorted(settings.keys() | found.keys())
        if found.get(name) != settings.get(name)
    ]
    if differing:
        raise OtherRunError(f"{path}: the sums of another run ({'; '.join(differing)}); {REMEDY}")


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
