"""Slots that move between heads while the score is learned, to the heads for which a further slot lowers the loss most.

All slots are multiples of the eviction interval, so all heads of a layer evict at the same steps. In the end a layer
has few sizes, since heads of one size share a store of the cache. `trainer.py` measures the value of a slot: how much
one more would lower the loss. `learning_state.py` stores slots and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, pairwise

import torch

from ssd_cache.budget import round_slots
from ssd_cache.cache.plans import LayerPlan

MOVE_STEPS = 20
"""Steps over which the values are added up before slots move."""

MOVING = ((0.4, 6), (0.75, 12))
"""Until this part of the steps is done, one head in so many gets slots in each move."""

SETTLED = MOVING[-1][0]
"""After this part of the steps no slots move, and `limit_sizes` applies."""

MAX_SIZES = 3
"""Different numbers of slots in a layer. More sizes make more stores, and gained nothing (docs/experiments.md)."""


def initial_slots(plans: Sequence[LayerPlan]) -> list[tuple[int, ...]]:
    """The slots of the plans as multiples of the eviction interval; raises ValueError for too small a budget."""
    plan, slots = plans[0], [plan.num_slots for plan in plans]
    least, total = _least(plan), sum(map(sum, slots))
    if total // plan.buffer * plan.buffer < least * sum(map(len, slots)):
        raise ValueError(
            f"learn_slots=True: the budget gives a head {total / sum(map(len, slots)):.1f} slots on average, and each "
            f"keeps at least {least}, two times buffer={plan.buffer} and the tokens that are never evicted: raise the "
            "budget, or lower buffer"
        )
    return round_slots(slots, plan.buffer, least, plan.num_cells)


def move_slots(slots: torch.Tensor, values: torch.Tensor, done: float, plan: LayerPlan) -> torch.Tensor:
    """The slots after a move of one eviction interval from each of the heads with the lowest values; the total stays.

    Args:
        slots: of every head, int64 `[layers, kv_heads]`, multiples of the eviction interval.
        values: of a slot in every head, `[layers, kv_heads]`.
        done: part of all steps that are done, from 0 to 1.
        plan: any layer's plan, for the settings that all layers share.
    """
    number = next((max(1, slots.numel() // part) for until, part in MOVING if done <= until), 0)
    order = values.flatten().argsort(stable=True).tolist()
    moved, worth = slots.flatten().tolist(), values.flatten().tolist()
    givers = [head for head in order if moved[head] - plan.buffer >= _least(plan)]
    takers = [head for head in reversed(order) if moved[head] + plan.buffer <= plan.num_cells]
    for giver, taker in list(zip(givers, takers, strict=False))[:number]:
        if worth[giver] < worth[taker]:
            moved[giver] -= plan.buffer
            moved[taker] += plan.buffer
    return torch.tensor(moved).view_as(slots)


def limit_sizes(slots: torch.Tensor, unit: int) -> torch.Tensor:
    """The slots, with at most `MAX_SIZES` different numbers in a layer and at most the same total.

    The heads of a layer are split into groups with the least squared distance from their means. Each group gets its
    mean, rounded down to a multiple of `unit`. The groups that lost most by that get what is left, `unit` a head.

    Args:
        slots: of every head, int64 `[layers, kv_heads]`, multiples of `unit`.
        unit: the eviction interval.

    Example:

        >>> limit_sizes(torch.tensor([[56, 72, 88, 104, 104, 112]]), 8)
        tensor([[ 56,  80,  80, 104, 104, 104]])
    """
    result, left, losers = slots.clone(), 0, []
    for layer, held in zip(result, slots.tolist(), strict=True):
        for heads in _nearest_groups(held):
            total = sum(held[head] for head in heads)
            layer[heads] = size = total // (unit * len(heads)) * unit
            lost = total - size * len(heads)
            left += lost
            losers.append((lost / len(heads), layer, heads))
    for lost, layer, heads in sorted(losers, key=lambda loser: -loser[0]):
        if lost and unit * len(heads) <= left:
            layer[heads] += unit
            left -= unit * len(heads)
    return result


def _nearest_groups(held: Sequence[int]) -> list[list[int]]:
    """The heads in at most `MAX_SIZES` groups whose slots are nearest to the means of the groups."""

    def distance(groups: list[list[int]]) -> float:
        numbers = [[held[head] for head in heads] for heads in groups]
        return sum(sum(number**2 for number in group) - sum(group) ** 2 / len(group) for group in numbers)

    order = sorted(range(len(held)), key=held.__getitem__)
    cuts = combinations(range(1, len(order)), min(MAX_SIZES, len(order)) - 1)
    return min(([order[a:b] for a, b in pairwise((0, *cut, len(order)))] for cut in cuts), key=distance)


def _least(plan: LayerPlan) -> int:
    """Slots that every head keeps: after an eviction, as many tokens as it evicts, besides those never evicted."""
    never_evicted = math.ceil((plan.num_recent[0] + plan.num_sinks) / plan.buffer)
    return plan.buffer * (2 + never_evicted)
