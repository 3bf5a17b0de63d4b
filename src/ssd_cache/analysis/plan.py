"""The settings of `analyze`, checked against a model's configuration before its weights are loaded.

It turns settings into caches and heads. Nothing is generated or measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ssd_cache.analysis.attention import choose_heads
from ssd_cache.analysis.scores import head_scores
from ssd_cache.budget import Budget, is_amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.policies import own_policy, policy_label
from ssd_cache.head_map.head_map import HeadMap, HeadMapError
from ssd_cache.models import Checkpoint

BASELINES = ("h2o", "streaming-llm")
"""Policies that are measured in addition to the head map's own settings."""

NUM_IMAGES = 4


@dataclass(frozen=True)
class Plan:
    """The checked settings of an analysis; see `analyze` for their meaning.

    Attributes:
        own: the key in `caches` of the head map's own policy; it comes first.
    """

    head_map: HeadMap
    heads: tuple[tuple[int, int], ...]
    step: int
    num_images: int
    caches: Mapping[str, SSDCache]
    own: str


def plan_analysis(
    checkpoint: Checkpoint,
    head_map: HeadMap,
    *,
    budget: Budget | None = None,
    slots: str | None = None,
    buffer: int | None = None,
    step: int | None = None,
    head: tuple[int, int] | None = None,
    num_images: int = NUM_IMAGES,
) -> Plan:
    """Check the settings of `analyze` for a model that may not be loaded yet. Raises the same errors as `analyze`."""
    if head_map.is_online:
        raise HeadMapError("an online map has no labels to analyze: give a head map, or profile the model first")
    if checkpoint.layout.draft_grids:
        raise ValueError(
            f"{checkpoint.name} draws a preview before its picture, and the analysis draws heads over a single grid: "
            "`ssd-cache profile` and `eval fidelity` work with both"
        )
    if checkpoint.family.default_guidance is None:
        raise ValueError(
            f"{checkpoint.name} is not guided, and the analysis compares guidance's rows: `ssd-cache profile` and "
            "`eval fidelity` work without"
        )
    checkpoint.check_head_map(head_map)
    cells = head_map.num_visual_tokens
    if isinstance(budget, int) and budget > cells:
        raise ValueError(f"budget={budget}: the grid has {cells} visual tokens; give at most {cells}")
    step = cells * 3 // 4 if step is None else step
    if not 1 <= step < cells:
        raise ValueError(f"step={step} is out of range: give 1 to {cells - 1} visual tokens")
    if num_images < 1:
        raise ValueError(f"num_images={num_images} is out of range: give 1 or more")
    if head is not None:
        for name, number, limit in zip(
            ("layer", "head"), head, (head_map.num_layers, head_map.num_kv_heads), strict=True
        ):
            if not 0 <= number < limit:
                raise ValueError(f"{name}={number} is out of range: {checkpoint.name} has {limit}, counted from 0")
    own, settings = own_policy(head_map, slots=slots)
    label = policy_label(own, settings)
    if not (budget is None or is_amount(budget)):  # this form of budget already sets the slots per head
        settings = {}
    caches = {label: SSDCache.from_policy(own, head_map, budget, buffer=buffer, **settings)}
    caches |= {policy: SSDCache.from_policy(policy, head_map, budget, buffer=buffer) for policy in BASELINES}
    return Plan(head_map, choose_heads(head_scores(head_map), head), step, num_images, caches, label)
