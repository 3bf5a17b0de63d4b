"""The model card of a head map on the Hub.

This module only reads a `HeadMap`; it neither saves nor uploads anything.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from ssd_cache.io.markdown import code_block, escape

if TYPE_CHECKING:
    from ssd_cache.head_map.head_map import HeadMap

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)

CARD = """\
---
{front_matter}
---

# Head map of {model}

Which KV heads of {model} look at the neighbourhood of the pixel being generated (*spatial*), and which look at a few
far tokens that carry the prompt's meaning (*semantic*). With it, `ssd-cache` runs the model with a KV cache of fixed
size: spatial heads keep a short recent window, semantic heads the few tokens that receive the most attention (SSD,
Spatial-Semantic head Decoupling, [arXiv 2510.18716](https://arxiv.org/abs/2510.18716)).

A row for each layer, a column for each KV head; `#` is spatial, `.` semantic:

{labels}

## Use

{example}

## Facts

| | |
|---|---|
{facts}

## How it was made

{profile}

`config.json` holds these facts, `{tensors}` the labels `is_spatial` `[layers, kv_heads]` and the scores behind them.
No code, no pickle.
"""
EXAMPLE = """\
from transformers import {model_class}
from ssd_cache import HeadMap, SSDCache      # importing registers the attention name "ssd"

model = {model_class}.from_pretrained({model}, attn_implementation="ssd")
head_map = HeadMap.from_pretrained({repo})
cache = SSDCache(head_map, budget=0.2)       # a fifth of the visual tokens
tokens = model.generate(**inputs, {mode}**cache.as_kwargs())
cache.reset()                                # ready for the next image"""


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
        labels=code_block("\n".join(head_map.label_rows())),
        example=code_block(example, "python"),
        facts="\n".join(rows),
        profile=profile if head_map.profile else "It carries no record of how it was made.",
        tensors="head_map.safetensors",
    )
