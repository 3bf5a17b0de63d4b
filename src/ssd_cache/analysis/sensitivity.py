"""How much labels depend on the settings they were made with: window, threshold, slots, rows, and number of prompts.

It computes on `HeadStatistics` that were measured before, and plots the results. It measures neither attention nor the
quality of images under other labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssd_cache.analysis.plotting import new_figure
from ssd_cache.profiling.allocation import retained_attention
from ssd_cache.profiling.labels import METHODS, Method, label_agreement, label_heads
from ssd_cache.profiling.statistics import HeadStatistics, Rows, widest_window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THRESHOLDS = tuple(step / 10 for step in range(1, 10))
STYLES: dict[str, dict[str, Any]] = {
    "coverage": {"color": "#0072B2", "marker": "o", "linestyle": "-", "markersize": 8, "markerfacecolor": "none"},
    "window": {"color": "#D55E00", "marker": "s", "linestyle": "--", "markersize": 4},
}
"""Plot style of each method. Colour (from Okabe and Ito), marker and line style all differ, so that methods can be
distinguished where they overlap."""


@dataclass(frozen=True)
class Variant:
    """Labels made with one setting changed.

    Attributes:
        setting: "window", "threshold", "num_slots" or "rows", as for `label_heads`.
        value: value of that setting.
        method: "coverage" or "window".
        threshold: threshold of the labels; None for "coverage".
        num_spatial: number of heads labelled spatial.
        agreement: share of heads that get the same label from the same method with its defaults.
        retained: mean retained attention of these labels at the intended budget.
    """

    setting: str
    value: int | float | str
    method: Method
    threshold: float | None
    num_spatial: int
    agreement: float
    retained: float


def vary_labels(
    statistics: HeadStatistics,
    *,
    windows: Sequence[int] | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    methods: Sequence[Method] = METHODS,
) -> list[Variant]:
    """Label heads with one setting changed at a time and the defaults of `label_heads` for all others.

    The number of slots (the M best tokens that a semantic head may keep) takes every measured level. The rows are the
    conditional rows alone and the unconditional rows alone. Window and threshold apply to the method "window" only.

    Args:
        statistics: result of `measure_heads`, with several levels; the levels are the numbers of slots to try.
        windows: window sizes in visual tokens. Default: two tokens; and half a grid row, one, two, three and four
            rows, each plus one token.
        thresholds: values between 0 and 1.
        methods: labelling methods.
    """
    columns, widest = statistics.layout.grid[1], widest_window(statistics.layout)
    if windows is None:
        windows = sorted({2, columns // 2 + 1, *(rows * columns + 1 for rows in range(1, 5))})
        windows = [window for window in windows if window <= widest]
    changes: list[tuple[str, Sequence[Any]]] = [
        ("window", windows),
        ("threshold", thresholds),
        ("num_slots", sorted(level.num_slots for level in statistics.levels)),
    ]
    if statistics.sums["queries"][:, :, 1].any():
        changes.append(("rows", ("conditional", "unconditional")))
    found = []
    for setting, values in changes:
        by: Sequence[Method] = ("window",) if setting in ("window", "threshold") else methods
        for method in by:
            usual, _ = label_heads(statistics, method=method)
            for value in values:
                labels, threshold = label_heads(statistics, method=method, **{setting: value})
                retained = retained_attention(statistics, statistics.levels[0].num_slots, labels)
                agreement = label_agreement(labels, usual)
                found.append(Variant(setting, value, method, threshold, int(labels.sum()), agreement, retained))
    return found


def rows_agreement(statistics: HeadStatistics, method: Method) -> float:
    """Share of heads that get the same label from the conditional rows alone and from the unconditional rows alone."""
    rows: tuple[Rows, Rows] = ("conditional", "unconditional")
    return label_agreement(*(label_heads(statistics, method=method, rows=of)[0] for of in rows))


def draw_sensitivity(variants: Sequence[Variant], usual: Mapping[str, float]) -> Figure:
    """Plot agreement with the usual labels (above) and retained attention (below), by window, threshold and slots.

    Args:
        variants: from `vary_labels`.
        usual: values of "window", "threshold" and "num_slots" for the usual labels; a grey line marks each.
    """
    titles = {"window": "window W (tokens)", "threshold": "threshold \u03c4", "num_slots": "slots M"}
    figure = new_figure(4.6, 7.5)
    panels = figure.subplots(2, len(titles), sharex="col", sharey="row", squeeze=False)
    for column, (setting, title) in enumerate(titles.items()):
        for row, name in enumerate(("agreement", "retained")):
            axes = panels[row][column]
            if setting in usual:
                axes.axvline(usual[setting], color="#999999", linewidth=5, alpha=0.35, label="the usual value")
            for method in METHODS:
                chosen = [found for found in variants if (found.setting, found.method) == (setting, method)]
                if chosen:
                    _line(axes, [float(found.value) for found in chosen], [getattr(f, name) for f in chosen], method)
        panels[1][column].set_xlabel(title)
    panels[0][0].set_ylabel("agreement with\nthe usual labels")
    panels[1][0].set_ylabel("retained attention\nat the usual slots")
    panels[0][0].set_ylim(top=1.02)
    _legend(figure, panels[0][-1])
    return figure


def draw_halves(agreement: Mapping[str, Mapping[int, tuple[float, float]]]) -> Figure:
    """Plot the label agreement of two halves of the prompts against the number of prompts.

    A line shows the mean over random splits, and a dotted line the lowest split.

    Args:
        agreement: method -> result of `split_half_agreement`.
    """
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    for method, found in agreement.items():
        numbers, (means, lowest) = list(found), zip(*found.values(), strict=True)
        _line(axes, numbers, means, method)
        faint = STYLES[method] | {"linestyle": ":", "linewidth": 1, "markersize": 3}
        axes.plot(numbers, lowest, **faint, label=f"{method}, lowest draw")
    numbers = sorted({number for found in agreement.values() for number in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, map(str, numbers))
    axes.set(xlabel="prompts in both halves together", ylabel="heads labelled alike", ylim=(None, 1.02))
    _legend(figure, axes)
    return figure


def draw_maps(retained: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plot the retained attention of head maps, with one row per map and one marker per budget.

    Args:
        retained: name of the map -> name of the budget -> retained attention, averaged over heads.
    """
    budgets = list(dict.fromkeys(name for values in retained.values() for name in values))
    figure = new_figure(0.9 + 0.32 * len(retained))
    axes = figure.add_subplot()
    colors, markers = ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), "osD^"
    for index, budget in enumerate(budgets):
        values = [found.get(budget, float("nan")) for found in retained.values()]
        style: dict[str, Any] = {
            "color": colors[index % 4],
            "marker": markers[index % 4],
            "linestyle": "none",
            "label": budget,
        }
        axes.plot(values, range(len(values)), **style)
    axes.set_yticks(range(len(retained)), list(retained))
    axes.invert_yaxis()
    axes.grid(axis="y", color="#dddddd")
    axes.set_xlabel("retained attention, mean over the heads")
    _legend(figure, axes)
    return figure


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], method: str) -> None:
    axes.plot(x, y, **STYLES[method], label=method)
    axes.grid(color="#e5e5e5")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=2 if len(labels) == 4 else len(labels), frameon=False
    )
