"""The statistics behind a head map's labels, layers by heads, and their heat map with the labels marked.

It reads a `HeadMap` and decides nothing: the statistics come from `profiling`, the labels from the map.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssd_cache.analysis.plotting import WIDTH, color_map, mark_spatial, new_figure
from ssd_cache.budget import KINDS
from ssd_cache.head_map.head_map import HeadMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


OWN_COVERAGE = "coverage_at_own_slots"
"""Name of the statistic that determined the labels of a fitted map."""


@dataclass(frozen=True)
class HeadScores:
    """The labels of a head map and the statistics behind them.

    Attributes:
        is_spatial: bool, `[layers, kv_heads]`.
        name: name of the statistic that determined the labels; None if the map has no statistics.
        values: that statistic, float32, `[layers, kv_heads]`, or None.
        threshold: heads with at least this value are spatial; None if unknown.
        others: the map's other statistics by name, with the same shape.
    """

    is_spatial: torch.Tensor
    name: str | None
    values: torch.Tensor | None
    threshold: float | None
    others: dict[str, torch.Tensor]

    @property
    def all(self) -> dict[str, torch.Tensor]:
        """Every statistic: first the one that determined the labels, then the others by name and number."""

        def by_number(name: str) -> list[str | int]:  # puts "retained_spatial-86" before "retained_spatial-115"
            return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

        first = {} if self.name is None or self.values is None else {self.name: self.values}
        return first | {name: self.others[name] for name in sorted(self.others, key=by_number)}


def head_scores(head_map: HeadMap) -> HeadScores:
    """The labels of a map, and the statistics behind them.

    The statistic that determined the labels is the first of the following that exists: for a fitted map, the attention
    that each head retains as spatial minus as semantic, at its own slots; the statistic that gives the labels when
    compared with the threshold; the one named after the method; the first one of the map.
    """
    own = _coverage_at_own_slots(head_map)
    if own is not None:
        return HeadScores(head_map.is_spatial, OWN_COVERAGE, own, 0.0, dict(head_map.scores))
    others = dict(head_map.scores)
    name = _deciding(head_map)
    values = None if name is None else others.pop(name)
    return HeadScores(head_map.is_spatial, name, values, head_map.threshold, others)


def _coverage_at_own_slots(head_map: HeadMap) -> torch.Tensor | None:
    """The statistic by which `fit_heads` chose the kinds; None if it does not give the labels, or was not measured."""
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
    """Name of the statistic that determined the labels. A map may have many, so each one is tried."""
    cut = 0.0 if head_map.threshold is None else head_map.threshold
    for name, values in head_map.scores.items():
        if torch.equal(values.double() >= cut, head_map.is_spatial):
            return name
    method = (head_map.method or "").partition(",")[0]  # removes ", score learned"
    method = "coverage" if method in ("fit", "fit by divergence") else method  # both choose kinds by coverage
    return method if method in head_map.scores else next(iter(head_map.scores), None)


def choose_heads(scores: HeadScores, wanted: tuple[int, int] | None = None) -> tuple[tuple[int, int], ...]:
    """The most spatial and the most semantic head; `wanted` replaces the one of its own kind.

    If the map has the statistic "prompt", heads with more than half of their attention on the prompt come last within
    their kind. They attend too little to the image to illustrate a kind.
    """
    is_spatial, zeros = scores.is_spatial, torch.zeros(scores.is_spatial.shape)
    on_prompt = scores.all.get("prompt", zeros) > 0.5
    values = zeros if scores.values is None else scores.values.double()
    if values[is_spatial].mean() < values[~is_spatial].mean():  # spatial heads are those with low values
        values = -values
    heads = [divmod(index, is_spatial.shape[1]) for index in range(is_spatial.numel())]
    spatial = min(heads, key=lambda head: (not is_spatial[head], on_prompt[head].item(), -values[head].item()))
    semantic = min(heads, key=lambda head: (bool(is_spatial[head]), on_prompt[head].item(), values[head].item()))
    if wanted is not None:
        spatial, semantic = (wanted, semantic) if is_spatial[wanted] else (spatial, wanted)
    return tuple(dict.fromkeys((spatial, semantic)))


def plot_scores(scores: HeadScores, name: str | None = None) -> Figure:
    """Plot layers (rows) by KV heads (columns), coloured by the statistic `name`, or by the one behind the labels.

    A dot marks a spatial head. A line on the colour bar marks the threshold.
    """
    layers, heads = scores.is_spatial.shape
    name = scores.name if name is None else name
    values = scores.is_spatial if name is None else scores.all[name]  # a map without statistics still has labels
    width = max(WIDTH, 1.6 + 0.22 * heads)
    figure = new_figure(max(2.2, 1.5 + layers * min(0.5, (width - 1.6) / heads)), width)
    axes = figure.add_subplot()
    low, high = min(0.0, values.min().item()), values.max().item()
    image = axes.imshow(values.numpy(), cmap=color_map(), vmin=low, vmax=high, aspect="auto")
    bar = figure.colorbar(image, ax=axes, label=(name or "spatial").replace("_", " "))
    if name == scores.name and scores.threshold is not None and low < scores.threshold < high:
        bar.ax.axhline(scores.threshold, color="white", linewidth=3)
        bar.ax.axhline(scores.threshold, color="black", linewidth=1.2)
    mark_spatial(axes, scores.is_spatial)
    figure.legend(loc="outside upper left", frameon=False)
    return figure
