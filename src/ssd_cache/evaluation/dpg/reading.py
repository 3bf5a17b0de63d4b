"""Text and JSON lines of DPG-Bench's files, each row with the words that say where it stands.

What the rows mean is the business of `prompts` and `questions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import parse_json


class DPGError(ReadableError):
    """A file, a picture or a setting that DPG-Bench cannot be run with; says where, and what would help."""


def read_text(path: Path) -> str:
    """A file's text, a byte-order mark taken off.

    Raises:
        DPGError: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DPGError(f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8") from error


def json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Objects of a JSON list or of JSON lines, whichever the text is, each after the words that say where it stands.

    Raises:
        DPGError: a line is not JSON, or a row is not an object.
    """
    text = read_text(path)
    for where, row in _list_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text):
        if not isinstance(row, Mapping):
            raise DPGError(f"{where}: {shown(row)} is no JSON object; give one object a row, as {{'item_id': ...}}")
        yield where, row


def field(row: Mapping[str, Any], name: str, where: str) -> Any:
    """A row's value under a name.

    Raises:
        DPGError: the row has no such name.
    """
    if name not in row:
        raise DPGError(f"{where}: no {name!r}, only {named(list(row)) or 'nothing'}; add it")
    return row[name]


def as_text(value: object, name: str, where: str) -> str:
    """A text that is not empty, stripped.

    Raises:
        DPGError: it is no text, or nothing but blanks.
    """
    if not isinstance(value, str):
        raise DPGError(f"{where}: {name} is {shown(value)}; give a text")
    if not value.strip():
        raise DPGError(f"{where}: {name} is empty; fill it in, or take the row out")
    return value.strip()


def as_id(value: object, name: str, where: str) -> str:
    """An id as text; whole numbers, as JSON may hold them, are taken as well.

    Raises:
        DPGError: it is neither, or empty.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return as_text(value, name, where)


def named(items: list[str]) -> str:
    """The first ten of some names and how many more there are, for an error."""
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
