"""Label heads as spatial or semantic from `HeadStatistics`.

The same statistics can be labelled again by another method, window, threshold or measured level (slots per head)
without generating images. `profiling/allocation.py` allocates slots.
"""

from __future__ import annotations

from typing import Literal

import torch

from ssd_cache.layout import ImageLayout
from ssd_cache.profiling.statistics import HeadStatistics, Rows, widest_window

Method = Literal["coverage", "window"]
METHODS: tuple[Method, ...] = ("coverage", "window")

TOLERANCE = 1e-6
"""Smaller differences of retained attention count as equal, because the softmax weights are float32."""


def label_heads(
    statistics: HeadStatistics,
    *,
    method: Method = "coverage",
    num_slots: int | None = None,
    window: int | None = None,
    threshold: float | None = None,
    rows: Rows = "all",
) -> tuple[torch.Tensor, float | None]:
    """Label every head.

    - "coverage": a head is spatial if `retained("spatial")` is more than `retained("semantic")`; a tie, up to rounding,
      is semantic. This measures the effect of the cache on the head; its only setting is the budget of the cache.
    - "window": a head is spatial if `window_mass(window)` is at least `threshold`. The default threshold is the one
      whose labels retain the most attention, summed over the heads: in the order of window mass, it lies midway between
      the two neighbours that have the greatest sum of `retained("spatial") - retained("semantic")` above them.

    Args:
        statistics: measured by `measure_heads`.
        method: "coverage" or "window".
        num_slots: the level of the retained attention; the intended budget when not given.
        window: visual tokens that count as near. The default is one grid row plus one, which includes "right above".
        threshold: between 0 and 1, for "window".
        rows: "all", or only guidance's "conditional" or "unconditional" rows.

    Returns:
        Labels, boolean `[layers, kv_heads]`, True means spatial; and the threshold, None for "coverage".

    Raises:
        ValueError: an unknown method, a level that was not measured, a window or threshold out of range.
    """
    check_labelling(statistics.layout, method, window, threshold)
    gain = statistics.retained("spatial", num_slots, rows) - statistics.retained("semantic", num_slots, rows)
    gain = torch.where(gain.abs() > TOLERANCE, gain, 0.0)
    if method == "coverage":
        return gain > 0, None
    # float32, as in a head map, so that the map's score and threshold reproduce its labels
    mass = statistics.window_mass(resolve_window(statistics.layout, window), rows).float()
    threshold = choose_threshold(mass, gain) if threshold is None else threshold
    return mass.double() >= threshold, threshold


def check_labelling(layout: ImageLayout, method: str, window: int | None, threshold: float | None) -> None:
    """Check the settings of `label_heads`; raises ValueError as that function does."""
    resolve_window(layout, window)
    if method not in METHODS:
        raise ValueError(f"method={method!r}: give one of {', '.join(map(repr, METHODS))}")
    if threshold is not None and method != "window":
        raise ValueError(f"threshold={threshold}: method={method!r} has none; leave it out, or give method='window'")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} is out of range: give a number between 0 and 1")


def resolve_window(layout: ImageLayout, window: int | None) -> int:
    """The window, or one grid row plus one; raises ValueError above `widest_window`."""
    widest = widest_window(layout)
    window = min(layout.grid[1] + 1, widest) if window is None else window
    if not 1 <= window <= widest:
        raise ValueError(f"window={window} is out of range: give 1 to {widest} visual tokens")
    return window


def choose_threshold(mass: torch.Tensor, gain: torch.Tensor) -> float:
    """Choose the threshold of window mass with the largest total gain of spatial over semantic labels above it.

    Example: heads of mass .9, .7 and .2 gain +.3, +.1 and -.2 as spatial heads. The cut between .7 and .2 is best.

        >>> round(choose_threshold(torch.tensor([0.9, 0.2, 0.7]), torch.tensor([0.3, -0.2, 0.1])), 6)
        0.45
    """
    order = mass.flatten().argsort(descending=True, stable=True)
    ranked, sums = mass.flatten()[order], gain.flatten().double()[order].cumsum(0)
    high, low = ranked[:-1], ranked[1:]
    middle = (high + low) / 2
    cuts = torch.cat([mass.new_ones(1), torch.where(middle > low, middle, high), mass.new_zeros(1)])
    worth = torch.cat([sums.new_zeros(1), sums])  # total gain of the cut above which the first 0, 1, 2, ... heads lie
    worth[1:-1][high == low] = -torch.inf  # no cut between heads of equal mass
    if ranked[0] >= 1:
        worth[0] = -torch.inf
    return float(cuts[worth.argmax()])


def map_scores(statistics: HeadStatistics, window: int | None = None) -> dict[str, torch.Tensor]:
    """The statistics that a head map stores, float32 `[layers, kv_heads]` by name.

    "coverage" is `retained("spatial") - retained("semantic")` at the first level. "retained_spatial-115" and similar
    names hold the two terms at each level.
    """
    scores = {
        "coverage": statistics.retained("spatial") - statistics.retained("semantic"),
        "window_mass": statistics.window_mass(resolve_window(statistics.layout, window)),
        "margin": statistics.margin_share(),
        "prompt": statistics.prompt_share(),
    }
    for level in statistics.levels:
        scores[f"retained_spatial-{level.num_slots}"] = statistics.retained("spatial", level.num_slots)
        scores[f"retained_semantic-{level.num_slots}"] = statistics.retained("semantic", level.num_slots)
    return {name: score.float() for name, score in scores.items()}
