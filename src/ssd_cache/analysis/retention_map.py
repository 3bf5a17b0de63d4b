"""Which visual tokens each head still holds at a step: read from a cache, and plotted on the grid and over the image.

`RetentionProbe` reads an `SSDCache` during generation; it copies the positions in the slots and simulates nothing.
`cache/retention.py` decides which tokens are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ssd_cache.analysis.plotting import TO_COME, check_packages, color_map, draw_grid_axes, new_figure
from ssd_cache.cache.cache import SSDCache
from ssd_cache.head_map.card import SEMANTIC, SPATIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIMMED = 0.22
"""Remaining brightness of image cells whose token was evicted."""


@dataclass(frozen=True)
class Retention:
    """The visual tokens of one image that every head held at one step.

    Attributes:
        grid: rows and columns of visual tokens.
        num_seen: visual tokens seen so far.
        positions: by layer and KV head, the visual tokens held, in ascending order, counted from 0.
        is_spatial: bool, `[layers, kv_heads]`, whether each head kept its tokens by the spatial rule.
    """

    grid: tuple[int, int]
    num_seen: int
    positions: tuple[tuple[tuple[int, ...], ...], ...]
    is_spatial: torch.Tensor

    @property
    def held(self) -> torch.Tensor:
        """Whether each head holds each token: bool, `[layers, kv_heads, cells]`."""
        cells = self.grid[0] * self.grid[1]
        held = torch.zeros(len(self.positions), len(self.positions[0]), cells, dtype=torch.bool)
        for layer, heads in enumerate(self.positions):
            for head, tokens in enumerate(heads):
                held[layer, head, list(tokens)] = True
        return held

    @property
    def mean_held(self) -> float:
        """Number of visual tokens held by a head, averaged over heads."""
        return self.held.double().sum(-1).mean().item()

    @property
    def lost_share(self) -> float:
        """Share of the seen tokens that no head still holds."""
        return 1 - self.held.flatten(0, 1).any(0).sum().item() / self.num_seen

    def margin_share(self, kind: str) -> float | None:
        """Share of the tokens held by heads of a kind that lie in the first or last column; None without such heads."""
        wanted = self.is_spatial if kind == "spatial" else ~self.is_spatial
        held = self.held[wanted].reshape(-1, *self.grid)
        return (held[..., [0, -1]].sum() / held.sum()).item() if held.any() else None


def read_retention(cache: SSDCache, *, row: int = 0) -> Retention:
    """Read which visual tokens the heads of a cache hold now.

    Args:
        cache: a cache with at least one visual token.
        row: batch row to read; with guidance, the first half of the batch has the conditional rows of the images.

    Raises:
        ValueError: the cache holds no visual token, or has no such row.
    """
    if not cache.layers[0].stores:
        raise ValueError("the cache holds no visual token: read it while or after it draws")
    num_rows = cache.layers[0].stores[0].positions.shape[0]
    if not 0 <= row < num_rows:
        raise ValueError(f"row={row}, but the cache holds {num_rows} rows, counted from 0")
    positions, kinds = [], []
    for layer in cache.layers:
        positions.append(tuple(tuple(held[row].tolist()) for held in layer.held_positions()))
        kinds.append(layer.labels or layer.plan.is_spatial)
    return Retention(
        cache.head_map.grid, cache.layers[0].num_visual, tuple(positions), torch.tensor(kinds, dtype=torch.bool)
    )


class RetentionProbe:
    """Reads a cache once, after `step` visual tokens. Pass the probe as `on_tokens` of a generator.

    Args:
        cache: the cache that the generator uses.
        step: from 1 to the number of grid cells minus one (the last token is generated but never fed to the model).
        row: batch row, as for `read_retention`.

    Attributes:
        result: the retention that was read; None before that step.
    """

    def __init__(self, cache: SSDCache, step: int, *, row: int = 0):
        self.cache, self.step, self.row = cache, step, row
        self.result: Retention | None = None

    def __call__(self, num_tokens: int) -> None:
        # the generator calls this after a forward pass: the token just fed is stored, the next one is not generated yet
        if self.cache.layers[-1].num_visual == self.step:
            self.result = read_retention(self.cache, row=self.row)


def over_picture(picture: Image.Image, retention: Retention, layer: int, head: int) -> Image.Image:
    """Mark on the image what one head holds: cells of evicted tokens are dark, cells not generated yet are grey."""
    rows, columns = retention.grid
    cells = torch.arange(rows * columns)
    dropped = ~retention.held[layer, head] & (cells < retention.num_seen)
    result = picture.convert("RGB")
    for mask, color, left in ((dropped, (0, 0, 0), DIMMED), (cells >= retention.num_seen, (190, 190, 190), DIMMED)):
        veil = Image.fromarray(mask.reshape(rows, columns).to(torch.uint8).mul(round(255 * (1 - left))).numpy())
        result.paste(color, (0, 0), veil.resize(picture.size, Image.Resampling.NEAREST))
    return result


def draw_over_picture(retention: Retention, picture: Image.Image, heads: Sequence[tuple[int, int]]) -> Figure:
    """Plot the whole image, the parts that some heads hold, and the share of all heads that hold each token."""
    rows, columns = retention.grid
    number = len(heads) + 2
    figure = new_figure(0.5 + (number + 1) // 2 * 2.25 * min(1.5, rows / columns))
    panels = figure.subplots((number + 1) // 2, 2, squeeze=False).flatten()
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    titles = ["the picture, once finished"]
    panels[0].imshow(picture, extent=extent)
    for axes, (layer, head) in zip(panels[1:], heads, strict=False):
        axes.imshow(over_picture(picture, retention, layer, head), extent=extent)
        kind = "spatial" if retention.is_spatial[layer, head] else "semantic"
        titles.append(f"layer {layer}, head {head}\nkept as {kind}: {len(retention.positions[layer][head])}")
    share = retention.held.flatten(0, 1).double().mean(0)
    to_come = torch.arange(rows * columns) >= retention.num_seen
    shown = share.masked_fill(to_come, float("nan")).reshape(rows, columns)
    image = panels[number - 1].imshow(shown.numpy(), cmap=color_map(), vmin=0, vmax=1)
    figure.colorbar(image, ax=panels[number - 1], label="share", shrink=0.7)
    titles.append("heads that hold a token")
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title, fontsize=10)
        draw_grid_axes(axes, retention.grid)
    for axes in panels[number:]:
        axes.set_visible(False)
    return figure


def draw_heads(retention: Retention) -> Figure:
    """Plot a small grid for every head, with layers as rows and KV heads as columns."""
    check_packages("matplotlib")
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    (rows, columns), held = retention.grid, retention.held
    layers, heads, cells = held.shape
    spatial = retention.is_spatial[..., None]
    state = torch.where(held, torch.where(spatial, 3, 2), 1)  # 0 is the gap between the small grids
    state[..., torch.arange(cells) >= retention.num_seen] = 4
    gap = max(1, columns // 12)
    mosaic = torch.zeros(layers, heads, rows + gap, columns + gap, dtype=torch.long)
    mosaic[:, :, :rows, :columns] = state.reshape(layers, heads, rows, columns)
    mosaic = mosaic.permute(0, 2, 1, 3).reshape(layers * (rows + gap), heads * (columns + gap))
    width = max(5.0, 0.6 + 0.3 * heads)
    figure = new_figure(1.2 + (width - 0.6) * layers * rows / (heads * columns), width)
    axes = figure.add_subplot()
    colors = ["#7a7a7a", "#f7f7f7", SEMANTIC, SPATIAL, TO_COME]
    axes.imshow(mosaic.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=4, interpolation="nearest")
    for axis, number, size in ((axes.xaxis, heads, columns), (axes.yaxis, layers, rows)):
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 500) if number / step <= 16)
        labelled = range(0, number, step)
        axis.set_ticks(
            [index * (size + gap) + (size - 1) / 2 for index in labelled], [str(index) for index in labelled]
        )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="KV head", ylabel="layer")
    names = ("", "dropped", "held, semantic", "held, spatial", "to come")
    shown = [index for index in (3, 2, 1, 4) if (state == index).any()]
    handles = [Patch(facecolor=colors[index], edgecolor="#555555", label=names[index]) for index in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure
