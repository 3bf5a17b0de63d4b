"""The eviction rule: spare the tokens that must stay, drop the lowest ranks, move the survivors. No state.

docs/concepts.md has the rules, after SSD (Jian and Wang, arXiv 2510.18716): a spatial head keeps its newest tokens, a
semantic head those with the highest score. The cache, the simulation of profiling and the training of learned scores
all call this module. `scorers.py` computes the ranks.
"""

from __future__ import annotations

import torch


def slot_of(number, num_slots, buffer):
    """The slot of visual token `number`: slots fill in order; when all are taken, the last `buffer` are filled again.

    `num_slots` and `buffer` are ints, or tensors of one shape, and `number` an int or a tensor that broadcasts.

    >>> [slot_of(number, num_slots=5, buffer=2) for number in range(9)]
    [0, 1, 2, 3, 4, 3, 4, 3, 4]
    """
    refilled = num_slots - buffer + (number - num_slots) % buffer  # at least `number` until the slots are full
    return refilled.clamp(max=number) if isinstance(refilled, torch.Tensor) else min(refilled, number)


def is_spared(positions: torch.Tensor, num_seen: int, num_recent: int, num_sinks: int) -> torch.Tensor:
    """Which tokens a semantic head may not drop: the `num_recent` newest of `num_seen`, and the first `num_sinks`.

    `positions` are indices of visual tokens, from 0, in any shape.
    """
    return (positions >= num_seen - num_recent) | (positions < num_sinks)


def lowest(ranks: torch.Tensor, spared: torch.Tensor | None, num_evict: int) -> torch.Tensor:
    """The tokens to drop, `[..., num_evict]`: the lowest `ranks` first, and of equal ranks the older token.

    `ranks` are `[..., tokens]`, in the order of arrival. Tokens in the mask `spared` are not dropped.
    """
    if spared is not None:
        ranks = ranks.masked_fill(spared, torch.inf)
    # stable: of equal ranks the older one comes first
    return ranks.argsort(dim=-1, stable=True)[..., :num_evict]


def select_victims(
    positions: torch.Tensor,
    scores: torch.Tensor | None,
    num_evict: int,
    num_seen: int,
    num_recent: int = 0,
    num_sinks: int = 0,
) -> torch.Tensor:
    """Slots to empty in every head: the lowest scores in semantic heads, the oldest tokens in spatial heads.

    Every head keeps the first `num_sinks` tokens of the image; a semantic head also keeps its `num_recent` newest.
    docs/concepts.md has a worked example.

    Args:
        positions: `[batch, kv_heads, slots]`, number of the visual token in each slot, counted from 0; all are taken.
        scores: `[batch, semantic_heads, slots]`, float32, from a scorer's `rank`, of the first heads; the others are
            spatial. None if no head is semantic.
        num_evict: tokens to drop from each head.
        num_seen: number of visual tokens seen so far, without the one that needs a slot.

    Returns:
        `[batch, kv_heads, num_evict]`, slots in ascending order.
    """
    num_semantic = 0 if scores is None else scores.shape[1]
    victims = []
    if scores is not None and num_semantic:
        by_age = positions[:, :num_semantic].argsort(-1)
        spared = None
        if num_recent or num_sinks:
            spared = is_spared(positions[:, :num_semantic].gather(-1, by_age), num_seen, num_recent, num_sinks)
        victims.append(by_age.gather(-1, lowest(scores.gather(-1, by_age), spared, num_evict)))
    if num_semantic < positions.shape[1]:
        # every row and every spatial head holds the same tokens, in the same slots
        age = positions[0, num_semantic]
        oldest = torch.where(age < num_sinks, num_seen, age).argsort()[:num_evict]
        victims.append(oldest.expand(positions.shape[0], positions.shape[1] - num_semantic, num_evict))
    chosen = victims[0] if len(victims) == 1 else torch.cat(victims, 1)
    return chosen.sort(-1).values


def compact(tensors: list[torch.Tensor], victims: torch.Tensor) -> None:
    """Move the survivors in the last `num_evict` slots into the victims' slots before them; no other row is touched.

    Args:
        tensors: each `[batch, kv_heads, slots, head_dim]`, or `[batch, heads, slots]` of the first `heads` heads;
            changed in place.
        victims: `[batch, kv_heads, num_evict]`, in ascending order (see `select_victims`).
    """
    num_slots, num_evict = tensors[0].shape[2], victims.shape[-1]
    first_free = num_slots - num_evict
    # The tail's survivors come first, in order. There are as many of them as victims before the tail, and the victims
    # are sorted, so the pairs match. The remaining pairs copy dead rows onto dead rows.
    is_dead = victims.new_zeros(*victims.shape[:2], num_slots, dtype=torch.uint8).scatter_(2, victims, 1)
    sources = is_dead[..., first_free:].argsort(dim=-1, stable=True) + first_free
    heads = torch.arange(victims.shape[0] * victims.shape[1], device=victims.device)[:, None]
    old, new = (heads, sources.flatten(0, 1)), (heads, victims.flatten(0, 1))
    for tensor in tensors:
        if tensor.dim() == 4:  # whole rows, of all heads
            rows = tensor.view(-1, *tensor.shape[2:])
            rows[new] = rows[old]
        elif num_heads := tensor.shape[1]:
            tensor.scatter_(2, victims[:, :num_heads], tensor.gather(2, sources[:, :num_heads]))
