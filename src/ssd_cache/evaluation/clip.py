"""Loads CLIP: model, tokenizer and an image processor that resizes with PIL on every machine.

`geneval/colors.py` uses it for colours, `metrics.py` for whole images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from ssd_cache.evaluation.judge_models import load_judge

CLIP = "openai/clip-vit-large-patch14"
"""The weights that GenEval and torchmetrics' CLIPScore use, with their own activation (quick_gelu)."""


def load_clip(source: str | Path = CLIP, *, device: str | torch.device = "auto") -> tuple[CLIPModel, CLIPProcessor]:
    """Load a CLIP in float32 and evaluation mode, with its processor, from a folder or the Hub.

    Raises:
        ValueError: another kind of model, or weights are missing.
        OSError: it cannot be found.
    """
    model = load_judge(CLIPModel, source, kind="clip", dtype="float32", device=device)
    return model, CLIPProcessor(CLIPImageProcessorPil.from_pretrained(source), AutoTokenizer.from_pretrained(source))
