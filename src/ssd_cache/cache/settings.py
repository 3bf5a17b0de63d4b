"""`CacheSettings`: the settings of an `SSDCache` with their defaults, checked, and resolved to a plan for each layer.

Everything here happens before anything is generated. The docstring of `SSDCache` explains the settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from ssd_cache.budget import (
    Amount,
    Budget,
    check_count,
    is_amount,
    least_slots,
    resolve_amount,
    resolve_budget,
    resolve_recent,
    scale_slots,
)
from ssd_cache.cache.plans import LayerPlan
from ssd_cache.cache.quantized import KV_DTYPES
from ssd_cache.cache.scorers import SCORES, make_scorer
from ssd_cache.cache.sharding import own_heads
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.layout import ImageLayout

DEFAULT_BUDGET = 0.2
"""The paper's budget: a fifth of the visual tokens."""

DEFAULT_RECENT = 0.25
"""Fraction of a semantic head's slots that keeps the newest tokens, whatever their score; see docs/results.md."""

SLOTS = ("fitted", "uniform")
"""How one number is shared among the heads: in the fitted proportions of the map, or equally."""


@dataclass(frozen=True)
class CacheSettings:
    """Settings of a cache, without None for a default; see `SSDCache` for their meaning.

    `slots` is "given" for a budget that is a dict or a list.
    """

    head_map: HeadMap
    budget: Budget
    slots: str
    buffer: int
    num_recent: int | float
    num_sinks: int
    score: str
    kv_dtype: str | None
    shard: tuple[int, int]

    @classmethod
    def resolve(
        cls,
        head_map: HeadMap,
        budget: Budget | None,
        *,
        slots: str | None,
        buffer: int | None,
        num_recent: int | float | None,
        num_sinks: int,
        score: str | None,
        kv_dtype: str | None,
        shard: tuple[int, int],
    ) -> CacheSettings:
        """Fill in the defaults and check each setting; raises TypeError or ValueError as `SSDCache` does."""
        if not isinstance(head_map, HeadMap):
            raise TypeError(
                f"head_map is a {type(head_map).__name__}, expected a HeadMap: HeadMap.from_pretrained(...) loads one"
            )
        slots = _choose_slots(slots, budget, head_map)
        if budget is None:
            own = None if slots == "uniform" else head_map.budget
            budget = equal_budget(head_map) if own is None else own
        if score is None:
            score = "sum" if head_map.learned is None else "learned"
        _check_score(score, head_map)
        if kv_dtype is not None:
            _check_name("kv_dtype", kv_dtype, KV_DTYPES, ", or None to store visual tokens in the model's dtype")
        return cls(
            head_map,
            budget,
            slots,
            check_count("buffer", default_buffer(head_map.layout, score) if buffer is None else buffer, 1),
            (0 if score == "learned" else DEFAULT_RECENT) if num_recent is None else num_recent,
            check_count("num_sinks", num_sinks, 0),
            score,
            kv_dtype,
            shard,
        )

    def plans(self) -> list[LayerPlan]:
        """A plan for each layer, with the heads of this shard.

        Raises:
            ValueError: a budget is out of range, or too small for the tokens that must be kept.
        """
        head_map, labels = self.head_map, self.head_map.is_spatial.tolist()
        budget, cells = self.budget, head_map.num_visual_tokens
        columns = head_map.layout.widest
        if self.slots == "fitted" and is_amount(budget):
            budget = self._fitted_slots(budget)
        num_slots = resolve_budget(budget, labels, cells)
        if head_map.is_online:
            self._check_online(num_slots)
        plans = [
            LayerPlan(
                layer_idx=index,
                is_spatial=tuple(labels[index]),
                num_slots=num_slots[index],
                num_cells=cells,
                buffer=self.buffer,
                num_recent=tuple(resolve_recent(self.num_recent, held) for held in num_slots[index]),
                num_sinks=self.num_sinks,
                scorer=make_scorer(self.score, columns, head_map.learned and head_map.learned.at(index)),
                is_online=head_map.is_online,
                kv_dtype=self.kv_dtype,
            )
            for index in range(head_map.num_layers)
        ]
        _check_plans(plans, columns)
        return [plan.shard(own_heads(head_map, self.shard)) for plan in plans]

    def _fitted_slots(self, budget: Amount) -> list[tuple[int, ...]]:
        """The map's own slots scaled to this mean, with room in every head for the tokens that it must keep."""
        head_map, cells = self.head_map, self.head_map.num_visual_tokens
        least = {
            is_spatial: least_slots(is_spatial, self.buffer, self.num_recent, self.num_sinks, cells)
            for is_spatial in (True, False)
        }
        least_of = [[least[is_spatial] for is_spatial in layer] for layer in head_map.is_spatial.tolist()]
        assert head_map.slots is not None
        return scale_slots(head_map.slots, resolve_amount("budget", budget, cells), least_of, cells)

    def _check_online(self, slots: list[tuple[int, ...]]) -> None:
        """Refuse budgets by kind or by head for an online map, whose heads have no kind yet."""
        head_map = self.head_map
        swapped = resolve_budget(self.budget, (~head_map.is_spatial).tolist(), head_map.num_visual_tokens)
        if swapped != slots or any(len(set(layer)) > 1 for layer in slots):
            raise ValueError(
                f"budget={self.budget!r} gives heads of one layer different numbers of slots: an online map does not "
                "know yet which head is which, so give one number, or a list with one for each layer"
            )


def equal_budget(head_map: HeadMap) -> Amount:
    """The mean of the map's own slots, as an equal budget for every head; 0.2 for a map that carries none."""
    slots = [number for layer in head_map.slots or () for number in layer]
    return max(1, round(sum(slots) / len(slots))) if slots else DEFAULT_BUDGET


def default_buffer(layout: ImageLayout, score: str) -> int:
    """Default eviction interval: a row for a score computed from queries, a third of a row for a learned score."""
    columns = layout.grid[1]
    return max(1, columns // 3) if score == "learned" else columns


def _choose_slots(slots: str | None, budget: Budget | None, head_map: HeadMap) -> str:
    if slots is not None:
        _check_name("slots", slots, SLOTS)
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


def _check_name(setting: str, name: object, known: Iterable[str], otherwise: str = "") -> None:
    known = list(known)
    if not isinstance(name, str) or name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{setting}={name!r} is unknown: {hint}give one of {', '.join(map(repr, known))}{otherwise}")


def _check_score(score: str, head_map: HeadMap) -> None:
    _check_name("score", score, SCORES)
    if score == "learned" and head_map.learned is None:
        raise ValueError(
            f"score='learned': the head map ({head_map.origin}) carries no learned score; `ssd-cache learn` makes a "
            "map with one, or give score='sum', 'mean' or 'last'"
        )
    if score == "margin" and head_map.is_online:
        raise ValueError(
            "score='margin' looks at no attention, by which an online map labels its heads: give a map with labels, or "
            "score='sum', 'mean' or 'last'"
        )
    if score == "margin" and head_map.layout.draft_grids:
        raise ValueError(
            "score='margin' needs the columns of a single grid, but this head map has draft grids of other widths: "
            "give score='sum', 'mean' or 'last'"
        )


def _check_plans(plans: list[LayerPlan], columns: int) -> None:
    """Refuse budgets too small for the tokens that must be kept; warn if a window misses the token right above."""
    short = None
    for plan in plans:
        for kind, num_slots, num_recent in sorted(set(zip(plan.kinds, plan.num_slots, plan.num_recent, strict=True))):
            if num_slots >= plan.num_cells:
                continue  # nothing is evicted within an image
            room = {"buffer": plan.buffer, "num_recent": num_recent, "num_sinks": plan.num_sinks}
            if kind == "spatial":
                del room["num_recent"]
            if num_slots < sum(room.values()):
                asked = [f"{name}={value}" for name, value in room.items() if value]
                raise ValueError(
                    f"the budget gives a {kind} head of layer {plan.layer_idx} {num_slots} slots, fewer than "
                    f"{' and '.join(asked)} together: raise the budget, or lower "
                    f"{' or '.join(name for name, value in room.items() if value)}"
                )
            window = num_slots - plan.buffer - plan.num_sinks + 1
            if kind == "spatial" and window < columns + 2:
                short = min(window, short or window)
    if short is not None:
        warnings.warn(
            f"after an eviction a spatial head holds its last {short} visual tokens, fewer than a grid row and two "
            f"({columns + 2}): it cannot see the token right above. Raise the budget, or lower buffer or num_sinks.",
            stacklevel=4,
        )
