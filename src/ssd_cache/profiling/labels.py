"""Labels from statistics: which heads are spatial, which are semantic, and how reliable the labels are.

Everything here is arithmetic on `HeadStatistics` that were measured once. Other methods, windows, thresholds, budgets
or halves of the prompts need no further images. Nothing here generates images; `profiling/allocation.py` allocates
slots.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ssd_cache.head_map.head_map import HeadMap
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
      is semantic. This measures the effect of the cache on the head; its only setting is the cache's own budget.
    - "window": a head is spatial if `window_mass(window)` is at least `threshold`. The default threshold is the one
      whose labels retain the most attention, summed over the heads: in the order of window mass, it lies midway between
      the two neighbours that have the greatest sum of `retained("spatial") - retained("semantic")` above them.

    Args:
        statistics: measured by `measure_heads`.
        method: "coverage" or "window".
        num_slots: the level of the retained attention; the first, which is the intended budget, when not given.
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
    window = resolve_window(statistics.layout, window)
    mass = statistics.window_mass(window, rows).float()
    threshold = choose_threshold(mass, gain) if threshold is None else threshold
    return mass.double() >= threshold, threshold


def check_labelling(layout: ImageLayout, method: str, window: int | None, threshold: float | None) -> None:
    """Check the settings of `label_heads`.

    Raises:
        ValueError: see `label_heads`.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: give one of {', '.join(map(repr, METHODS))}")
    resolve_window(layout, window)
    if threshold is not None and method != "window":
        raise ValueError(f"threshold={threshold}: method={method!r} has none; leave it out, or give method='window'")
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} is out of range: give a number between 0 and 1")


def resolve_window(layout: ImageLayout, window: int | None) -> int:
    """Check the window; the default is one grid row plus one.

    Raises:
        ValueError: a window that contains all visual tokens, or one that reaches from the image into a draft grid.
    """
    widest = widest_window(layout)
    window = min(layout.grid[1] + 1, widest) if window is None else window
    if not 1 <= window <= widest:
        raise ValueError(f"window={window} is out of range: give 1 to {widest} visual tokens")
    return window


def choose_threshold(mass: torch.Tensor, gain: torch.Tensor) -> float:
    """Choose the threshold of window mass with the largest total gain above it.

    Args:
        mass: window mass per head, float32, any shape.
        gain: retained attention as a spatial head minus that as a semantic head, the same shape.

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
    levels = [level.num_slots for level in statistics.levels]
    scores = {
        "coverage": statistics.retained("spatial") - statistics.retained("semantic"),
        "window_mass": statistics.window_mass(resolve_window(statistics.layout, window)),
        "margin": statistics.margin_share(),
        "margin_chance": statistics.margin_chance(),
        "prompt": statistics.prompt_share(),
        "entropy": statistics.entropy(),
        "top_share": statistics.top_share(),
    }
    for slots in levels:
        scores[f"retained_spatial-{slots}"] = statistics.retained("spatial", slots)
        scores[f"retained_semantic-{slots}"] = statistics.retained("semantic", slots)
    return {name: score.float() for name, score in scores.items()}


def label_agreement(first: HeadMap | torch.Tensor, second: HeadMap | torch.Tensor) -> float:
    """Share of the heads that have the same label in two maps, or in two boolean tensors of one shape.

    Raises:
        ValueError: shapes differ.
    """
    labels = [source.is_spatial if isinstance(source, HeadMap) else source for source in (first, second)]
    if labels[0].shape != labels[1].shape:
        raise ValueError(f"labels of shape {list(labels[0].shape)} and {list(labels[1].shape)} can not be compared")
    return (labels[0] == labels[1]).double().mean().item()


def split_half_agreement(
    parts: Sequence[HeadStatistics], *, num_draws: int = 50, seed: int = 0, **labelling
) -> Mapping[int, tuple[float, float]]:
    """Agreement of labels between two halves of the prompts, by number of prompts.

    For each number of parts 2, 4, 8, ... two disjoint halves are sampled `num_draws` times and labelled separately.

    Args:
        parts: statistics of equally many prompts each, for example `measure_heads(model, prompts[i : i + 8])`.
        num_draws: random splits for each number of parts.
        seed: seed of the random splits.
        labelling: as for `label_heads`.

    Returns:
        Number of images in both halves together -> mean agreement and lowest agreement.
    """
    if len(parts) < 2:
        raise ValueError(f"{len(parts)} part can not be halved: measure two or more batches")
    chance, results, size = random.Random(seed), {}, 2
    while size <= len(parts):
        found = []
        for _ in range(num_draws):
            drawn = chance.sample(range(len(parts)), size)
            halves = drawn[: size // 2], drawn[size // 2 :]
            labels = [label_heads(total([parts[index] for index in half]), **labelling)[0] for half in halves]
            found.append(label_agreement(*labels))
        num_pictures = sum(parts[index].num_pictures for index in range(size))
        results[num_pictures] = (sum(found) / num_draws, min(found))
        size *= 2
    return results


def total(parts: Sequence[HeadStatistics]) -> HeadStatistics:
    """Add the statistics of all parts, in order."""
    first, *others = parts
    for other in others:
        first = first + other
    return first
