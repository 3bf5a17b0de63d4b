"""Runs of the command line that fail, and a disk on which only a few writes fit."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from click.testing import Result

from ssd_cache.io import writing


def one_line(result: Result, code: int) -> str:
    """The only line on stderr of a run that failed with this exit code."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("ssd-cache: ") and "warning: " not in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


def fail_on_full_disk(monkeypatch, run: Callable[[], Result], num_writes: int, most: int) -> int:
    """Repeat a run whose disk is full after `num_writes` writes, `most` times or until it ends well; the failures."""
    real, left = os.fsync, []

    def fsync(number: int) -> None:
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        real(number)

    monkeypatch.setattr(writing.os, "fsync", fsync)
    for failed in range(most):
        left[:] = [1] * num_writes
        result = run()
        if result.exit_code == 0:
            return failed
        assert "No space left on device" in one_line(result, 1)
    return most
