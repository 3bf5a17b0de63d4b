"""Results as lines: one JSON object a picture, in `results-<process>.jsonl`, and how such files are read back.

A line says which picture it is of and what the judge said. A last line without its end is what a killed run was
writing, and counts for nothing; any other line that can not be read is named. Who writes them is `results_folder.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssd_cache.budget import Amount
from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import checked, parse_json
from ssd_cache.shapes import KINDS

PATTERN = "results-*.jsonl"

Key = tuple[str, Amount, int, int]
"""Policy, budget, seed, prompt: what names a picture in a folder of results."""


@dataclass(frozen=True)
class Record:
    """One judged picture.

    Attributes:
        policy: the policy's label, its own settings included.
        settings: all settings that its cache was made with, those of the whole run among them.
        budget: as the user gave it: a fraction of the grid, or visual tokens.
        num_slots: visual tokens that a head held at most, on average over the heads.
        head_map: digest of the labels in force; "online" where they are found while drawing.
        seed: of the sample; with the batch's number it gives torch's seed.
        prompt: index of the prompt.
        kind: one of `KINDS`.
        caption: what was to be drawn.
        correct: the judge's verdict.
        reason: why it is not correct, else empty.
    """

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
        """The record as a line, its end included."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Problem:
    """A line that can not be used: where it stands, and why."""

    path: Path
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}: {self.reason}"


def parse_record(line: str | bytes) -> Record:
    """The record of a line; raises ValueError with the reason."""
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise ReadableError(f"not JSON ({error})") from error
    record = checked(Record, entry)
    if record.kind not in KINDS:
        raise ReadableError(f"kind={shown(record.kind)}; the kinds are {', '.join(KINDS)}")
    for name in ("seed", "prompt", "budget", "num_slots"):
        if getattr(record, name) < 0:
            raise ReadableError(f"{name}={getattr(record, name)} is below 0")
    return record


def read_records(folders: Iterable[Path]) -> tuple[list[Record], list[Problem]]:
    """All records of some folders, each picture once, in the order of the files; and what could not be read.

    Raises:
        OSError: a file can not be opened.
    """
    records: dict[Key, Record] = {}
    problems = []
    for path in (path for folder in folders for path in sorted(folder.glob(PATTERN))):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # what comes after the last line's end was never finished
            try:
                record = parse_record(line)
                first = records.setdefault(record.key, record)
                if first != record:
                    raise ValueError("it contradicts an earlier line about the same picture")
            except ValueError as error:  # UnicodeDecodeError among them
                problems.append(Problem(path, number, str(error)))
    return list(records.values()), problems
