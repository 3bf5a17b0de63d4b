"""The plot of a run: milliseconds per step along the image, and tokens per second against the batch size.

It uses only a report. Both axes of the speed plot are logarithmic, so that equal ratios look equal.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ssd_cache.analysis.plotting import new_figure, plain_label, to_png
from ssd_cache.bench.results import Report, Row
from ssd_cache.evaluation.plots import COLORS, LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_RANGE = 4.0
"""Minimum ratio of top to bottom of a logarithmic axis; on a shorter axis, noise looks like a difference."""

BIN = 24
"""Steps averaged into one point of a curve: Janus's eviction interval, so that each point contains one eviction."""


def draw_report(report: Report) -> bytes:
    """Plot a report as PNG; raises ImportError with the remedy if matplotlib is not installed."""
    batches = list(dict.fromkeys(row.batch_size for row in report.rows))
    rows = [row for row in report.rows if row.failure is None]
    names = list(dict.fromkeys(row.cache for row in rows))
    styles = {name: _style(number) for number, name in enumerate(names)}
    figure = new_figure(height=3.4 + 0.24 * ((len(names) + 1) // 2), width=5.0 * (1 + (len(batches) > 1)))
    panels = figure.subplots(1, 2 if len(batches) > 1 else 1, squeeze=False)[0]
    _draw_steps(panels[0], [row for row in rows if row.batch_size == batches[-1]], styles)
    panels[0].set_title(f"batch {batches[-1]}", fontsize=10)
    if len(batches) > 1:
        _draw_speeds(panels[1], rows, styles)
        _, _, of_picture = report.conditions["guidance"].rpartition(", ")  # for example "two rows a picture"
        panels[1].set_xlabel(f"pictures at once ({of_picture})")
        panels[1].set_xticks(batches, [str(batch) for batch in batches])
    handles = {handle.get_label(): handle for panel in panels for handle in panel.get_lines()}
    figure.legend(
        [handles[name] for name in names if name in handles],
        [name for name in names if name in handles],
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    return to_png(figure)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLORS) % len(LINES)],
        "markersize": 4,
        "linewidth": 1.3,
    }


def _draw_steps(axes: Axes, rows: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    for row in rows:
        points = [_mean(part) for part in _parts(row.curve)]
        axes.plot(*zip(*points, strict=True), label=plain_label(row.cache), **styles[row.cache])
    axes.set_yscale("log")
    axes.set_xlabel("visual token")
    axes.set_ylabel(f"ms a step (means of {BIN} steps)")
    _tidy(axes)


def _parts(curve: list[tuple[int, float]]) -> list[list[tuple[int, float]]]:
    """Split the curve into parts of `BIN` steps; no part crosses a gap between stretches."""
    parts: list[list[tuple[int, float]]] = [curve[:1]]
    for before, point in pairwise(curve):
        if point[0] > before[0] + 1 or len(parts[-1]) == BIN:
            parts.append([])
        parts[-1].append(point)
    return [part for part in parts if len(part) > BIN // 2] or parts


def _mean(part: list[tuple[int, float]]) -> tuple[float, float]:
    positions, milliseconds = zip(*part, strict=True)
    return statistics.mean(positions), statistics.mean(milliseconds)


def _draw_speeds(axes: Axes, rows: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    for name, style in styles.items():
        of_cache = [row for row in rows if row.cache == name]
        batches = [row.batch_size for row in of_cache]
        axes.plot(batches, [row.tokens_per_second for row in of_cache], label=plain_label(name), **style)
        axes.vlines(batches, [row.slowest for row in of_cache], [row.fastest for row in of_cache], color=style["color"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylabel("visual tokens per second")
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    low, high = axes.get_ylim()
    widen = max(1.0, LEAST_RANGE * low / high) ** 0.5
    axes.set_ylim(low / widen, high * widen)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
