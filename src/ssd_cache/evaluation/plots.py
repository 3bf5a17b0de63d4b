"""Plots the result against the budget, one line per policy, with 95% bands.

The output is a figure as PNG. The numbers come from `tables.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ssd_cache.analysis.plotting import new_figure, plain_label, to_png
from ssd_cache.evaluation.tables import FULL, Row, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#332288")
"""Distinguishable with any colour vision; most are from Okabe and Ito (2008)."""

MARKERS, LINES = "osD^vPX*p", ("-", ":", "-.")
"""Nine markers against eight colours, and a new line style for every eight policies, keep many policies distinct."""

BAND = 1.96
"""Half-width of the band in standard errors: 95%."""


def draw_score_by_budget(summary: Summary) -> bytes:
    """The plot as PNG; raises ImportError with the remedy where matplotlib is not installed."""
    policies = list(dict.fromkeys(row.policy for row in summary.rows if row.policy != FULL))
    figure = new_figure(height=3.6 + 0.11 * len(policies), width=7.0)
    axes = figure.add_subplot()
    for row in summary.rows:
        if row.policy == FULL:
            low, high = _band(row)
            axes.axhspan(low, high, color="black", alpha=0.10, linewidth=0)
            axes.axhline(row.score.overall, color="black", linestyle="--", linewidth=1.2, label=FULL)
    for number, policy in enumerate(policies):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        style["linestyle"] = LINES[number // len(COLORS) % len(LINES)]
        _draw_policy(axes, [row for row in summary.rows if row.policy == policy], style)
    shares = sorted({100 * row.share for row in summary.rows if row.policy != FULL}) or [100.0]
    axes.set_xscale("log")  # small budgets lie close together, and policies differ most there
    axes.minorticks_off()
    if len(shares) <= 10:
        axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    axes.set_xlim(shares[0] * 0.93, shares[-1] * 1.07)
    axes.set_xlabel("budget: visual tokens a head may hold, in % of the grid")
    axes.set_ylabel("share of correct pictures,\nmean of the six kinds")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title="bands: 95%", alignment="left"
    )
    return to_png(figure)


def _draw_policy(axes: Axes, rows: list[Row], style: dict[str, Any]) -> None:
    shares, scores = [100 * row.share for row in rows], [row.score.overall for row in rows]
    lows, highs = zip(*map(_band, rows), strict=True)
    axes.plot(shares, scores, label=plain_label(rows[0].policy), markersize=5, linewidth=1.5, **style)
    if len(rows) > 1:
        axes.fill_between(shares, lows, highs, color=style["color"], alpha=0.13, linewidth=0)
    else:
        axes.vlines(shares, lows, highs, color=style["color"], linewidth=1.5)


def _band(row: Row) -> tuple[float, float]:
    error = 0.0 if math.isnan(row.score.standard_error) else row.score.standard_error  # one prompt per kind: no band
    middle, half = row.score.overall, BAND * error
    return max(0.0, middle - half), min(1.0, middle + half)
