"""`allocate_budgets`: a fixed total of slots, shared out over layers and kinds so that heads retain most attention.

It reads what profiling measured at several levels and gives `SSDCache(budget=...)`'s list. It measures nothing, and a
head's kind stays as it is labelled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch

from ssd_cache.budget import KINDS, Amount, Budget, resolve_amount, resolve_budget
from ssd_cache.head_map import HeadMap
from ssd_cache.labels import head_scores, label_heads
from ssd_cache.statistics import HeadStatistics

SCORE = re.compile(r"retained_(spatial|semantic)-(\d+)")
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
    is_spatial, scores, grid = _read(source)
    uniform = resolve_amount("budget", budget, grid[0] * grid[1])
    curves = _curves(scores, grid)
    levels = sorted(curves["spatial"].keys() & curves["semantic"].keys())
    if len(levels) < 2:
        raise ValueError(
            f"attention was measured at {len(levels)} number of slots {levels}, and sharing needs two or more: profile "
            "again with levels=(0.1, 0.2, 0.3, 0.5)"
        )
    if uniform < levels[0]:
        raise ValueError(
            f"budget={budget} is {uniform} slots a head, fewer than the lowest level, {levels[0]}: give more, or "
            f"profile again with levels=({uniform}, ...)"
        )
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
    labels, scores, grid = _read(source)
    labels = labels if is_spatial is None else is_spatial.cpu().numpy()
    curves, kept = _curves(scores, grid), []
    for layer, slots in enumerate(resolve_budget(budget, len(labels), grid[0] * grid[1])):
        for kind, heads in zip(KINDS, (labels[layer], ~labels[layer]), strict=True):
            if heads.any():
                if slots[kind] not in curves[kind]:
                    raise ValueError(f"{slots[kind]} slots were not measured; the levels are {sorted(curves[kind])}")
                kept.append(curves[kind][slots[kind]][layer][heads])
    return float(np.concatenate(kept).mean())


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


def _read(source: HeadMap | HeadStatistics) -> tuple[np.ndarray, Mapping[str, torch.Tensor], tuple[int, int]]:
    """Labels `[layers, kv_heads]`, scores by name, grid."""
    if isinstance(source, HeadMap):
        return source.is_spatial.numpy(), source.scores, source.grid
    return label_heads(source, method="coverage")[0].numpy(), head_scores(source), source.grid


def _curves(scores: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> dict[str, dict[int, np.ndarray]]:
    """Kind -> slots -> attention retained over a whole picture, float64 `[layers, kv_heads]`."""
    num_queries = grid[0] * grid[1] - 1
    curves: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in KINDS}
    for name, score in scores.items():
        if match := SCORE.fullmatch(name):
            slots = int(match[2])
            share = max(0, num_queries - slots) / num_queries
            curves[match[1]][slots] = 1 - share * (1 - score.double().numpy())
    return curves


def _between(levels: list[int], step: int | None) -> list[int]:
    """The levels, and every `step`-th number between two of them."""
    if step is None:
        return levels
    if step < 1:
        raise ValueError(f"step={step} is out of range: give a whole number of slots from 1 up")
    inner = [slots for low, high in pairwise(levels) for slots in range(low, high, step)]
    return [*inner, levels[-1]]
