"""From what a user asks for (a fraction, a count, one for each kind or layer) to slots, with every bad value refused.

Plain numbers in, plain numbers out: no tensors, no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

KINDS = ("spatial", "semantic")

Amount = int | float
Budget = Amount | Mapping[str, Amount] | Sequence[Amount | Mapping[str, Amount] | Sequence[Amount]]


def resolve_amount(name: str, amount: Amount, num_cells: int) -> int:
    """Slots for a budget: `round(amount * num_cells)` for a float in (0, 1], the number itself for an int from 1 up.

    Raises:
        ValueError: anything else.
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1:
        return amount
    if isinstance(amount, float) and 0 < amount <= 1 and round(amount * num_cells) >= 1:
        return round(amount * num_cells)
    raise ValueError(
        f"{name}={amount!r} is out of range: give a float in (0, 1], the fraction of the grid's {num_cells} visual "
        "tokens that a head holds, or an int of at least 1, the tokens themselves"
    )


def resolve_budget(budget: Budget, is_spatial: Sequence[Sequence[bool]], num_cells: int) -> list[tuple[int, ...]]:
    """Slots of every KV head, layer by layer.

    Args:
        budget: a float or int; or `{"spatial": ..., "semantic": ...}`; or a list with an entry for each layer, which is
            one of these or a list with a number for each KV head.
        is_spatial: the labels, `[layers][kv_heads]`.
        num_cells: visual tokens of the grid.

    Raises:
        ValueError: out of range, an unknown kind, or a list of another length.
    """
    if not _is_list(budget):
        return [_resolve_layer(budget, "budget", labels, num_cells) for labels in is_spatial]
    if len(budget) != len(is_spatial):
        raise ValueError(
            f"budget has {len(budget)} entries, but the head map has {len(is_spatial)} layers: give one a layer"
        )
    return [
        _resolve_layer(entry, f"budget[{layer}]", labels, num_cells)
        for layer, (entry, labels) in enumerate(zip(budget, is_spatial, strict=True))
    ]


def _is_list(budget) -> TypeGuard[Sequence[Any]]:
    return isinstance(budget, Sequence) and not isinstance(budget, str)


def _resolve_layer(budget, name: str, labels: Sequence[bool], num_cells: int) -> tuple[int, ...]:
    if _is_list(budget):
        if len(budget) != len(labels):
            raise ValueError(
                f"{name} has {len(budget)} entries, but the layer has {len(labels)} KV heads: give one a head"
            )
        return tuple(resolve_amount(f"{name}[{head}]", amount, num_cells) for head, amount in enumerate(budget))
    if isinstance(budget, Mapping):
        if set(budget) != set(KINDS):
            raise ValueError(f"{name}={dict(budget)!r}: give both kinds, as {{'spatial': 0.1, 'semantic': 0.3}}")
        slots = {kind: resolve_amount(f"{name}[{kind!r}]", budget[kind], num_cells) for kind in KINDS}
        return tuple(slots["spatial" if spatial else "semantic"] for spatial in labels)
    return (resolve_amount(name, budget, num_cells),) * len(labels)


def resolve_recent(num_recent: Amount, num_slots: int) -> int:
    """Tokens for `num_recent`: a float in [0, 1) is a fraction of a semantic head's slots, an int counts tokens.

    Raises:
        ValueError: anything else.
    """
    if isinstance(num_recent, int) and not isinstance(num_recent, bool) and num_recent >= 0:
        return num_recent
    if isinstance(num_recent, float) and 0 <= num_recent < 1:
        return int(num_recent * num_slots)
    raise ValueError(
        f"num_recent={num_recent!r} is out of range: give an int of at least 0, or a float in [0, 1), a fraction of "
        "the slots"
    )


def check_count(name: str, value: int, least: int) -> int:
    """The value, when it is an int of at least `least`.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is out of range: give an int of at least {least}")
    return value
