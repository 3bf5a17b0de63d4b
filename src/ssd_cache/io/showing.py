"""Foreign values in messages: short, on one line, and safe to print on any terminal.

A value is foreign when it comes from a file, from the Hub or from an argument: it may be huge, hold control sequences,
or hold characters that no encoding knows. It says nothing about whether a value is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_VALUE, MAX_MESSAGE = 80, 2000
"""Characters of a value in a message, and of a whole message."""


def shown(value: object, limit: int = MAX_VALUE) -> str:
    """The value as Python writes it, in at most `limit` printable characters; the middle is left out.

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
    """The text in at most `limit` characters, the middle left out and unprintable characters escaped; lines stay."""
    if len(text) > limit:
        text = f"{text[: limit // 2 - 3]} ... {text[len(text) - (limit - limit // 2 - 2) :]}"
    if text.isascii() and text.isprintable():
        return text
    escaped = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in text
    )
    return escaped if len(escaped) <= limit or escaped == text else printable(escaped, limit)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__), 4 * MAX_VALUE)


def differences(first: Mapping[str, Any], second: Mapping[str, Any], words: tuple[str, str] = ("there", "now")) -> str:
    """The entries in which two mappings differ, each with both values; "" where they are the same."""
    return "; ".join(
        f"{printable(str(name), MAX_VALUE)} {shown(first.get(name))} {words[0]}, {shown(second.get(name))} {words[1]}"
        for name in dict.fromkeys([*second, *first])
        if first.get(name) != second.get(name)
    )


class ReadableError(ValueError):
    """An error for the library's users whose message may hold foreign values: it is bounded and safe to print."""

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))
