"""Starts the command line as a process of its own, the same wherever the tests themselves run.

A shell that starts the tests in the background, and `nohup` in a script, make them ignore SIGINT, and every process
that they start inherits this. The processes of these tests do not: they stop at Ctrl-C, as at a terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TWO_PROCESSES = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
"""Arguments of Python that start a program twice. accelerate 1.15 starts several processes with --multi_gpu alone;
without a GPU they compute on the CPU."""


def run_cli(*arguments, cwd: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `ssd-cache` to its end, by `launcher` if given. One thread each: sums in another order round differently."""
    return subprocess.run(
        [sys.executable, *launcher, "-m", "ssd_cache.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        capture_output=True,
        timeout=500,
        check=False,
    )


@contextmanager
def handling_interrupts() -> Iterator[None]:
    """A process started inside the block has the system's default for SIGINT: a handler does not outlive `exec`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_cli(*arguments, cwd: Path | None = None, flags: tuple[str, ...] = (), **environment) -> subprocess.Popen[str]:
    """`ssd-cache` with these arguments, its output in pipes, without a terminal and without input.

    Args:
        arguments: of the command line.
        cwd: its folder.
        flags: of Python.
        environment: variables in addition to those of the tests.
    """
    with handling_interrupts():
        return subprocess.Popen(
            [sys.executable, *flags, "-m", "ssd_cache.cli", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
