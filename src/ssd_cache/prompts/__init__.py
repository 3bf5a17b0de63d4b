"""Prompts for measuring a model: the 600 captions of the package, or the prompts that come with a checkpoint.

`examples/write_captions.py` wrote the captions. A checkpoint that knows only some words has its own prompts in a file
in its folder, as it may have its own head map there.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ssd_cache.io.showing import ReadableError
from ssd_cache.io.untrusted import read_text
from ssd_cache.models import Checkpoint

PROMPTS_FILE = "prompts.txt"
"""File of a checkpoint's folder with the prompts to measure it by, one a line."""


def default_prompts(checkpoint: Checkpoint) -> list[str]:
    """The prompts to measure a model by when the user gives none: its own if its folder has some, else the package's.

    Args:
        checkpoint: the model; a Hub id has no folder, and no prompts are downloaded.

    Raises:
        OSError: its file of prompts cannot be read.
        ValueError: the file is not in UTF-8, or has no prompts.
    """
    own = Path(checkpoint.source) / PROMPTS_FILE
    text = read_text(own) if own.is_file() else files(__package__).joinpath("captions.txt").read_text("utf-8")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ReadableError(f"{own} has no prompts; write one a line, or delete it to use those of the package")
    return prompts
