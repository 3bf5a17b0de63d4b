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

from ssd_cache.cli.errors import Failure
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import option
from ssd_cache.runs.run_state import OtherRunError, is_finished

Resume = Annotated[
    Path | None,
    option("State file: saves finished parts, and the same command resumes from it.", "FILE", default="OUTPUT.state"),
]

Result = TypeVar("Result")


class StateFile:
    """The state file of a command: `OUTPUT.state`, unless `--resume` gives another path."""

    def __init__(self, resume: Path | None, output: Path):
        if resume is not None:
            check_place("--resume", resume, is_folder=False)
        self.is_default = resume is None
        self.path = resume or Path(f"{output.expanduser().absolute()}.state")

    def run(self, work: Callable[[Path], Result]) -> Result:
        """Run `work` and return its result. `work` gets the path of the file, saves its state there, resumes from it.

        A finished state with other settings is replaced if it is at the default path, because it belongs to an older
        run with the same output.
        """
        with interruptible(self._kept):
            try:
                return work(self.path)
            except OtherRunError:
                if not self.is_default or not is_finished(self.path):
                    raise
                self.path.unlink()
                return work(self.path)

    def _kept(self) -> str:
        return f"{self.path} keeps the finished parts" if self.path.exists() else "nothing was finished yet"


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so the run can save its state. Turn both into a Failure that says what is kept."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
        before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Failure(f"interrupted; {kept()}: run the same command again to resume") from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
