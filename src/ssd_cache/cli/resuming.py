"""Runs that can be interrupted and resumed: the path of their state file, and the message on how to resume.

Used by the commands that measure or train. The content of a state file is defined in `ssd_cache.runs.run_state`.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ssd_cache.cli.errors import Failure, failure
from ssd_cache.cli.files import check_place
from ssd_cache.runs.run_state import OtherRunError, is_finished

Resume = Annotated[
    Path | None,
    typer.Option(
        help="State file: the run saves finished parts there, and the same command resumes from it.",
        metavar="FILE",
        show_default="OUTPUT.state",
    ),
]

Result = TypeVar("Result")


class StateFile:
    """The state file of a command. It is beside the output unless `--resume` gives another path.

    Raises:
        WrongUse: the path cannot be written.
    """

    def __init__(self, resume: Path | None, output: Path):
        if resume is not None:
            check_place("--resume", resume, is_folder=False)
        self.is_default = resume is None
        self.path = Path(f"{output.expanduser().absolute()}.state") if resume is None else resume

    def run(self, work: Callable[[Path], Result]) -> Result:
        """Run `work` and return its result. `work` gets the path of the file, saves its state there, resumes from it.

        A finished state with other settings is replaced if it is at the default path, because it belongs to an older
        run with the same output.

        Raises:
            Failure: the run was interrupted, or it cannot start or finish; the message names the remedy.
            WrongUse: the state file belongs to another run.
        """
        with _interruptible(self.path):
            try:
                try:
                    return work(self.path)
                except OtherRunError:
                    if not self.is_default or not is_finished(self.path):
                        raise
                    self.path.unlink()
                    return work(self.path)
            except ValueError as error:  # NaN, a prompt too long, another run's state, a full disk
                raise failure(error) from error


@contextmanager
def _interruptible(path: Path) -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so the run can save its state. Turn both into a Failure with one line."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
        before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"{path} keeps the finished parts" if path.exists() else "nothing was finished yet"
        raise Failure(f"interrupted; {kept}: run the same command again to go on") from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
