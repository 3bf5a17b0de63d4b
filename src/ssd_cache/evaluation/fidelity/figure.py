"""Plots fidelity in one figure: divergence and agreement by grid row, divergence by budget, a heat map of the heads.

It measures nothing. Colours distinguish policies, line styles the budgets of one policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ssd_cache.analysis.plotting import WIDTH, color_map, new_figure, plain_label
from ssd_cache.evaluation.fidelity.result import Fidelity
from ssd_cache.evaluation.plots import COLORS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
LOWEST_KL = 1e-8
"""Lower limit of the KL axis, in nats: smaller values are negligible and would take most of the axis."""


def draw_fidelity(results: Mapping[str, Fidelity]) -> Figure:
    """Plot curves over grid rows, over the budget where there are several, and the first cache's retained mass by head.

    Args:
        results: by name; the text before the last space of a name is the policy: "ssd 20%" and "ssd 50%" are two
            budgets of one policy.
    """
    policies: dict[str, list[str]] = {}
    for name in results:
        policies.setdefault(name.rpartition(" ")[0] or name, []).append(name)
    styles = {
        name: {"color": COLORS[policy % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}
        for policy, names in enumerate(policies.values())
        for index, name in enumerate(names)
    }
    first = next(iter(results))
    layout, (layers, heads) = results[first].layout, results[first].is_spatial.shape
    several = max(map(len, policies.values())) > 1
    heights = [2.2, 2.0, *([2.2] if several else []), 1.0 + min(4.0, max(1.2, (WIDTH - 1.4) * layers / heads))]
    figure = new_figure(sum(heights) + 0.4 + 0.2 * -(-len(results) // 2))
    panels = figure.subplots(len(heights), height_ratios=heights)
    for axes, title in zip(panels, ("KL(full || compressed), nats", "same token likeliest, share"), strict=False):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("row of the preview, then of the picture" if layout.draft_grids else "grid row")
        axes.set_xlim(0, len(layout.row_lengths) - 1)
        for end in accumulate(rows for rows, _ in layout.draft_grids):
            axes.axvline(end - 0.5, color="0.7", linestyle=":")
    lowest = 0.99
    for order, (name, result) in enumerate(results.items()):
        agreement = result.by_grid_row(result.agrees.T).mean(1)
        lowest = min(lowest, agreement.min().item())
        width = 1.5 if len(results) <= 8 else 1.0
        style = {**styles[name], "linewidth": width, "zorder": 3 - order / len(results)}  # the first is drawn on top
        panels[0].plot(positive(result.by_grid_row(result.kl.T).mean(1)), label=plain_label(name), **style)
        panels[1].plot(agreement, **style)
    panels[0].set_yscale("log")
    low, high = panels[0].get_ylim()
    if high > 10 * LOWEST_KL:
        panels[0].set_ylim(max(LOWEST_KL, low), high)
    panels[1].set_ylim(1 - 1.05 * (1 - lowest), 1 + 0.05 * (1 - lowest))
    if several:
        _draw_by_budget(panels[2], results, policies)
    _draw_heads(figure, panels[-1], first, results[first])
    for axes in panels[:-1]:
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9, handlelength=3)
    return figure


def positive(values: torch.Tensor) -> torch.Tensor:
    """Values for a logarithmic axis: NaN in place of zeros."""
    return torch.where(values > 0, values, torch.nan)


def _draw_by_budget(axes: Axes, results: Mapping[str, Fidelity], policies: Mapping[str, list[str]]) -> None:
    for index, names in enumerate(policies.values()):
        found = sorted((results[name].budget, results[name].mean_kl) for name in names)
        shares = [100 * budget for budget, _ in found]
        axes.plot(
            shares,
            positive(torch.tensor([kl for _, kl in found])),
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
        )
    shares = sorted({round(100 * result.budget, 1) for result in results.values()})
    if len(shares) <= 8:
        axes.set_xticks(shares, [f"{share:.2g}" for share in shares])
    axes.set_xlim(0, 1.04 * shares[-1])
    axes.set_yscale("log")
    axes.set_title("KL by budget, mean over the picture", fontsize=10, loc="left")
    axes.set_xlabel("budget: slots of a head, in % of the grid")


def _draw_heads(figure: Figure, axes: Axes, name: str, result: Fidelity) -> None:
    """Layers by KV heads; a dot marks a head with the spatial rule."""
    retained = result.retained_by_head
    low = min(0.95, int(retained.min() * 20) / 20)
    image = axes.imshow(retained.numpy(), cmap=color_map(), vmin=low, vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes)
    row, column = result.is_spatial.numpy().nonzero()
    size = max(4.0, min(60.0, 4000 / max(retained.shape) ** 2))
    axes.scatter(column, row, s=size, color="white", edgecolors="black", linewidths=0.8)
    title = f"{plain_label(name)}: the full cache's attention\non what a head holds (dot: spatial)"
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel="KV head", ylabel="layer")
    for axis, number in ((axes.xaxis, retained.shape[1]), (axes.yaxis, retained.shape[0])):
        step = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 500) if number / step <= 16)
        axis.set_ticks(range(0, number, step))
