"""Allocate a fixed total of slots: `fit_heads` per head, `allocate_budgets` per layer and kind.

Both read profiling results at several levels and return input for `SSDCache`; they measure nothing. `fit_heads` also
chooses labels; `allocate_budgets` keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ssd_cache.budget import KINDS, Amount, Budget, check_count, resolve_amount, resolve_budget
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.profiling.labels import label_heads, map_scores
from ssd_cache.profiling.statistics import HeadStatistics

SCORE = re.compile(r"retained_(spatial|semantic)-(\d+)")
DIVERGENCE = re.compile(r"divergence-(\d+)")
MAX_CELLS = 1 << 30
"""Maximum number of cells in the table of the exact search."""


def allocate_budgets(
    source: HeadMap | HeadStatistics, budget: Amount = 0.2, *, step: int | None = None
) -> list[dict[str, int]]:
    """Choose slots per layer and kind that retain the most attention, with at most the total of a uniform budget.

    The result maximises the sum over heads of the terms in `retained_attention`, among all choices of one measured
    level per layer and kind. The search is exact: dynamic programming (a multiple-choice knapsack). If the uniform
    budget is one of the levels, as it is when the map was made for it, the result retains at least as much attention.

    Args:
        source: a map that `profile_heads(..., levels=...)` made, or statistics, which are labelled by coverage.
        budget: the uniform budget that sets the total: a fraction of the grid, or slots per head.
        step: also try slots between the levels, at this spacing; their retained attention is interpolated linearly.

    Returns:
        `{"spatial": slots, "semantic": slots}` for each layer, for `SSDCache(head_map, budget=...)` with the buffer,
        recents and sinks of the profile. A kind without heads in a layer gets the uniform budget and costs nothing.

    Raises:
        ValueError: fewer than two levels, or a budget below the lowest.

    Example: a spatial head loses little from 40 slots to 20, a semantic head gains much from 40 to 60.

        >>> kept = {"spatial-20": 0.90, "spatial-40": 0.92, "spatial-60": 0.93}
        >>> kept |= {"semantic-20": 0.5, "semantic-40": 0.6, "semantic-60": 0.8}
        >>> scores = {f"retained_{name}": torch.tensor([[value, value]]) for name, value in kept.items()}
        >>> head_map = HeadMap(torch.tensor([[True, False]]), grid=(10, 10), scores=scores)
        >>> allocate_budgets(head_map, 40)
        [{'spatial': 20, 'semantic': 60}]
    """
    is_spatial, scores = _read(source)
    uniform = resolve_amount("budget", budget, source.num_visual_tokens)
    curves = _curves(scores, source.num_visual_tokens)
    levels = _levels(curves, uniform)
    choices = _between(levels, step)
    groups, costs, values = [], [], []
    for layer, labels in enumerate(is_spatial):
        for kind, heads in zip(KINDS, (labels, ~labels), strict=True):
            if heads.any():
                kept = [curves[kind][slots][layer][heads].sum() for slots in levels]
                groups.append((layer, kind))
                costs.append(np.array(choices) * int(heads.sum()))
                values.append(np.interp(choices, levels, kept))
    picks = best_choices(costs, values, uniform * is_spatial.size)
    result = [dict.fromkeys(KINDS, uniform) for _ in is_spatial]
    for (layer, kind), pick in zip(groups, picks, strict=True):
        result[layer][kind] = choices[pick]
    return result


def fit_heads(source: HeadMap | HeadStatistics, budget: Amount = 0.2, *, step: int | None = None) -> HeadMap:
    """Choose a kind and slots for every head that minimise the total loss, with at most the total of a uniform budget.

    At each measured level a head takes the kind that retains more of its attention there. Dynamic programming then
    finds the slots with the smallest sum of losses over the heads; the search is exact. If the map has results of
    `measure_divergence`, a head's loss is its divergence: how much the model's output changes when only this head is
    compressed. Otherwise the loss is (1 - retained attention) squared, because one head that loses most of its
    attention damages an image more than many heads that lose a little (docs/head-maps.md has the measurements).

    Args:
        source: a map that `profile_heads(..., levels=...)` made, with or without divergences, or statistics.
        budget: the uniform budget that sets the total: a fraction of the grid, or slots per head.
        step: also try slots between the levels, at this spacing; their retained attention is interpolated linearly.

    Returns:
        The map, with one number for every head in `budget`: `SSDCache(fit_heads(head_map))` uses it with the buffer,
        recents and sinks of the profile. The map keeps the scores of the source, its learned score and its origin.

    Raises:
        ValueError: fewer than two levels, or a budget below the lowest.

    Example: the first head needs only a short window, the second needs more slots than the uniform budget.

        >>> kept = {"spatial-20": [1.0, 0.2], "spatial-40": [1.0, 0.3], "spatial-60": [1.0, 0.4]}
        >>> kept |= {"semantic-20": [0.5, 0.5], "semantic-40": [0.6, 0.6], "semantic-60": [0.8, 0.9]}
        >>> scores = {f"retained_{name}": torch.tensor([values]) for name, values in kept.items()}
        >>> fitted = fit_heads(HeadMap(torch.tensor([[True, True]]), grid=(10, 10), scores=scores), 40)
        >>> fitted.is_spatial.tolist(), fitted.budget
        ([[True, False]], [[20, 60]])
    """
    labels, scores = _read(source)
    uniform = resolve_amount("budget", budget, source.num_visual_tokens)
    curves = _curves(scores, source.num_visual_tokens)
    divergence = {int(match[1]): score for name, score in scores.items() if (match := DIVERGENCE.fullmatch(name))}
    levels = _levels({kind: curves[kind].keys() & divergence for kind in KINDS} if divergence else curves, uniform)
    choices = _between(levels, step)
    spatial, semantic = (_along(choices, {n: curves[kind][n] for n in levels}) for kind in KINDS)
    if divergence:
        losses = _along(choices, {n: divergence[n].double().numpy() for n in levels})
    else:
        losses = (1 - np.maximum(spatial, semantic)) ** 2
    picks = best_choices([np.array(choices)] * len(losses), list(-losses), uniform * len(losses))
    is_spatial = np.array([spatial[head, pick] > semantic[head, pick] for head, pick in enumerate(picks)])
    slots = np.array(choices)[picks].reshape(labels.shape)
    facts: dict[str, Any] = {"scores": scores, "previews": source.layout.draft_grids}
    if isinstance(source, HeadMap):
        facts |= {name: getattr(source, name) for name in ("model_id", "revision", "model_type", "profile", "learned")}
    return HeadMap(
        torch.from_numpy(is_spatial.reshape(labels.shape)),
        source.layout.grid,
        method="fit by divergence" if divergence else "fit",
        budget=slots.tolist(),
        **facts,
    )


def measured_levels(head_map: HeadMap) -> list[int]:
    """The numbers of slots at which a map has the retained attention of every head as both kinds.

    Raises:
        ValueError: fewer than two.
    """
    return _levels(_curves(head_map.scores, head_map.num_visual_tokens))


def best_kinds(head_map: HeadMap, level: int) -> torch.Tensor:
    """Whether a head retains more attention as a spatial head at a measured level, boolean `[layers, kv_heads]`."""
    return head_map.scores[f"retained_spatial-{level}"] > head_map.scores[f"retained_semantic-{level}"]


def divergence_name(level: int) -> str:
    """Name of the map score that holds every head's divergence at a level."""
    return f"divergence-{level}"


def retained_attention(
    source: HeadMap | HeadStatistics, budget: Budget = 0.2, is_spatial: torch.Tensor | None = None
) -> float:
    """Mean over the heads of the attention that they retain over a whole image, at measured levels.

    A head's term is `(n * r + (T - n) * 1) / T`. `r` is its `HeadStatistics.retained`. `T` is the number of queries of
    an image: one less than the grid has cells, since the last token is not fed back. `n = T - slots` of them are
    evicting queries.

    Args:
        source: as for `allocate_budgets`.
        budget: as for `SSDCache`; every number of slots must be a measured level.
        is_spatial: labels that replace those of the source, boolean `[layers, kv_heads]`.

    Raises:
        ValueError: slots that were not measured.
    """
    labels, scores = _read(source)
    labels = labels if is_spatial is None else is_spatial.cpu().numpy()
    curves, kept = _curves(scores, source.num_visual_tokens), []
    slots = resolve_budget(budget, labels.tolist(), source.num_visual_tokens)
    for layer, head in np.ndindex(*labels.shape):
        curve = curves["spatial" if labels[layer, head] else "semantic"]
        if slots[layer][head] not in curve:
            raise ValueError(f"{slots[layer][head]} slots were not measured; the levels are {sorted(curve)}")
        kept.append(curve[slots[layer][head]][layer, head])
    return float(np.mean(kept))


def best_choices(costs: list[np.ndarray], values: list[np.ndarray], capacity: int) -> list[int]:
    """Choose one option per group, with the greatest total value at a total cost of at most `capacity`.

    Args:
        costs: whole numbers from 0, one array `[choices]` per group.
        values: value of each option, in the same shapes.
        capacity: at least the sum of each group's lowest cost.

    Raises:
        ValueError: too many groups and too fine costs for an exact search.
    """
    unit = max(1, int(np.gcd.reduce(np.concatenate(costs))))
    room = capacity // unit
    if (room + 1) * len(costs) > MAX_CELLS:
        raise ValueError(f"{len(costs)} groups with {room} units to share are too many: give a coarser step, or none")
    best = np.zeros(room + 1)  # [c]: the greatest value of the groups so far at a cost of at most c
    picks = np.zeros((len(costs), room + 1), dtype=np.int16)
    for group, (cost, value) in enumerate(zip(costs, values, strict=True)):
        found = np.full(room + 1, -np.inf)
        for choice, units in enumerate(cost // unit):
            if units <= room:
                candidate = best[: room + 1 - units] + value[choice]
                better = candidate > found[units:]
                found[units:][better] = candidate[better]
                picks[group, units:][better] = choice
        best = found
    result, left = [], room
    for group in reversed(range(len(costs))):
        result.append(int(picks[group, left]))
        left -= int(costs[group][result[-1]]) // unit
    return result[::-1]


def _read(source: HeadMap | HeadStatistics) -> tuple[np.ndarray, Mapping[str, torch.Tensor]]:
    """Labels `[layers, kv_heads]`, scores by name."""
    if isinstance(source, HeadMap):
        return source.is_spatial.numpy(), source.scores
    return label_heads(source, method="coverage")[0].numpy(), map_scores(source)


def _curves(scores: Mapping[str, torch.Tensor], num_cells: int) -> dict[str, dict[int, np.ndarray]]:
    """Kind -> slots -> attention retained over a whole image, float64 `[layers, kv_heads]`."""
    num_queries = num_cells - 1
    curves: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}
    for name, score in scores.items():
        if match := SCORE.fullmatch(name):
            slots = int(match[2])
            share = max(0, num_queries - slots) / num_queries
            curves[match[1]][slots] = 1 - share * (1 - score.double().numpy())
    return curves


def _along(choices: list[int], values: Mapping[int, np.ndarray]) -> np.ndarray:
    """Interpolate values at some levels, `[layers, kv_heads]` each, linearly: `[heads, choices]`."""
    levels = sorted(values)
    return np.array([np.interp(choices, levels, head) for head in np.array([values[n].ravel() for n in levels]).T])


def _levels(curves: Mapping[str, Collection[int]], uniform: int | None = None) -> list[int]:
    """The numbers of slots at which both kinds were measured; raises for fewer than two, or a budget below them all."""
    levels = sorted(set(curves["spatial"]) & set(curves["semantic"]))
    if len(levels) < 2:
        raise ValueError(
            f"attention was measured at {len(levels)} number of slots {levels}, and sharing needs two or more: profile "
            "again with levels=(0.1, 0.2, 0.3, 0.5)"
        )
    if uniform is not None and uniform < levels[0]:
        raise ValueError(
            f"the budget is {uniform} slots a head, fewer than the lowest level, {levels[0]}: give more, or "
            f"profile again with levels=({uniform}, ...)"
        )
    return levels


def _between(levels: list[int], step: int | None) -> list[int]:
    """The levels, and every `step`-th number between two of them."""
    if step is None:
        return levels
    check_count("step", step, 1)
    inner = [slots for low, high in pairwise(levels) for slots in range(low, high, step)]
    return [*inner, levels[-1]]
