"""Runs the command line in a process of its own and ends it with a signal in the middle of its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def interrupt(command: list[str], is_ready: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    """Start `ssd-cache` with these arguments, send the signal once `is_ready()`; returns exit code and stderr.

    SIGINT gets its default action first: children of a shell's background inherit it as ignored.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "ssd_cache.cli", *command],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 120
        while process.poll() is None and not is_ready() and time.monotonic() < end:
            time.sleep(0.02)
        assert process.poll() is None, f"it ended too early: {process.communicate()[1]}"
        assert is_ready(), "nothing was saved in two minutes"
        process.send_signal(how)
        return_code, stderr = process.wait(60), process.communicate()[1]
    finally:
        process.kill()
        process.wait()
    return return_code, stderr
