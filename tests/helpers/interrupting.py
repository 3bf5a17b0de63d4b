"""Runs the command line in a process of its own and ends it with a signal in the middle of its work."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from helpers.children import Forked

ENDS = {signal.SIGINT: 1, signal.SIGTERM: 1, signal.SIGKILL: -signal.SIGKILL}
"""Exit codes of `ssd-cache` after these signals."""


def interrupt(command: list[str], is_ready: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    """Start `ssd-cache` with these arguments, send the signal once `is_ready()`; returns exit code and stderr."""
    process = Forked(*command)
    end = time.monotonic() + 120
    while process.returncode is None and not is_ready() and time.monotonic() < end:
        time.sleep(0.02)
    assert process.returncode is None, f"it ended too early: {process.communicate()[1]}"
    process.send_signal(how)
    _, stderr = process.communicate(60)
    assert is_ready(), "nothing was saved in two minutes"
    return process.returncode, stderr
