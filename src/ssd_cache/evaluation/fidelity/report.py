"""Writes the results of `measure_fidelity`: fidelity.json with the values, fidelity.png with the figure.

The figure shows divergence and agreement by grid row, divergence by budget, and a heat map of the heads. Colours
distinguish policies, line styles the budgets of one policy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssd_cache.analysis.plotting import WIDTH, check_packages, color_map, mark_spatial, new_figure, plain_label, to_png
from ssd_cache.analysis.report import plain
from ssd_cache.evaluation.fidelity.result import Fidelity
from ssd_cache.evaluation.plots import COLORS, MARKERS
from ssd_cache.io.writing import write_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT = "ssd-cache fidelity 1"
DASHES = ("-", "--", ":", "-.")
MAX_CURVES = 8
"""Caches whose curves over grid rows can be told apart in one panel."""

LOWEST_KL = 1e-8
"""Lower limit of the KL axis, in nats: smaller values are negligible and would take most of the axis."""


def write_fidelity(
    results: Mapping[str, Fidelity], folder: str | os.PathLike[str], conditions: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write fidelity.json and fidelity.png, either both or neither; returns their paths.

    Args:
        results: as `measure_fidelity` returns them; see `draw_fidelity` for how names affect the figure.
        folder: made when missing; older files of these names are replaced.
        conditions: the conditions of the results, as JSON values.

    Raises:
        ImportError: matplotlib is not installed; the message has the remedy.
        OSError: a file cannot be written; older files are unchanged.
    """
    check_packages("matplotlib")
    numbers = {"format": FORMAT, "conditions": dict(conditions or {}), **_as_json(results)}
    contents = {
        Path(folder) / "fidelity.json": json.dumps(numbers, allow_nan=False, ensure_ascii=False).encode() + b"\n",
        Path(folder) / "fidelity.png": to_png(draw_fidelity(results)),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_files(contents)
    return list(contents)


def _as_json(results: Mapping[str, Fidelity]) -> dict[str, Any]:
    """The measured values as JSON types; floats are rounded to seven digits.

    KL and agreement are given for every image and step, attention errors for every step and layer. Retained mass is a
    mean over each grid row, since `[steps, layers, kv_heads]` is millions of numbers in a large model.
    """
    measured = ("budget", "mean_kl", "kl_standard_error", "agreement", "mean_attention_error", "mean_retained")
    tensors = ("is_spatial", "retained_by_head", "kl", "agrees", "attention_error")
    first = next(iter(results.values()))
    return {
        **first.layout.as_json(),
        "tokens": first.tokens.tolist(),
        "results": {
            name: plain(
                {
                    **{key: getattr(result, key) for key in (*measured, *tensors)},
                    "mean_retained_by_kind": {kind: result.retained_by_kind(kind) for kind in ("spatial", "semantic")},
                    "retained_by_grid_row": result.by_grid_row(result.retained),
                }
            )
            for name, result in results.items()
        },
    }


def draw_fidelity(results: Mapping[str, Fidelity]) -> Figure:
    """Plot curves over grid rows, over the budget where there are several, and the first cache's retained mass by head.

    Above `MAX_CURVES` caches, the curves over grid rows are those of each policy's smallest budget.

    Args:
        results: by name; the text before the last space of a name is the policy: "ssd 20%" and "ssd 50%" are two
            budgets of one policy.
    """
    policies: dict[str, list[str]] = {}
    for name in results:
        policies.setdefault(name.rpartition(" ")[0] or name, []).append(name)
    name, first = next(iter(results.items()))
    layers, heads = first.is_spatial.shape
    by_budget = [2.2] if len(results) > len(policies) else []
    heights = [2.2, 2.0, *by_budget, 1.0 + min(4.0, max(1.2, (WIDTH - 1.4) * layers / heads))]
    if len(results) > MAX_CURVES:
        curves = {min(names, key=lambda name: results[name].budget) for names in policies.values()}
    else:
        curves = {*results}
    figure = new_figure(sum(heights) + 0.4 + 0.2 * -(-len(curves) // 2))
    divergence, agreement, *middle, by_head = figure.subplots(len(heights), height_ratios=heights)
    for policy, names in enumerate(policies.values()):
        for index, name_of_budget in enumerate(name for name in names if name in curves):
            result = results[name_of_budget]
            style: dict[str, Any] = {
                "color": COLORS[policy % len(COLORS)],
                "linestyle": DASHES[index % len(DASHES)],
                "zorder": 3 - list(results).index(name_of_budget) / len(results),  # the first is on top
            }
            by_row = result.by_grid_row(result.kl.T).mean(1)
            divergence.plot(by_row.where(by_row > 0, torch.nan), label=plain_label(name_of_budget), **style)
            agreement.plot(result.by_grid_row(result.agrees.T).mean(1), **style)
    divergence.set_title("KL(full || compressed), nats", fontsize=10, loc="left")
    divergence.set_yscale("log")
    low, high = divergence.get_ylim()
    if high > 10 * LOWEST_KL:
        divergence.set_ylim(max(LOWEST_KL, low), high)
    agreement.set_title("same most likely token, share", fontsize=10, loc="left")
    agreement.set_ylim(min(0.99, agreement.get_ylim()[0]), 1.0005)
    draft_rows = list(accumulate(rows for rows, _ in first.layout.draft_grids))
    for axes in (divergence, agreement):
        axes.set_xlabel("row of the draft grid, then of the image" if draft_rows else "grid row")
        axes.set_xlim(0, len(first.layout.row_lengths) - 1)
        for end in draft_rows:
            axes.axvline(end - 0.5, color="0.7", linestyle=":")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in middle:
        _draw_by_budget(axes, results, policies)
    low = min(0.95, int(first.retained_by_head.min() * 20) / 20)
    image = by_head.imshow(first.retained_by_head.numpy(), cmap=color_map(), vmin=low, vmax=1, aspect="auto")
    figure.colorbar(image, ax=by_head)
    mark_spatial(by_head, first.is_spatial)
    title = f"{plain_label(name)}: the full cache's attention\non the tokens that a head holds (dot: spatial)"
    by_head.set_title(title, fontsize=10, loc="left")
    lines = divergence.get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=2, frameon=False, fontsize=9, handlelength=3)
    return figure


def _draw_by_budget(axes: Axes, results: Mapping[str, Fidelity], policies: Mapping[str, list[str]]) -> None:
    for index, names in enumerate(policies.values()):
        points = sorted((100 * results[name].budget, results[name].mean_kl or float("nan")) for name in names)
        style: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(*zip(*points, strict=True), markersize=5, **style)
    shares = sorted({round(100 * result.budget, 1) for result in results.values()})
    axes.set_xticks(shares, [f"{share:.2g}" for share in shares])
    axes.set_xlim(0, 1.04 * shares[-1])
    axes.set_yscale("log")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("KL by budget, mean over the image", fontsize=10, loc="left")
    axes.set_xlabel("budget: slots of a head, in % of the grid")
