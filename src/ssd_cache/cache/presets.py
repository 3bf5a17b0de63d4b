"""Default settings that come with a head map, and the named policies.

By default, `SSDCache(head_map)` uses the map's slots and its learned score. A named policy is a map and some settings.
This module makes no caches (`cache.py` does) and parses no names with settings in them, such as `ssd:buffer=8`
(`evaluation/policies.py` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from ssd_cache.budget import Amount, Budget, is_amount, least_slots, resolve_amount, scale_slots
from ssd_cache.head_map.head_map import HeadMap

DEFAULT_BUDGET = 0.2
"""The paper's budget: a fifth of the visual tokens."""

SLOTS = ("fitted", "uniform")
"""How one number is shared among the heads: in the fitted proportions of the map, or equally."""

POLICIES = ("full", "ssd", "learned", "h2o", "streaming-llm", "linear", "margin")
"""Names that `SSDCache.from_policy` accepts."""

SCORE_WORDS = {
    "sum": "attention sum",
    "mean": "attention mean",
    "last": "attention of the last queries",
    "margin": "margin columns",
    "learned": "learned score",
}


def equal_budget(head_map: HeadMap) -> Amount:
    """The mean of the map's own slots, as an equal budget for every head; 0.2 for a map that carries none."""
    slots = [number for layer in head_map.slots or () for number in layer]
    return max(1, round(sum(slots) / len(slots))) if slots else DEFAULT_BUDGET


def choose_slots(slots: str | None, budget: Budget | None, head_map: HeadMap) -> str:
    """How the slots are chosen: one of `SLOTS`, or "given" for a dict or a list.

    Raises:
        ValueError: an unknown name, "fitted" for a map without slots, or a name together with a dict or a list.
    """
    if slots is not None and slots not in SLOTS:
        near = get_close_matches(str(slots), SLOTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"slots={slots!r} is unknown: {hint}give one of {', '.join(map(repr, SLOTS))}")
    if budget is not None and not is_amount(budget):
        if slots is not None:
            raise ValueError(
                f"slots={slots!r} says how one number is shared among the heads, but budget={budget!r} gives each its "
                "own: leave slots out, or give one number"
            )
        return "given"
    if slots == "fitted" and head_map.budget is None:
        raise ValueError(
            f"slots='fitted': the head map ({head_map.origin}) carries no slots; fit_heads or `ssd-cache fit` makes a "
            "map with them, and without slots= every head gets the same number"
        )
    return slots or ("uniform" if head_map.budget is None else "fitted")


def fitted_slots(
    head_map: HeadMap, budget: Amount, buffer: int, num_recent: int | float, num_sinks: int
) -> list[tuple[int, ...]]:
    """The map's own slots scaled to this mean, with room in every head for the tokens that it must keep."""
    cells = head_map.num_visual_tokens
    least = {kind: least_slots(kind, buffer, num_recent, num_sinks, cells) for kind in (True, False)}
    least_of = [[least[is_spatial] for is_spatial in layer] for layer in head_map.is_spatial.tolist()]
    assert head_map.slots is not None
    return scale_slots(head_map.slots, resolve_amount("budget", budget, cells), least_of, cells)


def preset(policy: str, head_map: HeadMap, budget: Budget | None) -> tuple[HeadMap, Budget | None, dict[str, Any]]:
    """Map, budget and settings of a named policy, as arguments of `SSDCache`; see `SSDCache.from_policy`.

    Raises:
        ValueError: an unknown name.
    """

    def uniform(kind: Literal["spatial", "semantic"]) -> HeadMap:
        of_kind = HeadMap.uniform(kind, num_layers=head_map.num_layers, num_kv_heads=head_map.num_kv_heads)
        return of_kind.with_layout(head_map.layout)

    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; the policies are {', '.join(POLICIES)}")
    equal = {"slots": "uniform"} if budget is None or is_amount(budget) else {}
    settings: dict[str, dict[str, Any]] = {
        "h2o": {"num_recent": 0.5},
        "streaming-llm": {"num_sinks": 4},
        "ssd": {"score": "sum", **equal},
        "learned": {"score": "learned"},
        "linear": {"score": "last", "num_sinks": 4, "num_recent": head_map.grid[1]},
        "margin": {"score": "margin", **equal},
    }
    if policy == "full":
        budget = 1.0
    elif policy in ("h2o", "linear", "streaming-llm"):
        budget = equal_budget(head_map) if budget is None else budget
        head_map = uniform("spatial" if policy == "streaming-llm" else "semantic")
    return head_map, budget, settings.get(policy, {})


def own_policy(head_map: HeadMap, *, slots: str | None = None, score: str | None = None) -> tuple[str, dict[str, str]]:
    """Name of the policy that `SSDCache(head_map)` applies, and the settings to add to it.

    Args:
        head_map: any map.
        slots: slots to use instead of the map's own.
        score: score to use instead of the map's own; the returned settings do not contain it.

    Example: a map that was fitted, and carries no learned score.

        >>> import torch
        >>> own_policy(HeadMap(torch.tensor([[True, False]]), budget=[[60, 170]]))
        ('ssd', {'slots': 'fitted'})
    """
    own = "uniform" if head_map.budget is None else "fitted"
    is_learned = head_map.learned is not None if score is None else score == "learned"
    name, usual = ("learned", own) if is_learned else ("ssd", "uniform")
    slots = own if slots is None else slots
    return name, {} if slots == usual else {"slots": slots}


def policy_label(name: str, settings: Mapping[str, Any]) -> str:
    """Format a policy's name and its settings, sorted by name: `ssd:buffer=8,slots=fitted`."""
    text = ",".join(f"{key}={settings[key]}" for key in sorted(settings))
    return f"{name}:{text}" if text else name


def words_of(slots: str, score: str) -> str:
    """Describe slots and score in words: "fitted slots, learned score"."""
    return f"{'equal' if slots == 'uniform' else slots} slots, {SCORE_WORDS[score]}"
