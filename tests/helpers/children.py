"""Runs the command line in processes of their own, the same wherever the tests themselves run.

`start_cli` starts Python anew. `Forked` processes come from a server that has imported the package already, so that a
test does not pay seconds for imports; they are processes all the same, with their own signals, environment and files.

A shell that starts the tests in the background, and `nohup` in a script, make them ignore SIGINT, and every process
that they start inherits this. The processes of these tests do not: they stop at Ctrl-C, as at a terminal.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TWO_PROCESSES = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)
"""Arguments of Python that start a program twice. accelerate 1.15 starts several processes with --multi_gpu alone;
without a GPU they compute on the CPU."""

GLOO = re.compile(r"^\[Gloo\] Rank .*\n", re.MULTILINE)
"""Lines that torch 2.8 itself prints when processes meet."""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["ssd_cache.cli", "ssd_cache.models", "transformers.models.janus.modeling_janus", "helpers.frozen"]
)


@contextmanager
def handling_interrupts() -> Iterator[None]:
    """A process started inside the block has the system's default for SIGINT: a handler does not outlive `exec`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_cli(*arguments, cwd: Path, **environment) -> subprocess.Popen[str]:
    """`ssd-cache` with these arguments, its output in pipes, without a terminal and without input.

    Args:
        arguments: of the command line.
        cwd: its folder.
        environment: variables in addition to those of the tests.
    """
    with handling_interrupts():
        return subprocess.Popen(
            [sys.executable, "-m", "ssd_cache.cli", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, **environment},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


def command_line() -> None:
    """`ssd-cache`, which reads `sys.argv`."""
    from ssd_cache.cli import app

    app()


class Forked:
    """`ssd-cache` in a forked process with one thread, as sums in another order round differently.

    Args:
        arguments: of the command line.
        cwd: its folder; that of the tests when not given.
        before: a function that can be pickled; called in the process before the command.
        program: another such function, called in place of the command line.
        environment: variables in addition to those of the tests.
    """

    def __init__(
        self,
        *arguments,
        cwd: Path | None = None,
        before: Callable[[], object] | None = None,
        program: Callable[[], object] = command_line,
        **environment: str,
    ):
        self._output = tempfile.TemporaryDirectory()
        self._paths = [Path(self._output.name, name) for name in ("stdout", "stderr")]
        environment = {**os.environ, "COLUMNS": "80", "CUDA_VISIBLE_DEVICES": "", **environment}
        given = [str(argument) for argument in arguments], cwd or Path.cwd(), environment, self._paths, before, program
        self._process = SERVER.Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float = 500) -> tuple[str, str]:
        """Wait for its end, and kill it after `timeout` seconds; returns stdout and stderr."""
        self._process.join(timeout)
        self._process.kill()
        self._process.join()
        return tuple(path.read_text() if path.exists() else "" for path in self._paths)


def _run(
    arguments: list[str],
    cwd: Path,
    environment: dict[str, str],
    outputs: Sequence[Path],
    before: Callable[[], object] | None,
    program: Callable[[], object],
) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    sys.argv = ["ssd-cache", *arguments]
    if before is not None:
        before()
    program()


def run_cli(*arguments, cwd: Path | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one forked process."""
    process = Forked(*arguments, cwd=cwd)
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def run_two(
    *commands: Sequence,
    cwd: Path | None = None,
    before: Callable[[], object] | None = None,
    program: Callable[[], object] = command_line,
) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two forked processes that share a run, on the CPU.

    Args:
        commands: arguments of the command line, the same for both processes or one each.
        cwd: their folder; that of the tests when not given.
        before, program: as for `Forked`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group["ACCELERATE_USE_CPU"] = "true"
    both = [
        Forked(*command, cwd=cwd, before=before, program=program, **group, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, command in enumerate(commands if len(commands) == 2 else 2 * commands)
    ]
    answers = [process.communicate() for process in both]
    return [
        (process.returncode, *(GLOO.sub("", text) for text in answer))
        for process, answer in zip(both, answers, strict=True)
    ]
