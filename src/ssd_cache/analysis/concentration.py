"""Semantic concentration: at which visual tokens K and V differ between the conditional and the unconditional row.

Both rows hold the same image, so any difference comes from the prompt. The paper finds spikes at the margin columns;
`margin_test` tests whether they exceed chance. It reads a full cache and generates nothing. A significant result does
not give the cause: a model may also treat margins differently because of the image content there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import Cache

from ssd_cache.analysis.margin import MarginTest, margin_test
from ssd_cache.analysis.plotting import new_figure
from ssd_cache.cache.layer import SSDLayer
from ssd_cache.head_map.card import SEMANTIC, SPATIAL
from ssd_cache.head_map.head_map import HeadMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Curve:
    """The differences of K or of V, averaged over the heads of one kind.

    Attributes:
        states: "keys" or "values".
        kind: "spatial" or "semantic".
        num_heads: the number of heads averaged.
        difference: `[images, tokens]`, float64. The last token of an image is never fed to the model, so it is absent.
        margin: the result of the margin test on these differences.
    """

    states: Literal["keys", "values"]
    kind: Literal["spatial", "semantic"]
    num_heads: int
    difference: torch.Tensor
    margin: MarginTest


@dataclass(frozen=True)
class Concentration:
    """Curves of K and V for both kinds of heads. A kind that the map lacks is omitted.

    Attributes:
        grid: rows and columns of visual tokens.
        curves: up to four, for K and V of each kind.
        head_shares: by "keys" and "values", `[layers, kv_heads]`, float64: the share of each head's difference in the
            margin columns.
    """

    grid: tuple[int, int]
    curves: tuple[Curve, ...]
    head_shares: dict[str, torch.Tensor]

    @property
    def is_shown(self) -> bool:
        """Whether K or V of semantic heads is concentrated at the margins.

        These are two tests, so each uses half the significance level.
        """
        return any(c.kind == "semantic" and c.margin.p_value <= SIGNIFICANT / 2 for c in self.curves)

    def sentence(self, model: str) -> str:
        """The finding as a sentence with its numbers."""
        found = [c for c in self.curves if c.kind == "semantic"]
        if not found:
            return f"{model} has no semantic head by this map, so its concentration can not be told."
        parts = [
            f"the margin columns hold {c.margin.share:.1%} of the difference in {c.states} (p = {c.margin.p_value:.2g})"
            for c in found
        ]
        verdict = "shows" if self.is_shown else "does not show"
        pictures = len(found[0].difference)
        return (
            f"{model} {verdict} semantic concentration at the margins: in its semantic heads "
            f"{' and '.join(parts)}, where chance gives {found[0].margin.chance:.1%}; {pictures} "
            f"picture{'s' if pictures > 1 else ''}."
        )


def semantic_concentration(
    cache: Cache,
    head_map: HeadMap,
    *,
    num_prompt: int | None = None,
    is_unconditional: torch.Tensor | None = None,
    seed: int = 0,
) -> Concentration:
    """Squared differences of K and V between the conditional and the unconditional rows, per token.

    Let `k[c]` and `k[u]` be the keys of one head and token in the conditional and the unconditional row of an image.
    The difference is `mean((k[c] - k[u]) ** 2)` over the head's dimensions, then the mean over all heads of a kind.
    Keys are compared after RoPE. RoPE rotates both rows by the same angles, so it does not change the difference.

    Args:
        cache: a cache that was used to generate images with guidance and evicted nothing: a `RecordingCache`, an
            `SSDCache` with budget 1.0, or a `DynamicCache`.
        head_map: the map with the labels.
        num_prompt: number of prompt tokens; required for caches that do not store it.
        is_unconditional: boolean `[rows]`, see `Generator.is_unconditional`. Default: the second half of the rows, as
            in Janus.
        seed: seed of the random shifts of the margin test.

    Raises:
        ValueError: tokens were evicted, no visual token is stored, the rows do not form pairs, or the map does not fit.
    """
    differences: dict[str, list[torch.Tensor]] = {"keys": [], "values": []}
    for layer in cache.layers:
        for name, states in zip(("keys", "values"), _visual_states(layer, num_prompt), strict=True):
            differences[name].append(_difference(states, is_unconditional))
    head_map.check_fits("the cache", len(cache.layers), differences["keys"][0].shape[1])
    curves, head_shares = [], {}
    complete = differences["keys"][0].shape[2] // head_map.grid[1] * head_map.grid[1]
    if complete == 0:
        raise ValueError("the cache holds less than one grid row of visual tokens: draw a picture first")
    for name in ("keys", "values"):
        stacked = torch.stack(differences[name], dim=1)  # [images, layers, kv_heads, tokens]
        by_column = stacked[..., :complete].unflatten(-1, (-1, head_map.grid[1])).sum((0, 3))
        head_shares[name] = (by_column[..., 0] + by_column[..., -1]) / by_column.sum(-1).clamp(min=1e-300)
        for kind, labels in (("spatial", head_map.is_spatial), ("semantic", ~head_map.is_spatial)):
            if labels.any():
                mean = stacked[:, labels].mean(1)
                test = margin_test(mean, head_map.grid[1], seed=seed)
                curves.append(Curve(name, kind, int(labels.sum()), mean, test))  # type: ignore[arg-type]
    return Concentration(head_map.grid, tuple(curves), head_shares)


def _visual_states(layer: Any, num_prompt: int | None) -> Iterator[torch.Tensor]:
    """Keys, then values, of the visual tokens in raster order, `[rows, kv_heads, tokens, head_dim]`."""
    if isinstance(layer, SSDLayer):
        if not layer.stores:
            raise ValueError("the cache holds no visual token: draw a picture with it first")
        if any(store.num_stored < layer.num_visual for store in layer.stores):
            raise ValueError(
                "the cache has dropped visual tokens, so rows can not be compared: use SSDCache(head_map, budget=1.0)"
            )
        states = [store.states(store.num_stored - 1) for store in layer.stores]
        for parts in zip(*states, strict=True):
            yield layer.groups.join([part[:, :, layer.num_prompt :] for part in parts])
        return
    if num_prompt is None:
        raise ValueError(f"a {type(layer).__name__} does not know where the prompt ends: give num_prompt=...")
    yield layer.keys[:, :, num_prompt:]
    yield layer.values[:, :, num_prompt:]


def _difference(states: torch.Tensor, is_unconditional: torch.Tensor | None) -> torch.Tensor:
    """Squared difference between paired rows, `[images, kv_heads, tokens]`, float64, on the CPU."""
    rows = states.shape[0]
    unconditional = torch.arange(rows) >= rows // 2 if is_unconditional is None else is_unconditional.cpu()
    if len(unconditional) != rows or 2 * int(unconditional.sum()) != rows:
        raise ValueError(f"the cache holds {rows} row(s) that are no pairs of guidance: draw with guidance")
    where = unconditional.to(states.device)
    return (states[~where].float() - states[where].float()).square().mean(-1).double().cpu()


def draw_curves(concentration: Concentration) -> Figure:
    """Plot the difference by visual token, averaged over images.

    K is above and V below, with one line per kind of head. Thin vertical lines separate grid rows.
    """
    rows, columns = concentration.grid
    figure = new_figure(5.2)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, states in zip(panels, ("keys", "values"), strict=True):
        for edge in range(0, rows * columns + 1, columns):
            axes.axvline(edge - 0.5, color="#cccccc", linewidth=0.5)
        for curve in concentration.curves:
            if curve.states == states:
                axes.plot(
                    curve.difference.mean(0).numpy(),
                    color=SEMANTIC if curve.kind == "semantic" else SPATIAL,
                    linewidth=1.0,
                    linestyle="-" if curve.kind == "semantic" else (0, (3, 1)),
                    label=f"{curve.kind} ({curve.num_heads})",
                )
        axes.set(ylabel=f"squared difference\nof {states}", ylim=(0, None), xlim=(-0.5, rows * columns - 0.5))
    step = next(step for step in (1, 2, 3, 4, 6, 8, 12, 24, rows) if rows / step <= 8)
    panels[1].set_xticks(range(0, rows * columns, step * columns))
    panels[1].set_xlabel(f"visual token, a line every {columns} (a grid row)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_columns(concentration: Concentration) -> Figure:
    """Plot the difference by grid column, divided by the mean of all columns.

    The margin columns are shaded. Each thin line is one image.
    """
    columns = concentration.grid[1]
    figure = new_figure(5.2)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, states in zip(panels, ("keys", "values"), strict=True):
        for edge in (0, columns - 1):
            axes.axvspan(edge - 0.5, edge + 0.5, color="#ececec", linewidth=0)
        axes.axhline(1, color="#888888", linewidth=0.8, linestyle=":")
        for curve in concentration.curves:
            if curve.states != states:
                continue
            complete = curve.difference.shape[1] // columns * columns
            profile = curve.difference[:, :complete].unflatten(1, (-1, columns)).sum(1)
            color = SEMANTIC if curve.kind == "semantic" else SPATIAL
            if len(profile) > 1:
                axes.plot((profile / profile.mean(1, keepdim=True)).T.numpy(), color=color, linewidth=0.5, alpha=0.45)
            axes.plot(
                (profile.sum(0) / profile.sum(0).mean()).numpy(),
                color=color,
                linewidth=1.8,
                marker="o" if curve.kind == "semantic" else "s",
                markersize=3.5,
                label=f"{curve.kind} ({curve.num_heads})",
            )
        axes.set(ylabel=f"difference of {states},\nmean column = 1", ylim=(0, None), xlim=(-0.5, columns - 0.5))
    panels[1].set_xticks(sorted({*range(0, columns - 2, max(1, columns // 6)), columns - 1}))
    panels[1].set_xlabel("column of the grid (margins shaded)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure
