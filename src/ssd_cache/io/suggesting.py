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

MAX_NAME, MAX_ENTRIES = 200, 1000
"""Maximum length of a name that is compared, and maximum number of folder entries that are read."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the closest known name, or "" if none is close."""
    spellings: dict[str, str] = {}
    for one in known:
        for spelling in (one, one.rpartition("/")[2]):
            spellings.setdefault(spelling.casefold(), one)
    wanted = name.rstrip("/").casefold() if len(name) <= MAX_NAME else ""
    for spelling in (wanted, wanted.rpartition("/")[2]):
        if found := difflib.get_close_matches(spelling, spellings, n=1, cutoff=0.75):
            return f" (did you mean {printable(spellings[found[0]], MAX_NAME)!r}?)"
    return ""


def nearby_folders(name: str, file: str = "config.json") -> list[str]:
    """Folders next to the folder `name` that contain `file`, with the same prefix as in `name`."""
    prefix, slash, _ = name.rstrip("/").rpartition("/")
    try:
        with os.scandir(Path(name).expanduser().parent) as entries:
            names = [entry.name for entry in islice(entries, MAX_ENTRIES) if os.path.exists(Path(entry.path, file))]
    except (OSError, ValueError, RuntimeError):  # no such folder, NUL in the name, no such user
        return []
    return [prefix + slash + found for found in names]


def cached_repositories() -> list[str]:
    """Model repositories in the Hub's cache."""
    try:
        names = os.listdir(constants.HF_HUB_CACHE)
    except OSError:
        return []
    return [name.removeprefix("models--").replace("--", "/") for name in names if name.startswith("models--")]
