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


def lowest(ranks: torch.Tensor, spared: torch.Tensor, num_evict: int) -> torch.Tensor:
    """The tokens to drop, `[..., num_evict]`: the lowest `ranks` first, and of equal ranks the older token.

    `ranks` are `[..., tokens]`, in the order of arrival. Tokens in the mask `spared` are not dropped.
    """
    # stable: of equal ranks the older one comes first
    return ranks.masked_fill(spared, torch.inf).argsort(dim=-1, stable=True)[..., :num_evict]


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
        spared = is_spared(positions[:, :num_semantic], num_seen, num_recent, num_sinks)
        chosen = lowest(scores.gather(-1, by_age), spared.gather(-1, by_age), num_evict)
        victims.append(by_age.gather(-1, chosen))
    if num_semantic < positions.shape[1]:
        # every row and every spatial head holds the same tokens, in the same slots
        age = positions[0, num_semantic]
        oldest = torch.where(age < num_sinks, num_seen, age).argsort()[:num_evict]
        victims.append(oldest.expand(positions.shape[0], positions.shape[1] - num_semantic, num_evict))
    return torch.cat(victims, 1).sort(-1).values


def compact(tensors: list[torch.Tensor], victims: torch.Tensor) -> None:
    """Move the survivors in the last `num_evict` slots into the victims' slots before them; no other row is touched.

    Args:
        tensors: each `[batch, heads, slots]` or `[batch, heads, slots, head_dim]`, changed in place; `heads` may be
            fewer than `kv_heads`, and are then the first ones.
        victims: `[batch, kv_heads, num_evict]`, in ascending order (see `select_victims`).
    """
    num_slots, num_evict = tensors[0].shape[2], victims.shape[-1]
    first_free = num_slots - num_evict
    # The tail's survivors come first, in order. There are as many of them as victims before the tail, and the victims
    # are sorted, so the pairs match. The remaining pairs copy dead rows onto dead rows.
    is_dead = torch.zeros(*victims.shape[:2], num_slots, dtype=torch.bool, device=victims.device)
    is_dead.scatter_(2, victims, True)
    sources = is_dead[..., first_free:].to(torch.uint8).argsort(dim=-1, stable=True) + first_free
    rows, heads = (torch.arange(size, device=victims.device) for size in victims.shape[:2])
    for tensor in tensors:
        first = slice(tensor.shape[1])
        places = rows[:, None, None], heads[None, first, None]
        tensor[*places, victims[:, first]] = tensor[*places, sources[:, first]]
