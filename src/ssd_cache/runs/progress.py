"""Progress bars of long runs. A run of several stages shows all its bars on one line, one after another.

This module only shows: it measures and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_TITLE: ContextVar[str | None] = ContextVar("title", default=None)


@contextmanager
def on_one_line(title: str) -> Iterator[None]:
    """Inside the block, progress bars begin with `title`, and a finished bar leaves its line to the next one."""
    before = _TITLE.set(title)
    try:
        yield
    finally:
        _TITLE.reset(before)


def progress_bar(iterable: Iterable | None = None, *, desc: str, **options: Any) -> tqdm:
    """A bar of tqdm; `options` are those of tqdm."""
    title = _TITLE.get()
    if title is not None:
        desc, options = f"{title}, {desc}", {**options, "leave": False}
    return tqdm(iterable, desc=desc, **options)


def remove_open_bars() -> None:
    """Remove bars that are still on the screen, so that a message begins a line of its own.

    An interruption can come while tqdm draws a new bar, before any block could close it.
    """
    for bar in list(getattr(tqdm, "_instances", ())):  # a private name of tqdm, the only list of its bars
        if getattr(bar, "sp", None) is not None:  # tqdm has set its printer, so it may have drawn it
            bar.leave = False
            bar.clear()
            bar.close()
