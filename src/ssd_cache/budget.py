"""From what a user asks for (a fraction, a count, one for each kind or layer) to slots, with every bad value refused.

Plain numbers in, plain numbers out: no tensors, no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

KINDS = ("spatial", "semantic")

Amount = int | float
Budget = Amount | Mapping[str, Amount] | Sequence[Amount | Mapping[str, Amount]]


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


def resolve_budget(budget: Budget, num_layers: int, num_cells: int) -> list[dict[str, int]]:
    """Slots of a spatial and of a semantic head, for every layer.

    Args:
        budget: a float or int; or `{"spatial": ..., "semantic": ...}`; or a list of either, one entry a layer.

    Raises:
        ValueError: out of range, an unknown kind, or a list of another length.
    """
    if isinstance(budget, Sequence) and not isinstance(budget, str):
        if len(budget) != num_layers:
            raise ValueError(
                f"budget has {len(budget)} entries, but the head map has {num_layers} layers: give one a layer"
            )
        return [resolve_budget(entry, 1, num_cells)[0] for entry in budget]
    if isinstance(budget, Mapping):
        if set(budget) != set(KINDS):
            raise ValueError(f"budget={dict(budget)!r}: give both kinds, as {{'spatial': 0.1, 'semantic': 0.3}}")
        slots = {kind: resolve_amount(f"budget[{kind!r}]", budget[kind], num_cells) for kind in KINDS}
    else:
        slots = dict.fromkeys(KINDS, resolve_amount("budget", budget, num_cells))
    return [dict(slots) for _ in range(num_layers)]


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
