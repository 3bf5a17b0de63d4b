"""Result lines: one JSON object per image in `results-<process>.jsonl`, and the code that reads these files.

An incomplete last line was being written when a run was killed, and is ignored. Any other unreadable line is reported.
`results_folder.py` writes the lines.
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
    """One judged image; docs/evaluation.md describes the fields."""

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

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ReadableError(f"kind={shown(self.kind)}; the kinds are {', '.join(KINDS)}")

    @property
    def key(self) -> Key:
        return self.policy, self.budget, self.seed, self.prompt

    def line(self) -> str:
        """The record as one line, including the line end."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_records(folders: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """All records of some folders, each image once, and a message for each line that cannot be read."""
    records: dict[Key, Record] = {}
    problems = []
    for path in (path for folder in folders for path in sorted(folder.glob(PATTERN))):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # text after the last line end is an unfinished line
            try:
                record = checked(Record, parse_json(line))
                if records.setdefault(record.key, record) != record:
                    raise ReadableError("it contradicts an earlier line about the same image")
            except ValueError as error:
                problems.append(f"{path}, line {number}: {error}")
    return list(records.values()), problems
