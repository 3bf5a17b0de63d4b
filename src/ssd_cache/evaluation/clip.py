"""Loads CLIP: model, tokenizer and an image processor that resizes with PIL on every machine.

`geneval/colors.py` uses it for colours, `metrics.py` for whole images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from ssd_cache.models.settings import resolve_device

CLIP = "openai/clip-vit-large-patch14"
"""The weights that GenEval and torchmetrics' CLIPScore use, with their own activation (quick_gelu)."""


def load_clip(source: str | Path = CLIP, *, device: str | torch.device = "auto") -> tuple[CLIPModel, CLIPProcessor]:
    """Load a CLIP in float32 and evaluation mode, with its processor, from a folder or the Hub.

    Raises:
        ValueError: another kind of model, or weights are missing.
        OSError: it cannot be found.
    """
    kind = AutoConfig.from_pretrained(source).model_type
    if kind != "clip":
        raise ValueError(f"{source}: a {kind!r} model, not 'clip'; give one such as {CLIP}")
    model, loading = CLIPModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        raise ValueError(f"{source}: {len(missing)} weights are missing, such as {missing[0]}; fetch it anew")
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(source), AutoTokenizer.from_pretrained(source))
    return model.to(resolve_device(device)).eval(), processor
