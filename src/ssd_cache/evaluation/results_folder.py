"""A results folder: `run.json` with the conditions, and one file of result lines for each process.

Lines are appended and synced to disk after every batch. A run that is killed leaves complete lines and at most one
incomplete line, which is ignored. A folder with other conditions is refused, and the error lists the fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ssd_cache.budget import Amount
from ssd_cache.evaluation.exact import BENCHMARKS, ExactBenchmark
from ssd_cache.io.showing import ReadableError, differences, shown
from ssd_cache.io.untrusted import checked, checked_fields, parse_json, read_bytes
from ssd_cache.io.writing import write_files
from ssd_cache.layout import ImageLayout

RUN_FILE, PATTERN = "run.json", "results-*.jsonl"
FORMAT = "ssd-cache eval {} 1"
"""Format of `run.json`, with the name of the benchmark."""

WRITERS = " or ".join(f"`ssd-cache eval {name}`" for name in BENCHMARKS)
"""The commands that write such folders."""

RUN = {"format": str, "conditions": dict, "policies": dict[str, dict], "command": dict}
CONDITIONS: dict[str, Any] = {
    **dict.fromkeys(("bench", "dtype", "device"), str),
    **dict.fromkeys(("num_per_kind", "prompt_seed", "batch_size"), int),
    **{"grid": list, "settings": dict, "guidance_scale": float, "temperature": float},
}
POLICY = {"settings": dict, "slots": dict, "head_map": str}
COMMAND = {"model": str, "head_map": str | None}
"""Required fields of `run.json` and its parts; the parts may have others."""

Key = tuple[str, Amount, int, int]
"""Policy, budget, seed and prompt: the identity of an image in a results folder."""


class ResultsError(ReadableError):
    """A results folder that cannot be used or written."""


@dataclass(frozen=True)
class Record:
    """One judged image, a line of results; docs/evaluation.md describes the fields."""

    policy: str
    settings: dict[str, Any]
    budget: Amount
    num_slots: float
    head_map: str
    seed: int
    prompt: int
    kind: str
    caption: str
    correct: bool
    reason: str

    @property
    def key(self) -> Key:
        return self.policy, self.budget, self.seed, self.prompt

    def line(self) -> str:
        """The record as one line, including the line end."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_records(folders: Iterable[Path], benchmark: ExactBenchmark) -> tuple[list[Record], list[str]]:
    """All records of a benchmark in some folders, each image once, and a message for each line that cannot be read."""
    records: dict[Key, Record] = {}
    problems = []
    for path in (path for folder in folders for path in sorted(folder.glob(PATTERN))):
        lines = read_bytes(path).split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # text after the last line end is an unfinished line
            try:
                record = checked(Record, parse_json(line))
                if record.kind not in benchmark.kinds:
                    raise ReadableError(f"kind={shown(record.kind)}; the kinds are {', '.join(benchmark.kinds)}")
                records.setdefault(record.key, record)
            except ValueError as error:
                problems.append(f"{path}, line {number}: {error}")
    return list(records.values()), problems


def read_run(folder: Path) -> dict[str, Any]:
    """The content of `run.json`: "conditions", "policies" and "command"; raises ResultsError."""
    path = folder / RUN_FILE
    try:
        run = checked_fields(RUN, parse_json(read_bytes(path)))
        conditions = checked_fields(CONDITIONS, run["conditions"], "conditions")
        if conditions["bench"] not in BENCHMARKS or run["format"] != FORMAT.format(conditions["bench"]):
            raise ReadableError(f"its format is {shown(run['format'])}")
        ImageLayout(conditions["grid"])
        for label, entry in run["policies"].items():
            checked_fields(POLICY, entry, f"policies[{shown(label, 40)}]")
        checked_fields(COMMAND, run["command"], "command")
    except FileNotFoundError as error:
        raise ResultsError(f"{folder} has no {RUN_FILE}: give a folder that {WRITERS} wrote") from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: not a {RUN_FILE} of {WRITERS} ({error})") from error
    return run


def benchmark_of(run: Mapping[str, Any]) -> ExactBenchmark:
    """The benchmark of a run that `read_run` has checked."""
    return BENCHMARKS[run["conditions"]["bench"]]


def merge_runs(place: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first run with the policies and budgets of the second added; raises ResultsError where the two differ."""
    _check_same(place, first["conditions"], second["conditions"])
    policies = dict(first["policies"])
    for label, entry in second["policies"].items():
        known = policies.get(label, entry)
        slots = {**known["slots"], **entry["slots"]}
        _check_same(f"{place}, policy {label}", {**known, "slots": slots | known["slots"]}, {**entry, "slots": slots})
        policies[label] = {**entry, "slots": slots}
    return {**first, "policies": policies}


def _check_same(place: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if differing := differences(found, wanted):
        raise ResultsError(f"{place}: results of other conditions ({differing}): give another folder")


class ResultsFolder:
    """A results folder as one process writes it; a context manager that keeps other runs out.

    `done` has the images that already have a line, from any process. Process 0 writes `run.json`.

    Raises:
        ResultsError: other conditions, a damaged line, or a folder that another run uses or that cannot be written.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], process: int = 0):
        self.path = folder / f"results-{process}.jsonl"
        if (folder / RUN_FILE).exists() or any(folder.glob(PATTERN)):
            run = merge_runs(str(folder), read_run(folder), run)
        benchmark = benchmark_of(run)
        if problems := read_records([folder], benchmark)[1]:
            raise ResultsError(f"{problems[0]}; delete this line, and start again to generate what is missing")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
            if process == 0:
                text = json.dumps({"format": FORMAT.format(benchmark.name), **run}, indent=1, ensure_ascii=False) + "\n"
                write_files({folder / RUN_FILE: text.encode()})
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)  # drops an incomplete last line
        except OSError as error:
            raise ResultsError(f"{folder} cannot be written ({error.strerror}); make room, or give another") from error
        # after another run can no longer write
        self.done = {record.key for record in read_records([folder], benchmark)[0]}

    def __enter__(self) -> ResultsFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def append(self, records: Iterable[Record]) -> None:
        """Write the records that have no line yet, and wait until they are on the disk; raises ResultsError."""
        new = [record for record in records if record.key not in self.done]
        try:
            with self.path.open("ab") as file:
                file.write("".join(record.line() for record in new).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResultsError(
                f"{self.path} cannot be written ({error.strerror}); the lines before are kept: make room, and run the "
                "same command again to resume"
            ) from error
        self.done.update(record.key for record in new)

    def close(self) -> None:
        """Let other runs write."""
        self._lock.close()


def _locked(path: Path) -> IO[bytes]:
    """Open a file that a second run cannot open in this way; without file locks there is no such check."""
    file = path.open("ab")
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ResultsError(f"{path}: another run is writing here; wait for its end, or give another folder") from error
    except (ImportError, OSError):  # or a network file system without locks
        pass
    return file
