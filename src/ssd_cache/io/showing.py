"""Formats untrusted values for messages: short, on one line, and safe to print on any terminal.

A value is untrusted if it comes from a file, from the Hub or from an argument. It may be huge, or hold control
sequences or characters that cannot be encoded. This module does not check whether a value is valid.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

MAX_VALUE, MAX_MESSAGE = 80, 2000
"""Maximum number of characters of a value in a message, and of a whole message."""


def shown(value: object, limit: int = MAX_VALUE) -> str:
    """The `repr` of the value in at most `limit` printable characters; if it is longer, the middle is left out.

    Example:
        >>> shown("a\\nb")
        "'a\\\\nb'"
        >>> shown("x" * 1000, limit=20)
        "'xxxxxx ... xxxxxxx'"
    """
    part = value[: 2 * limit] + value[-2 * limit :] if isinstance(value, str) and len(value) > 4 * limit else value
    try:
        text = repr(part)
    except (ValueError, RecursionError):  # an int of thousands of digits, lists nested thousands deep
        text = f"a {type(value).__name__} too large to show"
    return printable(text, limit)


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """The text in at most `limit` characters: the middle is cut, unprintable characters escaped, line breaks kept."""
    if len(text) > limit:
        text = f"{text[: limit // 2 - 3]} ... {text[len(text) - (limit - limit // 2 - 2) :]}"
    if text.isascii() and text.isprintable():
        return text
    escaped = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )
    return escaped if len(escaped) <= limit or escaped == text else printable(escaped, limit)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if there is no message."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__), 4 * MAX_VALUE)


def differences(first: Mapping[str, Any], second: Mapping[str, Any], words: tuple[str, str] = ("there", "now")) -> str:
    """The entries in which two mappings differ, each with both values; "" if the mappings are equal."""
    return "; ".join(
        f"{printable(str(name), MAX_VALUE)} {shown(first.get(name))} {words[0]}, {shown(second.get(name))} {words[1]}"
        for name in dict.fromkeys([*second, *first])
        if first.get(name) != second.get(name)
    )


def first_names(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name, MAX_VALUE) for name in names[:most]) + more


def suggestion(name: str, known: Sequence[str]) -> str:
    """ " (did you mean 'x'?)" with the closest known name, with or without its first part, or "" if none is close."""
    spellings = {spelling.casefold(): one for one in reversed(known) for spelling in (one.rpartition("/")[2], one)}
    wanted = name.rstrip("/").casefold() if len(name) <= 2 * MAX_VALUE else ""
    for spelling in (wanted, wanted.rpartition("/")[2]):
        if found := difflib.get_close_matches(spelling, spellings, n=1, cutoff=0.75):
            return f" (did you mean {spellings[found[0]]!r}?)"
    return ""


class ReadableError(ValueError):
    """An error whose message may hold untrusted values: its length is limited, and it is safe to print."""

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))
