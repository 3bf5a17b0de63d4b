"""Errors of the command line: each becomes one line on stderr and an exit code.

This covers the library's own errors, which are ValueErrors, and those of the system. Any other exception is a bug and
shows its traceback.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer
from tqdm import tqdm
from typer.core import TyperGroup

from ssd_cache.cache.sharding import is_distributed
from ssd_cache.io.showing import printable
from ssd_cache.io.untrusted import WrongFileError
from ssd_cache.runs.progress import remove_open_bars

TYPER_INTERRUPTED = 130
"""Exit code that typer returns after Ctrl-C; older versions raise Abort."""


class Failure(Exception):
    """Ends the run with a message for the user."""

    exit_code = 1


class WrongUse(Failure):
    """The options cannot be used; no work was started."""

    exit_code = 2


@contextmanager
def refusing() -> Iterator[None]:
    """Turn ValueErrors of the library into WrongUse, except when the Hub cannot be reached."""
    try:
        yield
    except ConnectionError:  # HeadMapHubError is a ValueError as well
        raise
    except ValueError as error:  # HeadMapError and GeneratorError among them
        raise WrongUse(str(error)) from error


class OneLineGroup(TyperGroup):
    """A group of commands that prints mistakes, warnings and an interruption as one line each."""

    def main(self, args=None, prog_name=None, complete_var=None, standalone_mode=True, **extra):  # type: ignore[override]
        for stream in (sys.stdout, sys.stderr):  # the encoding may lack characters of a name
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                code = self._run(args, prog_name, complete_var, **extra)
            finally:
                # Always close the process group: gloo may abort the process if it is still open when Python exits.
                if is_distributed():
                    torch.distributed.destroy_process_group()
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, args, prog_name, complete_var, **extra) -> int:
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra) or 0
            if code != TYPER_INTERRUPTED:
                return code
            failed = Failure("interrupted")
        except typer.Abort:
            failed = Failure("interrupted")
        except Failure as error:
            failed = error
        except torch.OutOfMemoryError:
            failed = Failure("out of GPU memory: generate fewer images at once (--batch-size), or lower --budget")
        except OSError as error:  # also when the Hub cannot be reached
            failed = Failure(str(error))
        except ValueError as error:  # NaN, a prompt that is too long, another run's state
            # a file that the run cannot resume from is wrong use
            failed = (WrongUse if isinstance(error, WrongFileError) else Failure)(str(error))
        except Exception as error:
            if not hasattr(error, "format_message"):  # only typer's own errors have it: options, numbers, choices
                raise
            failed = WrongUse(error.format_message())
        remove_open_bars()
        typer.echo(_one_line(str(failed)), err=True)
        return failed.exit_code


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    # tqdm.write prints a progress bar that is on the line again
    tqdm.write(_one_line(f"warning: {message}"), file=sys.stderr)


def _one_line(message: str) -> str:
    return f"ssd-cache: {' '.join(printable(message).split())}"
