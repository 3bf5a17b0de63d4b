"""How commands load a model: transformers' bar shows only where there is something to wait for.

Which model, dtype and device were decided before.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ssd_cache.models import Checkpoint, Generator


def load_generator(checkpoint: Checkpoint, dtype: str | torch.dtype, device: str | torch.device) -> Generator:
    """As `Checkpoint.load`, without the bar for a folder on this machine."""
    quiet = Path(checkpoint.source).is_dir() and transformers_logging.is_progress_bar_enabled()
    if quiet:
        transformers_logging.disable_progress_bar()
    try:
        return checkpoint.load(dtype, device)
    finally:
        if quiet:
            transformers_logging.enable_progress_bar()
