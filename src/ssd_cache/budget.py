"""Resolve a budget to slots, refuse invalid values, and scale the slots that a head map was fitted to.

All functions take and return Python numbers, lists and dicts; they use no tensors and keep no state.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

KINDS = ("spatial", "semantic")

Amount = int | float
Budget = Amount | Mapping[str, Amount] | Sequence[Amount | Mapping[str, Amount] | Sequence[Amount]]


def is_amount(budget: object) -> TypeGuard[Amount]:
    """Whether a budget is one number (in range or not), and not a dict, a list or a string."""
    return isinstance(budget, int | float) and not isinstance(budget, bool)


def resolve_amount(name: str, amount: Amount, num_cells: int) -> int:
    """Slots for a budget: `round(amount * num_cells)` for a float in (0, 1], the number itself for an int >= 1."""
    if isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1:
        return amount
    if isinstance(amount, float) and 0 < amount <= 1 and round(amount * num_cells) >= 1:
        return round(amount * num_cells)
    raise ValueError(
        f"{name}={amount!r} is out of range: give a float in (0, 1], the fraction of the grid's {num_cells} visual "
        "tokens that a head holds, or an int of at least 1, the tokens themselves"
    )


def resolve_budget(budget: Budget, is_spatial: Sequence[Sequence[bool]], num_cells: int) -> list[tuple[int, ...]]:
    """Slots of every KV head, layer by layer; raises ValueError for an invalid budget.

    Args:
        budget: a float or int; or `{"spatial": ..., "semantic": ...}`; or a list with an entry for each layer, which is
            one of these or a list with a number for each KV head.
        is_spatial: the labels, `[layers][kv_heads]`.
        num_cells: visual tokens of the grid.
    """

    def of_layer(entry: Any, name: str, labels: Sequence[bool]) -> tuple[int, ...]:
        if _is_list(entry):
            _check_length(name, entry, len(labels), "the layer", "KV heads", "head")
            return tuple(resolve_amount(f"{name}[{head}]", amount, num_cells) for head, amount in enumerate(entry))
        if not isinstance(entry, Mapping):
            return (resolve_amount(name, entry, num_cells),) * len(labels)
        if set(entry) != set(KINDS):
            raise ValueError(f"{name}={dict(entry)!r}: give both kinds, as {{'spatial': 0.1, 'semantic': 0.3}}")
        slots = {kind: resolve_amount(f"{name}[{kind!r}]", entry[kind], num_cells) for kind in KINDS}
        return tuple(slots["spatial" if spatial else "semantic"] for spatial in labels)

    if not _is_list(budget):
        return [of_layer(budget, "budget", labels) for labels in is_spatial]
    _check_length("budget", budget, len(is_spatial), "the head map", "layers", "layer")
    return [of_layer(budget[layer], f"budget[{layer}]", labels) for layer, labels in enumerate(is_spatial)]


def _is_list(budget: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(budget, Sequence) and not isinstance(budget, str)


def _check_length(name: str, entries: Sequence, number: int, owner: str, parts: str, part: str) -> None:
    if len(entries) != number:
        raise ValueError(f"{name} has {len(entries)} entries, but {owner} has {number} {parts}: give one a {part}")


def scale_slots(
    slots: Sequence[Sequence[int]], num_slots: int, least: Sequence[Sequence[int]], num_cells: int
) -> list[tuple[int, ...]]:
    """Scale a map's own slots to a mean of `num_slots` per head.

    If the mean of `slots`, rounded, is `num_slots`, the total is kept and the result is `slots` itself. Otherwise the
    total is exactly `num_slots` times the number of heads:

    - A larger total is shared in the proportions of `slots` (largest remainder; of equal remainders the earlier head
      gets the slot).
    - For a smaller total the largest heads are cut to a common limit, and the others keep their slots. A head that was
      fitted few slots needs all of them; a head with many loses little when it loses the last ones
      (docs/experiments.md).

    No head gets more slots than the grid has cells. No head gets fewer than its `least`, unless the total is too small.

    Example: four heads with 60 slots on average.

        >>> own, least = [(100, 25), (75, 40)], [(5, 5), (5, 5)]
        >>> scale_slots(own, 40, least, 576), scale_slots(own, 120, least, 576)
        ([(48, 25), (47, 40)], [(200, 50), (150, 80)])
    """
    flat = [number for layer in slots for number in layer]
    bounds = [min(number, num_cells) for layer in least for number in layer]
    total = min(num_slots, num_cells) * len(flat)
    if abs(num_slots * len(flat) - sum(flat)) * 2 <= len(flat):
        total = sum(flat)
    if sum(bounds) > total:
        bounds = [1] * len(flat)
    share = _grow if total > sum(flat) else _cut
    shared = iter(share(flat, total, bounds, num_cells))
    return [tuple(next(shared) for _ in layer) for layer in slots]


def round_slots(slots: Sequence[Sequence[int]], unit: int, least: int, num_cells: int) -> list[tuple[int, ...]]:
    """Slots as multiples of `unit`, in the proportions of `slots`; the total is rounded down.

    No head gets fewer than `least`, a multiple of `unit` for which the total is enough, nor more than the grid's cells.

    >>> round_slots([(31, 9), (20, 12)], 8, 8, 576)
    [(32, 8), (24, 8)]
    """
    flat, most = [number for layer in slots for number in layer], num_cells // unit
    total = min(sum(flat) // unit, len(flat) * most)
    shared = iter(_grow(flat, total, [least // unit] * len(flat), most))
    return [tuple(unit * next(shared) for _ in layer) for layer in slots]


def least_slots(is_spatial: bool, buffer: int, num_recent: Amount, num_sinks: int, num_cells: int) -> int:
    """Minimum slots of a head of this kind: `buffer` and the tokens it must keep; at most the number of grid cells."""
    if is_spatial:
        return min(buffer + num_sinks, num_cells)
    slots = buffer + num_sinks
    while slots < num_cells and slots < buffer + num_sinks + resolve_recent(num_recent, slots):
        slots += 1
    return slots


def scale_counts(budget: Budget, before: int, after: int) -> Budget:
    """Scale a budget to a grid with another number of cells: fractions stay, counts change in proportion.

    >>> scale_counts([{"spatial": 20, "semantic": 0.5}, [10, 576]], 576, 288)
    [{'spatial': 10, 'semantic': 0.5}, [5, 288]]
    """
    if isinstance(budget, Mapping):
        return {kind: scale_counts(amount, before, after) for kind, amount in budget.items()}  # type: ignore[misc]
    if _is_list(budget):
        return [scale_counts(entry, before, after) for entry in budget]  # type: ignore[misc]
    return max(1, round(budget * after / before)) if isinstance(budget, int) else budget


def _cut(slots: Sequence[int], total: int, least: Sequence[int], most: int) -> list[int]:
    """Cut the largest entries of `slots` to a common limit so that all add up to `total`.

    No entry gets less than its `least`, nor more than `most`, the number of grid cells.
    """

    def limited(limit: int) -> list[int]:
        return [max(bound, min(number, limit)) for number, bound in zip(slots, least, strict=True)]

    limit = bisect_right(range(1, most + 1), total, key=lambda limit: sum(limited(limit)))
    shares, above = limited(limit), limited(limit + 1)
    rest = total - sum(shares)
    for index, (share, more) in enumerate(zip(shares, above, strict=True)):
        if rest and more > share:
            shares[index], rest = more, rest - 1
    return shares


def _grow(weights: Sequence[int], total: int, least: Sequence[int], most: int) -> list[int]:
    """Integers in the proportions of `weights`, each between its `least` and `most`, that add up to `total`.

    Heads out of bounds are set to their bound and the rest is shared again, until all are within bounds.
    """
    fixed: dict[int, int] = {}
    while True:
        free = [index for index in range(len(weights)) if index not in fixed]
        room, weight = total - sum(fixed.values()), sum(weights[index] for index in free)
        wanted = {index: weights[index] * room for index in free}  # multiplied by `weight`, to stay in integers
        low = {index: least[index] for index in free if wanted[index] < least[index] * weight}
        high = {index: most for index in free if wanted[index] > most * weight}
        if not low and not high:
            break
        short = sum(least[index] * weight - wanted[index] for index in low)
        over = sum(wanted[index] - most * weight for index in high)
        fixed |= (low if short >= over else {}) | (high if over >= short else {})
    shares = fixed | {index: wanted[index] // weight for index in free}
    by_remainder = sorted(free, key=lambda index: -(wanted[index] % weight))  # stable: ties go to the earlier head
    for index in by_remainder[: total - sum(shares.values())]:
        shares[index] += 1
    return [shares[index] for index in range(len(weights))]


def resolve_recent(num_recent: Amount, num_slots: int) -> int:
    """Tokens for `num_recent`: a float in [0, 1) is a fraction of a semantic head's slots, an int counts tokens."""
    if isinstance(num_recent, int) and not isinstance(num_recent, bool) and num_recent >= 0:
        return num_recent
    if isinstance(num_recent, float) and 0 <= num_recent < 1:
        return int(num_recent * num_slots)
    raise ValueError(
        f"num_recent={num_recent!r} is out of range: give an int of at least 0, or a float in [0, 1), a fraction of "
        "the slots"
    )


def check_count(name: str, value: int, least: int) -> int:
    """The value, if it is an int of at least `least`; raises ValueError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is out of range: give an int of at least {least}")
    return value
