"""`fit_heads`: allocate a fixed total of slots to the heads, with a kind for each head.

It reads the results of `profile_heads` at several levels, and measures nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from ssd_cache.budget import KINDS, Amount, check_count, resolve_amount
from ssd_cache.head_map.head_map import HeadMap

MAX_CELLS = 1 << 30
"""Maximum number of cells in the table of the exact search."""


def fit_heads(head_map: HeadMap, budget: Amount = 0.2, *, step: int | None = None) -> HeadMap:
    """Choose the kind and the slots of each head that minimise the total loss.

    The total number of slots is at most that of the uniform budget.

    At each measured level a head takes the kind that retains more of its attention there. Dynamic programming then
    finds the slots with the smallest sum of losses over the heads; the search is exact. If the map has results of
    `measure_divergence`, a head's loss is its divergence: how much the model's output changes when only this head is
    compressed. Otherwise the loss is (1 - retained attention) squared, because one head that loses most of its
    attention damages an image more than many heads that lose a little (docs/profiling.md has the measurements).

    Args:
        head_map: a map that `profile_heads(..., levels=...)` made, with or without divergences.
        budget: the uniform budget that sets the total: a fraction of the grid, or slots per head.
        step: also try slots between the levels, at this spacing; their losses are interpolated linearly.

    Returns:
        The map with new labels. Its `budget` lists the slots of each head, `[layers][kv_heads]`. `SSDCache` does not
        read buffer, recents and sinks from the profile: pass them where the profile did not use the defaults.

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
    uniform = resolve_amount("budget", budget, head_map.num_visual_tokens)
    divergence = _by_level(head_map, "divergence")
    levels = measured_levels(head_map, divergence or None)
    if uniform < levels[0]:
        raise ValueError(
            f"the budget is {uniform} slots a head, fewer than the lowest level, {levels[0]}: give more, or "
            f"profile again with levels=({uniform}, ...)"
        )
    choices = levels
    if step is not None:
        check_count("step", step, 1)
        between = (slots for low, high in pairwise(levels) for slots in range(low, high, step))
        choices = [*between, levels[-1]]

    def along(values: Mapping[int, np.ndarray]) -> np.ndarray:
        """Values at the levels, interpolated linearly: `[heads, choices]`."""
        return np.array([np.interp(choices, levels, head) for head in np.array([values[n].ravel() for n in levels]).T])

    # Queries before the first eviction retain everything. The last token is not fed back, so it is not a query.
    num_queries = head_map.num_visual_tokens - 1
    share = {level: max(0, num_queries - level) / num_queries for level in levels}
    spatial, semantic = (
        along({level: 1 - share[level] * (1 - values[level]) for level in levels})
        for values in (_by_level(head_map, f"retained_{kind}") for kind in KINDS)
    )
    losses = along(divergence) if divergence else (1 - np.maximum(spatial, semantic)) ** 2
    picks = best_choices(np.array(choices), -losses, uniform * len(losses))
    is_spatial = [bool(spatial[head, pick] > semantic[head, pick]) for head, pick in enumerate(picks)]
    shape = head_map.is_spatial.shape
    return replace(
        head_map,
        is_spatial=torch.tensor(is_spatial).view(shape),
        method="fit by divergence" if divergence else "fit",
        budget=np.array(choices)[picks].reshape(shape).tolist(),
        threshold=None,
        profile=head_map.facts_of_labels,
    )


def measured_levels(head_map: HeadMap, among: Collection[int] | None = None) -> list[int]:
    """The levels (slots per head) at which a map has retained attention; only those in `among`, if given.

    Raises:
        ValueError: fewer than two.
    """
    spatial, semantic = (_by_level(head_map, f"retained_{kind}").keys() for kind in KINDS)
    return check_levels(level for level in spatial & semantic if among is None or level in among)


def check_levels(levels: Iterable[int]) -> list[int]:
    """The levels in ascending order; raises ValueError if there are fewer than two."""
    levels = sorted(levels)
    if len(levels) < 2:
        raise ValueError(
            f"attention was measured at the levels {levels}, and choosing slots needs at least two: profile "
            "again with levels=(0.1, 0.2, 0.3, 0.5)"
        )
    return levels


def _by_level(head_map: HeadMap, name: str) -> dict[int, np.ndarray]:
    """The map's scores `<name>-<slots>` by slots, float64 `[layers, kv_heads]`."""
    return {
        int(match[1]): values.double().numpy()
        for score, values in head_map.scores.items()
        if (match := re.fullmatch(rf"{name}-(\d+)", score))
    }


def best_kinds(head_map: HeadMap, level: int) -> torch.Tensor:
    """Whether a head retains more attention as a spatial head at a measured level, boolean `[layers, kv_heads]`."""
    return head_map.scores[f"retained_spatial-{level}"] > head_map.scores[f"retained_semantic-{level}"]


def divergence_name(level: int) -> str:
    """Key in `HeadMap.scores` of the heads' divergence at a level."""
    return f"divergence-{level}"


def best_choices(costs: np.ndarray, values: np.ndarray, capacity: int) -> list[int]:
    """Choose one option per group, with the greatest total value at a total cost of at most `capacity`.

    `costs` is `[choices]`, whole numbers from 0, and `values` is `[groups, choices]`. Raises ValueError if there are
    too many groups and too fine costs for an exact search.
    """
    unit = max(1, int(np.gcd.reduce(costs)))
    units, room = costs // unit, capacity // unit
    if (room + 1) * len(values) > MAX_CELLS:
        raise ValueError(f"{len(values)} groups with {room} units to share are too many: give a coarser step, or none")
    best = np.zeros(room + 1)  # [c]: the greatest value of the groups so far at a cost of at most c
    picks = np.zeros((len(values), room + 1), dtype=np.int16)
    for group, value in enumerate(values):
        found = np.full(room + 1, -np.inf)
        for choice, cost in enumerate(units):
            if cost <= room:
                candidate = best[: room + 1 - cost] + value[choice]
                better = candidate > found[cost:]
                found[cost:][better] = candidate[better]
                picks[group, cost:][better] = choice
        best = found
    result = []
    for row in picks[::-1]:
        result.append(int(row[room]))
        room -= int(units[result[-1]])
    return result[::-1]
