"""Result lines: one JSON object per image in `results-<process>.jsonl`, and the code that reads these files.

A line identifies its image and holds the judge's verdict. An incomplete last line was being written when a run was
killed, and is ignored. Any other unreadable line is reported. `results_folder.py` writes the lines.
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
"""Policy, budget, seed and prompt: the identity of an image in a results folder."""


@dataclass(frozen=True)
class Record:
    """One judged image.

    Attributes:
        policy: the policy's label, including its own settings.
        settings: all settings of its cache, including those of the whole run.
        budget: as the user gave it: a fraction of the grid, or a number of visual tokens.
        num_slots: maximum number of visual tokens that a head held, averaged over the heads.
        head_map: digest of the labels used; "online" where they are found during generation.
        seed: seed of the sample; torch's seed is derived from it and the batch number.
        prompt: index of the prompt.
        kind: one of `KINDS`.
        caption: the text of the prompt.
        correct: the judge's verdict.
        reason: why the image is not correct, else empty.
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
        """The record as one line, including the line end."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Problem:
    """A line that cannot be used, with its location and the reason."""

    path: Path
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}: {self.reason}"


def parse_record(line: str | bytes) -> Record:
    """Parse a line; raises ValueError with the reason."""
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
    """All records of some folders, each image once, in the order of the files; and the lines that cannot be read.

    Raises:
        OSError: a file cannot be opened.
    """
    records: dict[Key, Record] = {}
    problems = []
    for path in (path for folder in folders for path in sorted(folder.glob(PATTERN))):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # text after the last line end is an unfinished line
            try:
                record = parse_record(line)
                first = records.setdefault(record.key, record)
                if first != record:
                    raise ValueError("it contradicts an earlier line about the same picture")
            except ValueError as error:  # includes UnicodeDecodeError
                problems.append(Problem(path, number, str(error)))
    return list(records.values()), problems
