"""JSON lines of a DPG-Bench run: first its settings, then one row per prompt, appended as they are computed.

Rows of an earlier run with the same settings are kept and used. `score.py` defines the content of the rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssd_cache.evaluation.dpg.reading import DPGError, read_text
from ssd_cache.io.showing import differences
from ssd_cache.io.untrusted import WrongFileError, checked, checked_fields, parse_json
from ssd_cache.io.writing import write_files

Answers = list[list[bool]]
"""Raw answers about one sheet, `[crops][questions]`."""


class _DPGFileError(DPGError, WrongFileError):
    """A run cannot resume from this result file."""


class ResultFile:
    """The rows of a run. Without a path, nothing is stored.

    Opening an existing file removes a line that a crash cut short, and the rows of unreadable images, which are then
    tried again. If an item has two rows, the later one counts.

    Raises:
        DPGError: the file is not a result file, or belongs to a run with other settings.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is not None:
            if self.path.exists():
                self.rows = _read_rows(self.path, settings)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_files({self.path: "".join(map(_as_line, [settings, *self.rows.values()])).encode()})

    def kept_answers(self, item_id: str, key: str, shape: tuple[int, int]) -> Answers | None:
        """Answers of an earlier run, or None if the key or the `shape` (crops, questions) of its row differs."""
        row = self.rows.get(item_id)
        if row is None or row.get("key") != key:
            return None
        crops, num_questions = shape
        if len(row["answers"]) != crops or any(len(crop) != num_questions for crop in row["answers"]):
            return None
        return [[bool(answer) for answer in crop] for crop in row["answers"]]

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, unless the file already has it."""
        if self.path is not None and self.rows.get(row["item_id"]) != row:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_as_line(row))


def _as_line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read_rows(path: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    lines = read_text(path).split("\n")[:-1]  # text after the last newline is empty or an incomplete line
    try:
        first, *rows = (checked(dict, parse_json(line)) for line in lines)
        answered = {}
        for row in rows:
            checked_fields({"item_id": str}, row)
            if "answers" in row:
                answered[row["item_id"]] = checked_fields({"answers": list[list[int | bool]], "key": str}, row)
    except ValueError as error:
        raise _DPGFileError(f"{path} is no file of results ({error}): take it away, or give another place") from error
    if first != settings:
        raise _DPGFileError(
            f"{path} holds results of another run ({differences(first, settings)}): take it away, or give another place"
        )
    return answered
