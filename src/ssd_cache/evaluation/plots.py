"""Plots the result against the budget, one line per policy, with 95% bands.

The output is a figure as PNG. `tables.py` computes the plotted values.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ssd_cache.analysis.plotting import new_figure, plain_label, to_png

if TYPE_CHECKING:
    from ssd_cache.evaluation.tables import Row, Summary

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#332288")
"""Distinguishable with any colour vision; most are from Okabe and Ito (2008)."""

MARKERS, LINES = "osD^vPX*p", ("-", ":", "-.")
"""Nine markers against eight colours, and a new line style for every eight policies, keep many policies distinct."""


def plot_result_by_budget(summary: Summary) -> bytes:
    """The plot as PNG; raises ImportError with the remedy where matplotlib is not installed."""
    by_policy: dict[str, list[Row]] = {}
    for row in summary.rows:
        by_policy.setdefault(row.policy, []).append(row)
    full = by_policy.pop("full", [])
    figure = new_figure(height=3.6 + 0.11 * len(by_policy), width=7.0)
    axes = figure.add_subplot()
    for row in full:
        axes.axhspan(*_band(row), color="black", alpha=0.10, linewidth=0)
        axes.axhline(row.overall, color="black", linestyle="--", linewidth=1.2, label="full")
    for number, (policy, rows) in enumerate(by_policy.items()):
        shares, overall = [100 * row.share for row in rows], [row.overall for row in rows]
        color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
        line = LINES[number // len(COLORS) % len(LINES)]
        lows, highs = zip(*map(_band, rows), strict=True)
        axes.plot(
            shares, overall, line, label=plain_label(policy), color=color, marker=marker, markersize=5, linewidth=1.5
        )
        if len(rows) > 1:
            axes.fill_between(shares, lows, highs, color=color, alpha=0.13, linewidth=0)
        else:
            axes.vlines(shares, lows, highs, color=color, linewidth=1.5)
    shares = sorted({100 * row.share for rows in by_policy.values() for row in rows}) or [100.0]
    axes.set_xscale("log")  # small budgets lie close together, and policies differ most there
    axes.minorticks_off()
    if len(shares) <= 10:
        axes.set_xticks(shares, [f"{share:.3g}" for share in shares])
    axes.set_xlim(shares[0] * 0.93, shares[-1] * 1.07)
    axes.set_xlabel("budget: visual tokens a head may hold, in % of the grid")
    axes.set_ylabel("share of correct images,\nmean of the kinds of captions")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title="bands: 95%", alignment="left"
    )
    return to_png(figure)


def _band(row: Row) -> tuple[float, float]:
    """The 95% interval: 1.96 standard errors on each side; no band with one prompt per kind."""
    half = 0.0 if math.isnan(row.standard_error) else 1.96 * row.standard_error
    return max(0.0, row.overall - half), min(1.0, row.overall + half)
