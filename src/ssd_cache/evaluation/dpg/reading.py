"""Reads text and JSON rows from DPG-Bench files, each row with its location for error messages.

`prompts.py` and `questions.py` interpret the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import parse_json


class DPGError(ReadableError):
    """A file, image or setting is unusable for DPG-Bench. The message gives the location and the remedy."""


def read_text(path: Path) -> str:
    """Read a text file, without its byte-order mark.

    Raises:
        DPGError: the file is not UTF-8.
        OSError: the file cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DPGError(f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8") from error


def json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (location, object) for each row of a JSON list or of JSON lines; the format is detected.

    Raises:
        DPGError: a line is not JSON, or a row is not an object.
    """
    text = read_text(path)
    for where, row in _list_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text):
        if not isinstance(row, Mapping):
            raise DPGError(f"{where}: {shown(row)} is no JSON object; give one object a row, as {{'item_id': ...}}")
        yield where, row


def field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a field of a row.

    Raises:
        DPGError: the row has no field of that name.
    """
    if name not in row:
        raise DPGError(f"{where}: no {name!r}, only {named(list(row)) or 'nothing'}; add it")
    return row[name]


def as_text(value: object, name: str, where: str) -> str:
    """Check that a value is a text that is not blank, and return it stripped.

    Raises:
        DPGError: the value is not a text, or is blank.
    """
    if not isinstance(value, str):
        raise DPGError(f"{where}: {name} is {shown(value)}; give a text")
    if not value.strip():
        raise DPGError(f"{where}: {name} is empty; fill it in, or take the row out")
    return value.strip()


def as_id(value: object, name: str, where: str) -> str:
    """Return an id as text. Integers are accepted too, because JSON files may contain them.

    Raises:
        DPGError: the value is neither a text nor an integer, or is blank.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return as_text(value, name, where)


def named(items: list[str]) -> str:
    """List the first ten names and the number of the others, for an error message."""
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(map(shown, items[:10])) + more


def _line_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028 in a prompt
        if line.strip():
            yield f"{path}, line {number}", _parse(f"{path}, line {number}", line)


def _list_rows(path: Path, text: str) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(_parse(str(path), text), start=1):
        yield f"{path}, row {number}", row


def _parse(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DPGError(f"{where} is not JSON ({error}): mend it, or take it out") from error
