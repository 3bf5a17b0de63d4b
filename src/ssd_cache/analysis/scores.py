"""The scores behind a head map, layers by heads, and their heat map with the labels marked.

It reads a `HeadMap` and decides nothing: the scores come from `profiling`, the labels from the map.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssd_cache.analysis.plotting import WIDTH, color_map, new_figure
from ssd_cache.budget import KINDS
from ssd_cache.head_map.card import SEMANTIC, SPATIAL
from ssd_cache.head_map.head_map import HeadMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


OWN_COVERAGE = "coverage_at_own_slots"
"""Name of the score that determined the labels of a fitted map."""


@dataclass(frozen=True)
class HeadScores:
    """The labels and scores of a head map.

    Attributes:
        is_spatial: bool, `[layers, kv_heads]`.
        name: name of the score that determined the labels; None if the map has no score.
        values: that score, float32, `[layers, kv_heads]`, or None.
        threshold: heads with at least this score are spatial; None if unknown.
        others: the map's other scores by name, with the same shape.
    """

    is_spatial: torch.Tensor
    name: str | None
    values: torch.Tensor | None
    threshold: float | None
    others: dict[str, torch.Tensor]

    @property
    def all(self) -> dict[str, torch.Tensor]:
        """Every score by name: first the one that determined the labels, then the others sorted by name.

        Numbers within names are sorted by value.
        """
        first = {} if self.name is None or self.values is None else {self.name: self.values}
        return first | {name: self.others[name] for name in sorted(self.others, key=_by_number)}

    def most(self, kind: str) -> list[tuple[int, int]]:
        """All heads as (layer, head): first those of `kind` ("spatial" or "semantic"), the clearest scores first."""
        wanted = self.is_spatial if kind == "spatial" else ~self.is_spatial
        clear = torch.zeros(wanted.shape, dtype=torch.float64)
        if self.values is not None:
            clear = (self.values if kind == "spatial" else -self.values).double() * self._direction
        order = sorted(range(wanted.numel()), key=lambda i: (not wanted.flatten()[i], -clear.flatten()[i].item(), i))
        return [divmod(index, wanted.shape[1]) for index in order]

    @property
    def _direction(self) -> int:
        """1 if spatial heads have higher scores than semantic heads, -1 if lower."""
        assert self.values is not None
        if self.is_spatial.all() or not self.is_spatial.any():
            return 1
        return 1 if self.values[self.is_spatial].mean() >= self.values[~self.is_spatial].mean() else -1


def _by_number(name: str) -> list[str | int]:
    """Sort key that puts "retained_spatial-86" before "retained_spatial-115"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def head_scores(head_map: HeadMap, name: str | None = None) -> HeadScores:
    """The labels of a map and one of its scores.

    Args:
        head_map: any map that has labels.
        name: name of the score. Default: the score that determined the labels. This is the first of the following that
            exists: for a fitted map, the attention that each head retains as spatial minus as semantic, at its own
            slots; the score that gives the labels when compared with the threshold; the score named after the
            method; the first score of the map.

    Raises:
        ValueError: the map has no score of that name.
    """
    if name is None and (own := _coverage_at_own_slots(head_map)) is not None:
        return HeadScores(head_map.is_spatial, OWN_COVERAGE, own, 0.0, dict(head_map.scores))
    deciding = _deciding(head_map)
    name = deciding if name is None else name
    if name is not None and name not in head_map.scores:
        known = ", ".join(map(repr, head_map.scores)) or "none"
        raise ValueError(f"the head map ({head_map.origin}) has no score {name!r}; its scores are: {known}")
    others = {other: values for other, values in head_map.scores.items() if other != name}
    values = None if name is None else head_map.scores[name]
    threshold = head_map.threshold if name == deciding else None
    return HeadScores(head_map.is_spatial, name, values, threshold, others)


def _coverage_at_own_slots(head_map: HeadMap) -> torch.Tensor | None:
    """The score by which `fit_heads` chose the kinds.

    It is the attention retained as spatial minus as semantic, at the slots of each head. None if the labels do not
    follow from it, or if those numbers of slots were not measured.
    """
    if head_map.slots is None:
        return None
    own = torch.zeros(head_map.is_spatial.shape)
    for layer, slots in enumerate(head_map.slots):
        for head, number in enumerate(slots):
            spatial, semantic = (head_map.scores.get(f"retained_{kind}-{number}") for kind in KINDS)
            if spatial is None or semantic is None:
                return None
            own[layer, head] = spatial[layer, head] - semantic[layer, head]
    return own if torch.equal(own > 0, head_map.is_spatial) else None


def _deciding(head_map: HeadMap) -> str | None:
    """Name of the score that determined the labels. A map may have many scores, so each one is tried."""
    cut = 0.0 if head_map.threshold is None else head_map.threshold
    for name, values in head_map.scores.items():
        if torch.equal(values.double() >= cut, head_map.is_spatial):
            return name
    method = (head_map.method or "").partition(",")[0]  # removes ", score learned"
    method = "coverage" if method in ("fit", "fit by divergence") else method  # both choose kinds by coverage
    return method if method in head_map.scores else next(iter(head_map.scores), None)


def draw_scores(scores: HeadScores) -> Figure:
    """Plot layers (rows) by KV heads (columns), coloured by score.

    A dot marks a spatial head. A line on the colour bar marks the threshold.
    """
    layers, heads = scores.is_spatial.shape
    width = max(WIDTH, 1.6 + 0.22 * heads)
    figure = new_figure(max(2.2, 1.5 + layers * min(0.5, (width - 1.6) / heads)), width)
    axes = figure.add_subplot()
    if scores.values is None:
        from matplotlib.colors import ListedColormap

        axes.imshow(scores.is_spatial.numpy(), cmap=ListedColormap([SEMANTIC, SPATIAL]), vmin=0, vmax=1, aspect="auto")
    else:
        low, high, cmap = _scale(scores.values)
        image = axes.imshow(scores.values.numpy(), cmap=cmap, vmin=low, vmax=high, aspect="auto")
        bar = figure.colorbar(image, ax=axes, label=(scores.name or "").replace("_", " "))
        if scores.threshold is not None and low < scores.threshold < high:
            bar.ax.axhline(scores.threshold, color="white", linewidth=3)
            bar.ax.axhline(scores.threshold, color="black", linewidth=1.2)
            bar.ax.text(-0.25, scores.threshold, f"{scores.threshold:.3g}", ha="right", va="center", fontsize=9)
    row, column = scores.is_spatial.numpy().nonzero()
    size = max(4.0, min(60.0, 4000 / max(layers, heads) ** 2))
    dots = axes.scatter(column, row, s=size, color="white", edgecolors="black", linewidths=0.8)
    dots.set_label(f"spatial ({len(row)} of {layers * heads})")
    figure.legend(handles=[dots], loc="outside upper left", frameon=False)
    axes.set(xlabel="KV head", ylabel="layer")
    for axis, number in ((axes.xaxis, heads), (axes.yaxis, layers)):
        step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 500) if number / step <= 16)
        axis.set_ticks(range(0, number, step))
    return figure


def _scale(values: torch.Tensor):
    """Ends of the colour scale, and its colours: orange to purple around 0 if there are negative scores."""
    from matplotlib import colormaps

    low, high = values.min().item(), values.max().item()
    if low < 0:
        most = max(-low, high)
        return -most, most, colormaps["PuOr"]
    return 0.0, 1.0 if high <= 1 else high, color_map()
