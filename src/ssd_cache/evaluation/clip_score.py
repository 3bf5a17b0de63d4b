"""CLIPScore of images and their prompts: torchmetrics' own class, with a CLIP model of transformers 5.

It generates nothing. `metrics.py` has the batched reading and the result class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ssd_cache.budget import check_count
from ssd_cache.evaluation.clip import CLIP, load_clip
from ssd_cache.evaluation.metrics import MetricResult, MetricsError, first_reason, read_batches, torchmetrics_module
from ssd_cache.evaluation.picture_folders import Captioned
from ssd_cache.models.settings import resolve_device


def clip_score(
    captioned: Sequence[Captioned],
    source: str | Path = CLIP,
    *,
    batch_size: int = 16,
    device: str | torch.device = "auto",
    on_picture: Callable[[str], object] | None = None,
) -> MetricResult:
    """Mean of 100 times the cosine between an image and its prompt (Hessel et al., arXiv 2104.08718), at least 0.

    Args:
        captioned: images with their captions; see `find_captioned`.
        source: a CLIP model in a folder or on the Hub; it sees the middle square of an image.
        batch_size: images per forward pass.
        device: device of the model.
        on_picture: called with the name of every image after it is processed.

    Raises:
        MetricsError: no readable image, or torchmetrics is missing.
        ValueError: the model is not a CLIP, or its weights are incomplete.
        OSError: the model cannot be found.
    """
    check_count("batch_size", batch_size, 1)
    where, score = resolve_device(device), torchmetrics_module("multimodal.clip_score").CLIPScore
    model, processor = load_clip(source, device=where)
    reader = _Reader(processor, model.config.text_config.max_position_embeddings)
    metric = score(lambda: (_Tensors(model), reader)).to(where)
    texts = {picture.name: text for picture, text in captioned}
    unreadable: dict[str, str] = {}
    count = 0
    with torch.inference_mode():
        for names, batch in read_batches([one for one, _ in captioned], batch_size, unreadable, on_picture):
            metric.update([image.to(where) for image in batch], [texts[name] for name in names])
            count += len(batch)
        if not count:
            raise MetricsError(f"none of {len(captioned)} pictures can be read ({first_reason(unreadable)})")
        value = metric.compute().item()
    return MetricResult(f"CLIPScore ({source})", value, count, num_cut=reader.num_cut, unreadable=unreadable)


class _Tensors(torch.nn.Module):
    """A CLIP that returns tensors, which torchmetrics 1 expects; transformers 5 returns output objects."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


class _Reader:
    """A CLIP processor that truncates long prompts before their end token.

    torchmetrics would cut off the end token. CLIP reads the features of a text at that token, so they would be wrong.
    """

    def __init__(self, processor, longest: int):
        self.processor, self.longest, self.num_cut = processor, longest, 0

    def __call__(self, text: list[str] | None = None, images: list[torch.Tensor] | None = None, **_) -> Any:
        if images is not None:
            pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
            return self.processor.image_processor(images=pictures, return_tensors="pt")
        tokenizer = self.processor.tokenizer
        self.num_cut += sum(len(tokenizer(one)["input_ids"]) > self.longest for one in text or [])
        return tokenizer(text, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
