"""Writes a results folder: `run.json` with the conditions, and one file of result lines per process.

Lines are appended and synced to disk after every batch. A run that is killed leaves complete lines and at most one
incomplete one. A folder with other conditions is refused, and the error lists the fields. `records.py` defines a line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ssd_cache.evaluation.records import PATTERN, Key, Record, read_records
from ssd_cache.io.showing import ReadableError, differences, shown
from ssd_cache.io.untrusted import checked_fields, parse_json
from ssd_cache.io.writing import write_files
from ssd_cache.layout import ImageLayout

RUN_FILE = "run.json"
FORMAT = "ssd-cache eval shapes 1"

RUN = {"format": str, "conditions": dict, "policies": dict, "command": dict}
CONDITIONS = {
    **dict.fromkeys(("num_per_kind", "prompt_seed", "batch_size"), int),
    **dict.fromkeys(("guidance_scale", "temperature"), float),
    **dict.fromkeys(("dtype", "device"), str),
    **{"grid": list, "settings": dict},
}
POLICY = {"settings": dict, "slots": dict, "head_map": str}
COMMAND = {"model": str, "head_map": str | None}
"""Required fields of `run.json` and its parts; the parts may have others."""


class ResultsError(ReadableError):
    """A results folder that cannot be used or written."""


def read_run(folder: Path) -> dict[str, Any]:
    """The content of `run.json`: "conditions", "policies" and "command".

    Raises:
        ResultsError: it is missing, or has another format.
    """
    path = folder / RUN_FILE
    try:
        run = checked_fields(RUN, parse_json(path.read_bytes()))
        if run["format"] != FORMAT:
            raise ValueError(f"its format is {shown(run['format'])}")
        for label, entry in run["policies"].items():
            checked_fields(POLICY, entry, f"policies[{shown(label, 40)}]")
    except FileNotFoundError as error:
        raise ResultsError(f"{folder} has no {RUN_FILE}: give a folder that `ssd-cache eval shapes` wrote") from error
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{path} can not be read ({error}): it should be as `ssd-cache eval shapes` wrote it"
        ) from error
    return run


def recorded_batch_size(folder: Path) -> int | None:
    """The batch size of the results in a folder; None for a folder without results.

    Raises:
        ResultsError: `run.json` cannot be read.
    """
    if not (folder / RUN_FILE).exists():
        return None
    found = read_run(folder)["conditions"].get("batch_size")
    return found if type(found) is int and found > 0 else None


def read_reported_run(folder: Path) -> dict[str, Any]:
    """Like `read_run`, but also checks the fields that a report needs.

    Raises:
        ResultsError: as `read_run`, or a field is missing or has another type.
    """
    run = read_run(folder)
    try:
        ImageLayout(checked_fields(CONDITIONS, run["conditions"], "conditions")["grid"])
        checked_fields(COMMAND, run["command"], "command")
    except ValueError as error:
        raise ResultsError(
            f"{folder / RUN_FILE} can not be read ({error}): it should be as `ssd-cache eval shapes` wrote it"
        ) from error
    return run


def check_same(place: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse conditions that differ; raises ResultsError with every such field and both values."""
    if differing := differences(found, wanted):
        raise ResultsError(
            f"{place}: results of other conditions ({differing}), not to be compared: give another folder"
        )


def merge_runs(place: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first run with the policies and budgets of the second added.

    Raises:
        ResultsError: the conditions differ, or a policy of the same name has different caches.
    """
    check_same(place, first["conditions"], second["conditions"])
    policies = {label: {**entry, "slots": dict(entry["slots"])} for label, entry in first["policies"].items()}
    for label, entry in second["policies"].items():
        known = policies.setdefault(label, {**entry, "slots": {}})
        shared = known["slots"].keys() & entry["slots"].keys()
        check_same(
            f"{place}, policy {label}",
            {**known, "slots": {budget: known["slots"][budget] for budget in shared}},
            {**entry, "slots": {budget: entry["slots"][budget] for budget in shared}},
        )
        known["slots"].update(entry["slots"])
    return {**first, "policies": policies}


class ResultsFolder:
    """A results folder as one process writes it; a context manager that closes the file.

    Args:
        folder: made when missing.
        run: conditions, policies and command of this run.
        process: this process's number, from 0; process 0 writes `run.json`.

    Attributes:
        done: images that already have a line, from any process.

    Raises:
        ResultsError: results of other conditions, a damaged line, or another run that is writing to this folder.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], process: int = 0):
        self.folder = folder
        self.path = folder / f"results-{process}.jsonl"
        self._file: IO[bytes] | None = None
        merged = check_folder(folder, run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            _lock(self._file, self.path)
            if process == 0:
                text = json.dumps({"format": FORMAT, **merged}, indent=1, ensure_ascii=False) + "\n"
                write_files({folder / RUN_FILE: text.encode()})
            self._drop_half_line()
        except OSError as error:
            self.close()
            raise ResultsError(f"{folder} can not be written ({error.strerror}); make room, or give another") from error
        except BaseException:
            self.close()
            raise
        self.done: set[Key] = {record.key for record in read_records([folder])[0]}

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def append(self, records: Iterable[Record]) -> None:
        """Write the records that have no line yet, and wait until they are on the disk.

        Raises:
            ResultsError: they cannot be written; the file is restored.
        """
        new = [record for record in records if record.key not in self.done]
        assert self._file is not None
        size = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write("".join(record.line() for record in new).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self.close()
            with suppress(OSError):
                os.truncate(self.path, size)
            raise ResultsError(
                f"{self.path} can not be written ({error.strerror}); the lines before are kept: make room, and run the "
                "same command again to go on"
            ) from error
        self.done.update(record.key for record in new)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # `append` has already reported a failed write
                file.close()

    def _drop_half_line(self) -> None:
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def check_folder(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `run.json` if this run continues in the folder; writes nothing.

    Raises:
        ResultsError: as `ResultsFolder`.
    """
    if not (folder / RUN_FILE).exists():
        if folder.is_dir() and any(folder.glob(PATTERN)):
            raise ResultsError(f"{folder} has results and no {RUN_FILE}, so their conditions are unknown: give another")
        return dict(run)
    merged = merge_runs(str(folder), read_run(folder), run)
    _, problems = read_records([folder])
    if problems:
        raise ResultsError(f"{problems[0]}; delete this line, and start again to draw what is missing")
    return merged


def _lock(file: IO[bytes], path: Path) -> None:
    """Refuse a second run, which would generate everything twice; without file locks there is no such check."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResultsError(f"{path}: another run is writing here; wait for its end, or give another folder") from error
    except OSError:  # a network file system without locks
        return
