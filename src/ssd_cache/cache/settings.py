"""`CacheSettings`: the settings of an `SSDCache`, checked, and resolved to a plan for each layer.

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
from ssd_cache.cache.scorers import SCORES, make_scorer
from ssd_cache.cache.sharding import own_heads
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.kernels.eight_bits import KV_DTYPES
from ssd_cache.layout import ImageLayout

DEFAULT_BUDGET = 0.2
"""The paper's budget: a fifth of the visual tokens."""

SLOTS = ("fitted", "uniform")
"""How one number is shared among the heads: in the fitted proportions of the map, or equally."""


@dataclass(frozen=True)
class CacheSettings:
    """Settings of a cache, without None for a default; see `SSDCache` for their meaning.

    `slots` is "given" for a budget that is a dict or a list.

    Raises:
        ValueError: a setting is out of range or unknown, or does not fit the map.
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

    def __post_init__(self) -> None:
        check_count("buffer", self.buffer, 1)
        check_count("num_sinks", self.num_sinks, 0)
        if self.kv_dtype is not None:
            _check_name("kv_dtype", self.kv_dtype, KV_DTYPES, ", or None to store visual tokens in the model's dtype")
        _check_name("score", self.score, SCORES)
        others = "give score='sum', 'mean' or 'last'"
        if self.score == "learned" and self.head_map.learned is None:
            raise ValueError(
                f"score='learned': the head map ({self.head_map.origin}) carries no learned score; `ssd-cache learn` "
                f"makes a map with one, or {others}"
            )
        if self.score == "margin" and self.head_map.layout.draft_grids:
            raise ValueError(
                "score='margin' needs the columns of a single grid, but this head map has draft grids of other "
                f"widths: {others}"
            )

    def plans(self) -> list[LayerPlan]:
        """A plan for each layer, with the heads of this shard.

        Raises:
            ValueError: a budget is out of range, or too small for the tokens that must be kept.
        """
        head_map, windows = self.head_map, self.head_map.window_heads(self.score).tolist()
        budget, cells = self.budget, head_map.num_visual_tokens
        if self.slots == "fitted" and is_amount(budget):
            budget = self._fitted_slots(budget, windows)
        num_slots = resolve_budget(budget, head_map.is_spatial.tolist(), cells)
        self._check_room(windows, num_slots)
        own, learned = own_heads(head_map, self.shard), head_map.learned
        return [
            LayerPlan(
                layer_idx=index,
                is_spatial=tuple(windows[index][own]),
                num_slots=num_slots[index][own],
                num_cells=cells,
                buffer=self.buffer,
                num_recent=tuple(resolve_recent(self.num_recent, held) for held in num_slots[index][own]),
                num_sinks=self.num_sinks,
                scorer=make_scorer(self.score, head_map.layout.widest, learned and learned.at(index)).at(own),
                kv_dtype=self.kv_dtype,
            )
            for index in range(head_map.num_layers)
        ]

    def _fitted_slots(self, budget: Amount, windows: list[list[bool]]) -> list[tuple[int, ...]]:
        """The map's own slots scaled to this mean, with room in every head for the tokens that it must keep."""
        head_map, cells = self.head_map, self.head_map.num_visual_tokens
        least = {
            is_spatial: least_slots(is_spatial, self.buffer, self.num_recent, self.num_sinks, cells)
            for is_spatial in (True, False)
        }
        least_of = [[least[is_spatial] for is_spatial in layer] for layer in windows]
        assert head_map.slots is not None
        return scale_slots(head_map.slots, resolve_amount("budget", budget, cells), least_of, cells)

    def _check_room(self, is_window: list[list[bool]], num_slots: list[tuple[int, ...]]) -> None:
        """Refuse slots too few for the tokens that must be kept; warn if a window misses the token right above."""
        columns, windows = self.head_map.layout.widest, []
        for layer_idx, heads in enumerate(zip(is_window, num_slots, strict=True)):
            for is_spatial, held in sorted(set(zip(*heads, strict=True))):
                num_recent = resolve_recent(self.num_recent, held)
                if held >= self.head_map.num_visual_tokens:
                    continue  # nothing is evicted within an image
                room = {"buffer": self.buffer, "num_recent": num_recent, "num_sinks": self.num_sinks}
                if is_spatial:
                    del room["num_recent"]
                room = {name: value for name, value in room.items() if value}
                if held < sum(room.values()):
                    raise ValueError(
                        f"the budget gives a {'spatial' if is_spatial else 'semantic'} head of layer {layer_idx} "
                        f"{held} slots, fewer than {' and '.join(f'{name}={value}' for name, value in room.items())} "
                        f"together: raise the budget, or lower {' or '.join(room)}"
                    )
                if is_spatial:
                    windows.append(held - self.buffer - self.num_sinks + 1)
        if windows and min(windows) < columns + 2:
            warnings.warn(
                f"after an eviction a spatial head holds its last {min(windows)} visual tokens, fewer than a grid row "
                f"and two ({columns + 2}): it cannot see the token right above. Raise the budget, or lower buffer or "
                "num_sinks.",
                stacklevel=4,
            )


def choose_slots(slots: str | None, budget: Budget | None, head_map: HeadMap) -> str:
    """How one number is shared among the heads, by default; "given" if the budget gives each head its own.

    Raises:
        ValueError: unknown slots, slots beside such a budget, or "fitted" slots of a map that carries none.
    """
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


def equal_budget(head_map: HeadMap) -> Amount:
    """The mean of the map's own slots, as an equal budget for every head; 0.2 for a map that carries none."""
    slots = [number for layer in head_map.slots or () for number in layer]
    return max(1, round(sum(slots) / len(slots))) if slots else DEFAULT_BUDGET


def default_buffer(layout: ImageLayout, score: str) -> int:
    """Default eviction interval: a row, or a third of a row for the scores that do not wait for a window of queries."""
    columns = layout.grid[1]
    return max(1, columns // 3) if score in ("learned", "leverage") else columns


def default_recent(layout: ImageLayout, score: str) -> int | float:
    """Default `num_recent`: a quarter of the slots for a score by attention; see docs/experiments.md.

    A learned score needs none. Leverage does not know that most heads attend to the token right above: it gets a
    row and four tokens.
    """
    return {"learned": 0, "leverage": layout.widest + 4}.get(score, 0.25)


def _check_name(setting: str, name: object, known: Iterable[str], otherwise: str = "") -> None:
    known = list(known)
    if not isinstance(name, str) or name not in known:
        near = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{setting}={name!r} is unknown: {hint}give one of {', '.join(map(repr, known))}{otherwise}")
