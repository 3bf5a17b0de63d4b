"""The model card of a head map on the Hub, and the plot in it.

This module only reads a `HeadMap`; it neither saves nor uploads anything.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData
from PIL import Image, ImageDraw, ImageFont

from ssd_cache.io.markdown import code_block, escape, table
from ssd_cache.io.untrusted import checked

if TYPE_CHECKING:
    from ssd_cache.head_map.head_map import HeadMap

PLOT_NAME = "head_map.png"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

# Blue and orange of Okabe and Ito: distinguishable with any colour vision, and in grey.
SPATIAL, SEMANTIC = "#0072B2", "#E69F00"
INK, FAINT = "#222222", "#666666"
CARD = """\
---
{front_matter}
---

# Head map of {model}

Which KV heads of {model} look at the neighbourhood of the pixel being generated (*spatial*), and which look at a few
far tokens that carry the prompt's meaning (*semantic*). With it, `ssd-cache` runs the model with a KV cache of fixed
size: spatial heads keep a short recent window, semantic heads the few tokens that receive the most attention (SSD,
Spatial-Semantic head Decoupling, [arXiv 2510.18716](https://arxiv.org/abs/2510.18716)).

![{num_layers} layers by {num_kv_heads} KV heads, {num_spatial} of them spatial]({plot})

## Use

{example}

## Facts

| | |
|---|---|
{facts}

{fidelity}## How it was made

{profile}

`config.json` holds these facts, `{tensors}` the labels `is_spatial` `[layers, kv_heads]` and the scores behind them.
No code, no pickle.
"""
FIDELITY = """\
## Fidelity to the full cache

Mean over {num_images} images that nothing was fitted to: the KL divergence of the distribution of the next token
from that of the full cache, how often the most likely token is the same, and the share of the full cache's attention
that falls on tokens still held.

{table}

"""
EXAMPLE = """\
from transformers import {model_class}
from ssd_cache import HeadMap, SSDCache      # importing registers the attention name "ssd"

model = {model_class}.from_pretrained({model}, attn_implementation="ssd")
head_map = HeadMap.from_pretrained({repo})
cache = SSDCache(head_map, budget=0.2)       # a fifth of the visual tokens
tokens = model.generate(**inputs, {mode}**cache.as_kwargs())
cache.reset()                                # ready for the next image"""


@dataclass(frozen=True)
class FidelityPoint:
    """How far a cache with one budget is from the full cache, mean over images and steps; the KL is in nats."""

    budget: float
    kl: float
    agreement: float
    retained: float
    kl_standard_error: float | None = None


FIDELITY_HEADS = ["budget", "KL per token, nats", "same most likely token", "attention retained"]


def card(head_map: HeadMap, repo_id: str) -> str:
    """The model card (README.md) of a repository that holds this map."""
    model = escape(head_map.model_id or "a model without a name")
    data = ModelCardData(
        library_name="ssd-cache",
        base_model=head_map.model_id if HUB_ID.fullmatch(head_map.model_id or "") else None,
        tags=["ssd-cache", "head-map", "kv-cache", "text-to-image"],
    )
    num_spatial = int(head_map.is_spatial.sum())
    facts = {
        "layers x KV heads": f"{head_map.num_layers} x {head_map.num_kv_heads}",
        "spatial, semantic": f"{num_spatial}, {head_map.is_spatial.numel() - num_spatial}",
        "grid of visual tokens": head_map.layout.text(),
        "model": head_map.model_id,
        "model revision": head_map.revision,
        "model type": head_map.model_type,
        "method": head_map.method,
        "threshold": head_map.threshold,
        "scores": ", ".join(head_map.scores),
        "learned score": head_map.ranking,
        "digest": head_map.digest,
    }
    rows = [f"| {name} | {escape(value)} |" for name, value in facts.items() if value not in (None, "")]
    is_janus = head_map.model_type in (None, "janus")
    example = EXAMPLE.format(
        model_class="JanusForConditionalGeneration" if is_janus else "AutoModelForMultimodalLM",
        model=json.dumps(head_map.model_id or "user/model", ensure_ascii=False),
        repo=json.dumps(repo_id, ensure_ascii=False),
        mode='generation_mode="image", ' if is_janus else "",
    )
    profile = code_block(json.dumps(head_map.profile, indent=2), "json")
    return CARD.format(
        front_matter=data.to_yaml().strip(),
        model=model,
        num_layers=head_map.num_layers,
        num_kv_heads=head_map.num_kv_heads,
        num_spatial=num_spatial,
        plot=PLOT_NAME,
        example=code_block(example, "python"),
        facts="\n".join(rows),
        fidelity=_fidelity(head_map),
        profile=profile if head_map.profile else "It carries no record of how it was made.",
        tensors="head_map.safetensors",
    )


def fidelity_rows(head_map: HeadMap) -> list[list[str]]:
    """The fidelity curve that `prepare` measured, as rows of a table under `FIDELITY_HEADS`; empty without one."""
    try:
        points = checked(list[FidelityPoint], head_map.profile["fidelity"]["curve"])
    except (KeyError, TypeError, ValueError):  # no curve, or facts of the same name from elsewhere
        return []
    return [
        [
            f"{point.budget:.0%}",
            f"{point.kl:.4f}" + ("" if point.kl_standard_error is None else f" ± {point.kl_standard_error:.4f}"),
            f"{point.agreement:.2%}",
            f"{point.retained:.1%}",
        ]
        for point in points
    ]


def _fidelity(head_map: HeadMap) -> str:
    if not (rows := fidelity_rows(head_map)):
        return ""
    num_images = escape(head_map.profile["fidelity"].get("num_images"))
    return FIDELITY.format(num_images=num_images, table=table(FIDELITY_HEADS, rows))


def plot_labels(head_map: HeadMap) -> Image.Image:
    """A plot of layers (rows) by KV heads (columns), spatial blue, semantic orange; at least 520 pixels wide."""
    rows, columns = head_map.num_layers, head_map.num_kv_heads
    cell = max(2, min(26, 1400 // max(rows, columns)))
    gap = 2 if cell >= 12 else 1 if cell >= 6 else 0
    fonts = {size: ImageFont.load_default(size) for size in (14, 16, 22)}
    left, top, right, bottom = 84, 116, 28, 66
    width = max(520, left + columns * cell + right)
    left += (width - left - columns * cell - right) // 2
    image = Image.new("RGB", (width, top + rows * cell + bottom), "white")
    draw = ImageDraw.Draw(image)

    name = (head_map.model_id or "Head map").encode("ascii", "replace").decode()
    draw.text((28, 18), name if len(name) <= 42 else name[:40] + "..", INK, fonts[22])
    shape = f"{rows} layers (down) x {columns} KV heads (across), grid {head_map.layout.text()}"
    draw.text((28, 48), shape, FAINT, fonts[16])
    num_spatial = int(head_map.is_spatial.sum())
    counts = (SPATIAL, f"spatial: {num_spatial}"), (SEMANTIC, f"semantic: {rows * columns - num_spatial}")
    for x, (colour, label) in zip((28, 188), counts, strict=True):
        draw.rectangle((x, 80, x + 17, 97), colour)
        draw.text((x + 26, 89), label, INK, fonts[16], anchor="lm")

    for row, labels in enumerate(head_map.is_spatial.tolist()):
        for column, is_spatial in enumerate(labels):
            x, y = left + column * cell, top + row * cell
            draw.rectangle((x, y, x + cell - 1 - gap, y + cell - 1 - gap), SPATIAL if is_spatial else SEMANTIC)

    for row in range(0, rows, _stride(cell, 18)):
        draw.text((left - 8, top + row * cell + cell // 2), str(row), FAINT, fonts[14], anchor="rm")
    for column in range(0, columns, _stride(cell, 26 if columns <= 100 else 44)):
        x = left + column * cell + cell // 2
        draw.text((x, top + rows * cell + 6), str(column), FAINT, fonts[14], anchor="ma")
    return image


def png(head_map: HeadMap) -> bytes:
    """The plot of [`plot_labels`] as the bytes of a PNG file."""
    buffer = io.BytesIO()
    plot_labels(head_map).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _stride(cell: int, room: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... cells that leaves `room` pixels for a number."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= room)
