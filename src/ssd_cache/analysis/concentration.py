"""Semantic concentration: at which visual tokens K and V differ between the conditional and the unconditional row.

Both rows hold the same image, so any difference comes from the prompt. The paper finds spikes at the margin columns;
`margin_test` tests whether they exceed chance. This module reads a full cache and generates nothing. A significant
result does not give the cause: a model may also treat margins differently because of the image content there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ssd_cache.analysis.plotting import new_figure
from ssd_cache.head_map.card import SEMANTIC, SPATIAL
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.profiling.recorder import RecordingCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNIFICANT = 0.05
NUM_SHIFTS = 9999
STATES: tuple[Literal["keys", "values"], ...] = ("keys", "values")


@dataclass(frozen=True)
class MarginTest:
    """Result of a test whether the margin columns hold more of a sum over the grid than expected by chance.

    Attributes:
        share: the share of the sum in the first and the last column.
        chance: the average share of two columns.
        p_value: fraction of random shifts with at least this `share`; the unshifted data counts as one shift.
    """

    share: float
    chance: float
    p_value: float


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
    kind: str
    num_heads: int
    difference: torch.Tensor
    margin: MarginTest


@dataclass(frozen=True)
class Concentration:
    """Curves of K and V for both kinds of heads; a kind that the map lacks is omitted. `grid` is (rows, columns)."""

    grid: tuple[int, int]
    curves: tuple[Curve, ...]

    @property
    def is_shown(self) -> bool:
        """Whether K or V of semantic heads is concentrated at the margins.

        These are two tests, so each uses half the significance level.
        """
        return any(c.kind == "semantic" and c.margin.p_value <= SIGNIFICANT / 2 for c in self.curves)

    def sentence(self, model: str) -> str:
        """The finding as a sentence, with share, chance and p of both tests."""
        found = [curve for curve in self.curves if curve.kind == "semantic"]
        if not found:
            return f"{model} has no semantic head by this map, so semantic concentration cannot be measured."
        parts = " and ".join(
            f"{curve.margin.share:.1%} of the difference in {curve.states} (p = {curve.margin.p_value:.2g})"
            for curve in found
        )
        verdict, number = "shows" if self.is_shown else "does not show", len(found[0].difference)
        return (
            f"{model} {verdict} semantic concentration at the margins: in its semantic heads the margin columns hold "
            f"{parts}, where chance gives {found[0].margin.chance:.1%}; {number} image{'s' if number > 1 else ''}."
        )


def semantic_concentration(
    cache: RecordingCache, head_map: HeadMap, is_unconditional: torch.Tensor, seed: int = 0
) -> Concentration:
    """Squared differences of K and V between the conditional and the unconditional rows, per token.

    Let `k[c]` and `k[u]` be the keys of one head and token in the conditional and the unconditional row of an image.
    The difference is `mean((k[c] - k[u]) ** 2)` over the head's dimensions, then the mean over all heads of a kind.
    Keys are compared after RoPE. RoPE rotates both rows by the same angles, so it does not change the difference.

    Args:
        cache: a cache that was used to generate images with guidance.
        head_map: the map with the labels.
        is_unconditional: boolean `[rows]`, see `Generator.is_unconditional`.
        seed: as for `margin_test`.
    """
    curves, where = [], is_unconditional.cpu()
    for states in STATES:
        by_layer = []
        for layer in cache.layers:
            held = getattr(layer, states)[:, :, layer.num_prompt :].float()
            by_layer.append((held[~where] - held[where]).square().mean(-1).double().cpu())
        difference = torch.stack(by_layer, dim=1)  # [images, layers, kv_heads, tokens]
        for kind, labels in (("spatial", head_map.is_spatial), ("semantic", ~head_map.is_spatial)):
            if labels.any():
                mean = difference[:, labels].mean(1)
                test = margin_test(mean, head_map.grid[1], seed=seed)
                curves.append(Curve(states, kind, int(labels.sum()), mean, test))
    return Concentration(head_map.grid, tuple(curves))


def margin_test(difference: torch.Tensor, columns: int, *, num_shifts: int = NUM_SHIFTS, seed: int = 0) -> MarginTest:
    """Test the share of the first and the last column against cyclic shifts of the columns.

    The null hypothesis is that margin columns are like all other columns, so a cyclic shift changes nothing. The test
    shifts each image by a random number of columns, all rows together, and repeats this `num_shifts` times. The first
    and the last column stay neighbours. Correlations between neighbouring rows and columns are also kept, so an object
    in an image does not give a false positive. p = (1 + shifts with at least the true share) / (1 + num_shifts). With
    one image of 24 columns, p cannot fall below about 1/24, so generate several images.

    `difference` is `[images, tokens]`, not negative; an incomplete last row is ignored. Raises ValueError if there are
    fewer than three columns, or no complete row.
    """
    num_images, tokens = difference.shape
    if columns < 3 or tokens < columns:
        raise ValueError(
            f"{tokens} tokens on a grid of {columns} columns: the margin test needs three columns and a complete row"
        )
    by_column = difference[:, : tokens // columns * columns].double().cpu().unflatten(1, (-1, columns)).sum(1)
    pairs = by_column + by_column.roll(1, dims=1)  # [:, s]: sum in the margins after a shift by s; s = 0 is unshifted
    total = by_column.sum().clamp(min=1e-300)
    share = (pairs[:, 0].sum() / total).item()
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(columns, (num_images, num_shifts), generator=generator)
    shifted = pairs.gather(1, shifts).sum(0) / total
    hits = int((shifted >= share * (1 - 1e-9)).sum())  # a different order of summation may change the last digits
    return MarginTest(share, 2 / columns, (1 + hits) / (1 + num_shifts))


def plot_concentration(concentration: Concentration) -> Figure:
    """Plot the difference by visual token, averaged over images; thin vertical lines separate grid rows.

    K is above and V below, with one line per kind of head.
    """
    rows, columns = concentration.grid
    figure = new_figure(5.2)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, states in zip(panels, STATES, strict=True):
        for edge in range(0, rows * columns + 1, columns):
            axes.axvline(edge - 0.5, color="#cccccc", linewidth=0.5)
        for curve in concentration.curves:
            if curve.states == states:
                color, line = (SEMANTIC, "-") if curve.kind == "semantic" else (SPATIAL, "--")
                label = f"{curve.kind} ({curve.num_heads})"
                axes.plot(curve.difference.mean(0).numpy(), color=color, linewidth=1.0, linestyle=line, label=label)
        axes.set(ylabel=f"squared difference\nof {states}", ylim=(0, None), xlim=(-0.5, rows * columns - 0.5))
    panels[1].set_xlabel(f"visual token, a line every {columns} (a grid row)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure
