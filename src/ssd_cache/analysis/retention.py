"""Which visual tokens each head still holds at a step: read from a cache, and plotted on the grid.

The positions are those in the cache's slots; nothing is simulated. `cache/eviction.py` decides which tokens are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssd_cache.analysis.plotting import TO_COME, index_ticks, new_figure
from ssd_cache.cache.cache import SSDCache
from ssd_cache.head_map.card import SEMANTIC, SPATIAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        held = torch.zeros(*self.is_spatial.shape, self.grid[0] * self.grid[1], dtype=torch.bool)
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


def read_retention(cache: SSDCache, *, row: int = 0) -> Retention:
    """Read which visual tokens the heads hold now in a row of the batch, during or after generation.

    Raises:
        ValueError: the cache holds no visual token, or has no such row.
    """
    if not cache.layers[0].stores:
        raise ValueError("the cache holds no visual token: read it during or after generation")
    num_rows = cache.layers[0].stores[0].positions.shape[0]
    if not 0 <= row < num_rows:
        raise ValueError(f"row={row} is out of range: the cache holds {num_rows} rows, counted from 0")
    positions = tuple(tuple(tuple(held[row].tolist()) for held in layer.held_positions()) for layer in cache.layers)
    kinds = torch.tensor([layer.plan.is_spatial for layer in cache.layers])
    return Retention(cache.head_map.grid, cache.layers[0].num_visual, positions, kinds)


def plot_retention(retention: Retention) -> Figure:
    """Plot a small grid for every head, with layers as rows and KV heads as columns."""
    (rows, columns), held = retention.grid, retention.held
    layers, heads = held.shape[:2]
    width, gap = max(5.0, 0.6 + 0.3 * heads), max(1, columns // 12)
    figure = new_figure(1.2 + (width - 0.6) * layers * rows / (heads * columns), width)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    # numbers of the colours below; 0 is the gap between the small grids
    state = torch.where(held, torch.where(retention.is_spatial[..., None], 3, 2), 1)
    state[..., retention.num_seen :] = 4
    colors = ["#7a7a7a", "#f7f7f7", SEMANTIC, SPATIAL, TO_COME]
    mosaic = torch.nn.functional.pad(state.unflatten(-1, (rows, columns)), (0, gap, 0, gap))
    mosaic = mosaic.transpose(1, 2).flatten(2).flatten(0, 1)  # [layers * (rows + gap), heads * (columns + gap)]
    axes = figure.add_subplot()
    axes.imshow(mosaic.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=4, interpolation="nearest")
    index_ticks(axes.xaxis, heads, columns + gap, (columns - 1) / 2)
    index_ticks(axes.yaxis, layers, rows + gap, (rows - 1) / 2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="KV head", ylabel="layer")
    names = {3: "held, spatial", 2: "held, semantic", 1: "evicted", 4: "to come"}
    handles = [Patch(facecolor=colors[number], edgecolor="#555555", label=name) for number, name in names.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return figure
