"""JSON lines with the results of a judge, each appended as soon as it is known, so that a run can be resumed.

GenEval and DPG-Bench define the rows. Of two rows about one image or prompt, the later one counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssd_cache.io.showing import ReadableError, differences
from ssd_cache.io.untrusted import WrongFileError, checked, parse_json
from ssd_cache.io.writing import write_files


def read_rows(path: Path | None, check: Callable[[int, dict[str, Any]], Any]) -> list[Any]:
    """The rows of an earlier run, as `check(number, row)` returns them; removes an incomplete last line from the file.

    Raises:
        WrongFileError: a line is not a JSON object, or `check` refuses it with a ValueError.
        OSError: the file cannot be read or written.
    """
    if path is None or not path.exists():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(complete.split(b"\n")[:-1], 1):
        try:
            rows.append(check(number, checked(dict, parse_json(line))))
        except ValueError as error:
            remedy = "give another place for the results, or delete the file to begin anew"
            raise WrongFileError(f"{path}, line {number}: {error}; {remedy}") from error
    if complete != content:
        write_files({path: complete})
    return rows


def check_settings(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a row of a run with other settings; raises ValueError."""
    if found != expected:
        raise ReadableError(f"a result of another run ({differences(found, expected)})")


def append_row(path: Path | None, row: Mapping[str, Any]) -> None:
    """Append a row; without a path nothing is stored."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
