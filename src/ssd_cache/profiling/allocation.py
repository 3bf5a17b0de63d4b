"""A fixed total of slots, shared out: `fit_heads` head by head, `allocate_budgets` by layer and kind.

Both read what profiling measured at several levels and give what `SSDCache` takes; they measure nothing. `fit_heads`
chooses labels as well, `allocate_budgets` leaves them.
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
"""Of the table that the exact search fills."""


def allocate_budgets(
    source: HeadMap | HeadStatistics, budget: Amount = 0.2, *, step: int | None = None
) -> list[dict[str, int]]:
    """Slots for every layer and kind, together at most what a uniform budget takes, that retain the most attention.

    The sum over the heads of `retained_attention`'s terms is greatest among all choices of one measured level for each
    layer and kind: exact, by dynamic programming (a multiple-choice knapsack). Where the uniform budget is a level
    itself, as it is when the map was made for it, the result retains at least as much.

    Args:
        source: a map that `profile_heads(..., levels=...)` made, or statistics, which are labelled by coverage.
        budget: the uniform budget whose bytes are shared: a fraction of the grid, or slots a head.
        step: also try slots between the levels, this far apart; what they retain is interpolated linearly.

    Returns:
        `{"spatial": slots, "semantic": slots}` for each layer, for `SSDCache(head_map, budget=...)` with the buffer,
        recents and sinks of the profile. A kind that a layer lacks is given the uniform budget, and takes nothing.

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
    """A map with a kind and slots for every head, together at most what a uniform budget takes, that spoil least.

    At each measured level a head takes the kind that retains more of its attention there. Slots are then shared out so
    that a sum of losses over the heads is least: exact, by dynamic programming. Where the map has what
    `measure_divergence` measured, a head's loss is that: what the model says differently when this head alone is
    compressed. Else it is (1 - retained attention) squared; the square is there because one head that loses most of
    what it looks at spoils a picture more than many that lose a little (docs/head-maps.md has the measurements).

    Args:
        source: a map that `profile_heads(..., levels=...)` made, with or without divergences, or statistics.
        budget: the uniform budget whose bytes are shared: a fraction of the grid, or slots a head.
        step: also try slots between the levels, this far apart; what they retain is interpolated linearly.

    Returns:
        The map, its `budget` a number for every head: `SSDCache(fit_heads(head_map))` uses it with the buffer, recents
        and sinks of the profile. Scores, a learned one too, and origin of the source stay.

    Raises:
        ValueError: fewer than two levels, or a budget below the lowest.

    Example: the first head sees what it needs in a short window, the second wants more than its share.

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
    facts: dict[str, Any] = {"scores": scores, "previews": source.previews}
    if isinstance(source, HeadMap):
        facts |= {name: getattr(source, name) for name in ("model_id", "revision", "model_type", "profile", "learned")}
    return HeadMap(
        torch.from_numpy(is_spatial.reshape(labels.shape)),
        source.grid,
        method="fit by divergence" if divergence else "fit",
        budget=slots.tolist(),
        **facts,
    )


def measured_levels(head_map: HeadMap) -> list[int]:
    """The numbers of slots at which a map knows what every head retains, as both kinds.

    Raises:
        ValueError: fewer than two.
    """
    return _levels(_curves(head_map.scores, head_map.num_visual_tokens))


def best_kinds(head_map: HeadMap, level: int) -> torch.Tensor:
    """Whether a head retains more as a spatial one at a measured level, boolean `[layers, kv_heads]`."""
    return head_map.scores[f"retained_spatial-{level}"] > head_map.scores[f"retained_semantic-{level}"]


def divergence_name(level: int) -> str:
    """What the score of a map is called that says how much every head costs at that level."""
    return f"divergence-{level}"


def retained_attention(
    source: HeadMap | HeadStatistics, budget: Budget = 0.2, is_spatial: torch.Tensor | None = None
) -> float:
    """Mean over the heads of the attention that they retain over a whole picture, at levels that were measured.

    A head's term is `(n * r + (T - n) * 1) / T` with `r` its `HeadStatistics.retained`, `T` the queries of a picture
    (one less than the grid has cells, since the last token is not fed) and `n = T - slots` the evicting ones.

    Args:
        source: as for `allocate_budgets`.
        budget: as for `SSDCache`; every number of slots must be a level.
        is_spatial: other labels than the source's, boolean `[layers, kv_heads]`.

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
    """One choice for each group, of greatest summed value at a summed cost of at most `capacity`.

    Args:
        costs: whole numbers from 0, one array `[choices]` a group.
        values: the same shapes.
        capacity: at least the sum of each group's least cost.

    Raises:
        ValueError: groups too many and costs too fine for an exact search.
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
    """Kind -> slots -> attention retained over a whole picture, float64 `[layers, kv_heads]`."""
    num_queries = num_cells - 1
    curves: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}
    for name, score in scores.items():
        if match := SCORE.fullmatch(name):
            slots = int(match[2])
            share = max(0, num_queries - slots) / num_queries
            curves[match[1]][slots] = 1 - share * (1 - score.double().numpy())
    return curves


def _along(choices: list[int], values: Mapping[int, np.ndarray]) -> np.ndarray:
    """Values known at some levels, `[layers, kv_heads]` each, interpolated linearly: `[heads, choices]`."""
    levels = sorted(values)
    return np.array([np.interp(choices, levels, head) for head in np.array([values[n].ravel() for n in levels]).T])


def _levels(curves: Mapping[str, Collection[int]], uniform: int | None = None) -> list[int]:
    """The numbers of slots that both kinds were measured at; refuses too few of them, and a budget below them all."""
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
