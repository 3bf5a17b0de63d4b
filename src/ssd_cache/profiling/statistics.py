"""Profiling statistics of each head: sums over visual queries, and shares that are computed from the sums.

The sums are float64 and add up over batches, processes and interrupted runs. Every share is defined here, with its
formula. `profiling/observing.py` collects the sums from a model; `profiling/labels.py` labels heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ssd_cache.budget import Amount, check_count, least_slots, resolve_amount, resolve_recent
from ssd_cache.cache.eviction import slot_of
from ssd_cache.layout import ImageLayout

Rows = Literal["all", "conditional", "unconditional"]
BRANCHES = {"all": slice(0, 2), "conditional": slice(0, 1), "unconditional": slice(1, 2)}


@dataclass(frozen=True)
class Level:
    """A cache whose retention is simulated: `SSDCache`'s settings, resolved to tokens."""

    num_slots: int
    buffer: int
    num_recent: int
    num_sinks: int = 0

    def evicts_at(self, token: int) -> bool:
        """Whether `buffer` tokens are evicted when visual token `token`, counted from 0, arrives."""
        return token >= self.num_slots and (token - self.num_slots) % self.buffer == 0

    def oldest(self, token: int) -> int:
        """The oldest token, sinks excepted, that a spatial head holds at the query of `token >= num_slots`."""
        num_held = slot_of(token, self.num_slots, self.buffer) + 1
        return token + 1 - (num_held - self.num_sinks)


def resolve_levels(
    layout: ImageLayout,
    budget: Amount = 0.2,
    levels: Sequence[Amount] | None = None,
    *,
    buffer: int | None = None,
    num_recent: Amount = 0.25,
    num_sinks: int = 0,
) -> tuple[Level, ...]:
    """Resolve levels: the intended budget first, then those of `levels` by size; settings as for `SSDCache`.

    If a level is a fraction and gives fewer slots than a cache needs with these settings, it is raised to the minimum
    of a cache, with a warning. The same fractions therefore work for every grid.

    Raises:
        ValueError: a setting out of range, or a budget or count that `SSDCache` would refuse.
    """
    cells = layout.num_tokens
    buffer = layout.grid[1] if buffer is None else check_count("buffer", buffer, 1)
    check_count("num_sinks", num_sinks, 0)
    least = min(cells, least_slots(False, buffer, num_recent, num_sinks, cells))
    first, others = resolve_amount("budget", budget, cells), set()
    for amount in levels or ():
        slots = resolve_amount("levels", amount, cells)
        if isinstance(amount, float) and slots < least:
            warnings.warn(
                f"level {amount:g} is {slots} slots, and a cache with buffer={buffer}, num_recent={num_recent} and "
                f"num_sinks={num_sinks} holds at least {least}: {least} slots are measured instead",
                stacklevel=2,
            )
            slots = least
        others.add(slots)
    resolved = []
    for slots in (first, *sorted(others - {first})):
        recent = resolve_recent(num_recent, slots)
        if slots < least:
            raise ValueError(
                f"{slots} slots are fewer than buffer={buffer} and num_recent={recent} and num_sinks={num_sinks} "
                f"together: give at least {least}, or lower the others"
            )
        resolved.append(Level(slots, min(buffer, slots), recent, num_sinks))
    return tuple(resolved)


def widest_window(layout: ImageLayout) -> int:
    """The widest window, in visual tokens, whose mass can be computed and is not always 1.

    After draft grids, the window must stay inside the image for all counted queries, because only the total attention
    on draft grids is stored.
    """
    rows, columns = layout.grid
    return min(2, rows - 1) * columns + 1 if layout.draft_grids else rows * columns - 1


class HeadStatistics:
    """Sums over the visual queries of generated images, for every layer and KV head.

    `a[t, j]` is the softmax weight from the query of visual token `t` to visual token `j <= t`, both counted from 0.
    `p[t]` is the weight on the prompt, so `p[t] + sum(a[t, j] for j) = 1`. A sum over queries runs over the query heads
    of the KV head, over the batch rows that `rows=` names (guidance's conditional or unconditional rows, or all), and
    over one of these sets of queries:

    - the *counted* queries, for shares and offsets: from the third grid row on, `t >= 2 * columns` (from the last row
      on in a grid of fewer rows), because in earlier rows every token is near. With draft grids, only the image's own
      queries count, from its own third row on: rows of another width have other offsets, and draft tokens have none;
    - the *evicting* queries, for retained attention: `t >= num_slots`, because earlier queries see every token.

    Args:
        layout: the grids of an image; `t` and `j` count the tokens of draft grids too.
        num_layers: the model's decoder layers.
        num_kv_heads: KV heads in each layer.
        levels: caches whose retention is simulated; labels are made for the first.

    Attributes:
        sums: by name, `[layers, kv_heads, 2, ...]`, float64; conditional rows, then unconditional rows.
        num_images: number of images observed.
        run: the settings of the run that measured them, as JSON values, for a head map's profile.
    """

    def __init__(self, layout: ImageLayout, num_layers: int, num_kv_heads: int, levels: Sequence[Level]):
        self.layout, self.levels, self.num_images = layout, tuple(levels), 0
        self.run: dict[str, Any] = {}
        self._arguments = layout, num_layers, num_kv_heads, self.levels
        shapes: dict[str, tuple[int, ...]] = {"offsets": (layout.grid[0], 2 * layout.grid[1] - 1)}
        shapes |= dict.fromkeys(("queries", "prompt", "margin", *(("previews",) if layout.draft_grids else ())), ())
        shapes |= dict.fromkeys(("evicting", "spatial", "semantic"), (len(self.levels),))
        self.sums = {
            name: torch.zeros(num_layers, num_kv_heads, 2, *shape, dtype=torch.float64)
            for name, shape in shapes.items()
        }

    @property
    def num_pictures(self) -> int:
        """Deprecated name of `num_images`."""
        warnings.warn("HeadStatistics.num_pictures is now num_images", FutureWarning, stacklevel=2)
        return self.num_images

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of an image, draft grids included."""
        return self.layout.num_tokens

    def offset_share(self, rows: Rows = "all") -> torch.Tensor:
        """Visual attention by relative position, `[layers, kv_heads, grid rows, 2 * columns - 1]`.

        Entry `[u, d + columns - 1]` is `sum(a[t, j]) / sum(a[t, :])` over the tokens `j` that lie `u` grid rows above
        `t` and `d` columns to its right: "right above" is `[1, columns - 1]`. All entries add up to 1 minus the share
        of attention on draft grids.
        """
        return _ratio(self._sum("offsets", rows), self._visual(rows)[..., None, None])

    def window_mass(self, window: int, rows: Rows = "all") -> torch.Tensor:
        """`sum(a[t, j] for j > t - window) / sum(a[t, :])`, the share of the last `window` tokens, `t` included.

        `[layers, kv_heads]`. If the window is wider than two grid rows, some counted queries see nothing outside it.
        With draft grids, a window above `widest_window` raises ValueError.
        """
        height, columns = self.layout.grid
        check_count("window", window, 1)
        if self.layout.draft_grids and window > (widest := widest_window(self.layout)):
            raise ValueError(f"window={window} reaches into the draft grid for some queries: give at most {widest}")
        up, right = torch.arange(height)[:, None], torch.arange(1 - columns, columns)
        near = up * columns - right < window  # t - j, the distance
        return (self.offset_share(rows) * near).sum((-1, -2))

    def prompt_share(self, rows: Rows = "all") -> torch.Tensor:
        """Mean of `p[t]` over the counted queries, `[layers, kv_heads]`."""
        return _ratio(self._sum("prompt", rows), self._sum("queries", rows))

    def margin_share(self, rows: Rows = "all") -> torch.Tensor:
        """Share of visual attention on the first and last column of the grid, `[layers, kv_heads]`."""
        return _ratio(self._sum("margin", rows), self._visual(rows))

    def retained(
        self, kind: Literal["spatial", "semantic"], num_slots: int | None = None, rows: Rows = "all"
    ) -> torch.Tensor:
        """Mean of `p[t] + sum(a[t, j] for j kept)` over the evicting queries, `[layers, kv_heads]`.

        `kept` are the tokens that a head of this kind would hold at `t` with a level's slots, buffer, recents and
        sinks. The simulation follows the rules of docs/concepts.md exactly, token by token. A semantic head's scores
        use the softmax over the prompt and the tokens it still holds, as the cache would compute it from these queries
        and keys. The result is 1 if no query is late enough for an eviction.
        """
        slots = [level.num_slots for level in self.levels]
        if num_slots is not None and num_slots not in slots:
            raise ValueError(
                f"num_slots={num_slots} was not measured: give one of {slots}, or measure with more levels"
            )
        level = 0 if num_slots is None else slots.index(num_slots)
        return _ratio(self._sum(kind, rows)[..., level], self._sum("evicting", rows)[..., level], empty=1.0)

    def _sum(self, name: str, rows: Rows) -> torch.Tensor:
        if rows not in BRANCHES:
            raise ValueError(f"rows={rows!r}: give one of {', '.join(map(repr, BRANCHES))}")
        if self.num_images and not self.sums["queries"][:, :, BRANCHES[rows]].any():
            raise ValueError(f"rows={rows!r}: this model has no such rows; give 'all'")
        return self.sums[name][:, :, BRANCHES[rows]].sum(2)

    def _visual(self, rows: Rows) -> torch.Tensor:
        """Total attention of the counted queries on visual tokens, draft grids included."""
        visual = self._sum("offsets", rows).sum((-1, -2))
        return visual + self._sum("previews", rows) if self.layout.draft_grids else visual

    def __add__(self, other: HeadStatistics) -> HeadStatistics:
        """The combined statistics of two runs."""
        if self._arguments != other._arguments:
            raise ValueError(f"statistics of {self._arguments} and of {other._arguments} do not add up")
        total = self.empty()
        total.num_images = self.num_images + other.num_images
        total.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return total

    def empty(self) -> HeadStatistics:
        """New statistics with the same arguments and no images."""
        return HeadStatistics(*self._arguments)


def _ratio(part: torch.Tensor, whole: torch.Tensor, empty: float = 0.0) -> torch.Tensor:
    """`part / whole`, or `empty` where `whole` is 0: a head may put no weight on visual tokens."""
    return torch.where(whole > 0, part / whole, empty)
