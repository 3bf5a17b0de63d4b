"""Suggests the closest name for a misspelt one: from known names, nearby folders, or repositories in the Hub's cache.

A suggestion is appended to an error message. This module makes no network requests and corrects no names.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from huggingface_hub import constants

from ssd_cache.io.showing import printable

CLOSE = 0.75
"""Minimum similarity of two names, as measured by difflib."""

MAX_NAME, MAX_ENTRIES = 200, 1000
"""Maximum length of a name that is compared, and maximum number of folder entries that are read."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the closest known name, or "" if none is close."""
    if not isinstance(name, str) or len(name) > MAX_NAME:
        return ""
    spellings: dict[str, str] = {}
    for one in known:
        for spelling in (one, one.rpartition("/")[2]):
            spellings.setdefault(spelling.casefold(), one)
    wanted = name.rstrip("/").casefold()
    for spelling in (wanted, wanted.rpartition("/")[2]):
        if found := difflib.get_close_matches(spelling, spellings, n=1, cutoff=CLOSE):
            return f" (did you mean {printable(spellings[found[0]], MAX_NAME)!r}?)"
    return ""


def nearby_folders(name: str, file: str = "config.json") -> list[str]:
    """Folders next to the folder `name` that contain `file`, with the same prefix as in `name`."""
    try:
        above = Path(name).expanduser().parent
        prefix = name.rstrip("/").rpartition("/")[0] + "/" if "/" in name.rstrip("/") else ""
        with os.scandir(above) as entries:
            return [f"{prefix}{entry.name}" for entry in islice(entries, MAX_ENTRIES) if _holds(entry, file)]
    except (OSError, ValueError, RuntimeError):  # no such folder, NUL in the name, no such user
        return []


def cached_repositories() -> list[str]:
    """Model repositories in the Hub's cache."""
    try:
        names = os.listdir(constants.HF_HUB_CACHE)
    except OSError:
        return []
    return [name.removeprefix("models--").replace("--", "/") for name in names if name.startswith("models--")]


def _holds(entry: os.DirEntry[str], file: str) -> bool:
    return entry.is_dir() and os.path.exists(os.path.join(entry.path, file))
