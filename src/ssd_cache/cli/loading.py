"""Find and load the model of `--model` and `--grid`, and its head map.

Which models, grids and head maps a name means is defined in `ssd_cache.models`.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ssd_cache.cli.errors import WrongUse
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint, Generator, find_generator


def parse_grid(text: str | None) -> tuple[int, int] | None:
    """Parse rows and columns, or return None if none are given; raises WrongUse."""
    if text is None:
        return None
    if (match := re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)) is None:
        raise WrongUse(f"--grid {text}: give rows and columns of visual tokens with an x between (45x46)")
    return int(match[1]), int(match[2])


def find_model(name: str, grid: str | None) -> Checkpoint:
    """The checkpoint for `--model` and `--grid`; raises WrongUse, or errors of `find_generator`."""
    return find_generator(name, parse_grid(grid))


def find_labels(checkpoint: Checkpoint, name: str | None) -> HeadMap:
    """The head map of `--head-map` for a command that needs one; raises WrongUse, or HeadMapError."""
    head_map = checkpoint.head_map(name)
    if head_map is None:
        raise WrongUse(f"{checkpoint.name} has no head map in its folder: give --head-map, as `profile` makes it")
    return head_map


def load_generator(checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device) -> Generator:
    """Call `Checkpoint.load`, without the progress bar of transformers if the model is a local folder."""
    quiet = Path(checkpoint.source).is_dir() and transformers_logging.is_progress_bar_enabled()
    if quiet:
        transformers_logging.disable_progress_bar()
    try:
        return checkpoint.load(dtype, device)
    finally:
        if quiet:
            transformers_logging.enable_progress_bar()
