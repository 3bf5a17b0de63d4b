"""Slots that move between heads while the score is learned, to the heads for which a further slot lowers the loss most.

All slots are multiples of the eviction interval, so all heads of a layer evict at the same steps. `trainer.py` measures
the value of a slot: how much one more would lower the loss. `learning_state.py` stores slots and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ssd_cache.budget import round_slots
from ssd_cache.cache.plans import LayerPlan

MOVE_STEPS = 20
"""Steps over which the values are added up before slots move."""

MOVING = ((0.4, 6), (0.75, 12))
"""Until this part of the steps is done, one head in so many gets slots in each move. In the last quarter none move."""


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


def _least(plan: LayerPlan) -> int:
    """Slots that every head keeps: after an eviction, as many tokens as it evicts, besides those never evicted."""
    never_evicted = math.ceil((plan.num_recent[0] + plan.num_sinks) / plan.buffer)
    return plan.buffer * (2 + never_evicted)
