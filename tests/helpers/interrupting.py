"""Runs the command line in a process of its own and ends it with a signal in the middle of its work.

`interrupt` sends the signal when a file shows how far it is; `kill_in_call` at a certain call of a function.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import time
from collections.abc import Callable
from functools import partial
from itertools import count

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


def kill_in_call(command: list[str], name: str, number: int, save_seconds: float) -> tuple[int, str]:
    """Start `ssd-cache` with these arguments, and kill it at the `number`th call of a function; exit code and stderr.

    `name` is that of the function, "module:Class.method". Training steps are saved every `save_seconds`.
    """
    process = Forked(*command, before=partial(_die_in_call, name, number, save_seconds))
    _, stderr = process.communicate(120)
    return process.returncode, stderr


def _die_in_call(name: str, number: int, save_seconds: float) -> None:
    place, _, method = name.rpartition(".")
    owner, calls = pkgutil.resolve_name(place), count(1)
    real = getattr(owner, method)

    def counted(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, method, counted)
    pkgutil.resolve_name("ssd_cache.training.learning").SAVE_SECONDS = save_seconds
