"""The statistics behind a head map's labels, layers by heads, and their heat map with the labels marked.

It reads a `HeadMap` and decides nothing: the statistics come from `profiling`, the labels from the map.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssd_cache.analysis.plotting import WIDTH, color_map, mark_spatial, new_figure
from ssd_cache.head_map.head_map import HeadMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class HeadScores:
    """The labels of a head map and the statistics behind them.

    Attributes:
        is_spatial: bool, `[layers, kv_heads]`.
        name: name of the statistic by which the heads were labelled; None if the map has no statistics.
        threshold: heads with at least this value are spatial; None if unknown.
        all: every statistic by name, float32 `[layers, kv_heads]`; that of `name` comes first.
    """

    is_spatial: torch.Tensor
    name: str | None
    threshold: float | None
    all: dict[str, torch.Tensor]

    @property
    def values(self) -> torch.Tensor | None:
        """The statistic by which the heads were labelled."""
        return None if self.name is None else self.all[self.name]


def head_scores(head_map: HeadMap) -> HeadScores:
    """The labels of a map and its statistics; `name` is the statistic by which the map's method labelled the heads.

    `fit_heads` labels by the coverage at each head's own slots; "coverage" is that at the profiled budget.
    """
    name: str | None = "window_mass" if (head_map.method or "").startswith("window") else "coverage"
    if name not in head_map.scores:
        name = min(head_map.scores, default=None)

    def order(other: str) -> tuple[bool, list[str | int]]:  # puts "retained_spatial-86" before "retained_spatial-115"
        return other != name, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", other)]

    scores = {other: head_map.scores[other] for other in sorted(head_map.scores, key=order)}
    return HeadScores(head_map.is_spatial, name, head_map.threshold, scores)


def choose_heads(scores: HeadScores) -> tuple[tuple[int, int], ...]:
    """The most spatial and the most semantic head.

    If the map has the statistic "prompt", heads with more than half of their attention on the prompt come last within
    their kind. They attend too little to the image to illustrate a kind.
    """
    is_spatial, zeros = scores.is_spatial, torch.zeros(scores.is_spatial.shape)
    on_prompt = scores.all.get("prompt", zeros) > 0.5
    values = zeros if scores.values is None else scores.values.double()
    heads = [divmod(index, is_spatial.shape[1]) for index in range(is_spatial.numel())]
    spatial = min(heads, key=lambda head: (not is_spatial[head], on_prompt[head].item(), -values[head].item()))
    semantic = min(heads, key=lambda head: (bool(is_spatial[head]), on_prompt[head].item(), values[head].item()))
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
        bar.ax.axhline(scores.threshold, color="red", linewidth=2)
    mark_spatial(axes, scores.is_spatial)
    figure.legend(loc="outside upper left", frameon=False)
    return figure
