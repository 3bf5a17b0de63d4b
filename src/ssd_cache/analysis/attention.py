"""Where a head looks: its attention over the grid at a few visual tokens, and its (query, key) map.

A spatial head looks at the neighbourhood, mostly at the token right above; a semantic head at a few far tokens, at the
margins and the prompt. `AttentionRecorder` stores the attention of a few heads for one image; `profiling` has the
statistics over all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ssd_cache.analysis.plotting import color_map, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP_ROWS = 4
"""Grid rows of the (query, key) map."""


@dataclass(frozen=True)
class HeadAttention:
    """The attention of one KV head during one image, averaged over the query heads of the KV head.

    Attributes:
        layer, head: the index of the layer and of the KV head.
        grid: rows and columns of visual tokens.
        queries: visual tokens, counted from 0, whose queries are shown.
        weights: `[queries, cells]`, float32, softmax weights on the visual tokens; 0 on later tokens.
        prompt_share: `[queries]`, the share of each query's attention that the prompt receives.
        first_rows: `[tokens, tokens]`, weights by query and key, of all tokens of the first grid rows.
    """

    layer: int
    head: int
    grid: tuple[int, int]
    queries: tuple[int, ...]
    weights: torch.Tensor
    prompt_share: torch.Tensor
    first_rows: torch.Tensor


class AttentionRecorder:
    """An observer for `RecordingCache` that records the attention of a few heads during one image.

    Args:
        heads: (layer, head) pairs.
        grid: rows and columns of visual tokens.
        row: batch row to record; 0 is the conditional row of the first image.
    """

    def __init__(self, heads: Sequence[tuple[int, int]], grid: tuple[int, int], *, row: int = 0):
        rows, columns = self.grid = grid
        self.row, cells = row, rows * columns
        # two queries in the middle column, one in the first, one in the last; the image's last token has no query
        shown = ((rows // 4, columns // 2), (rows // 2, columns // 2), (rows * 3 // 4, 0), (rows * 3 // 4, columns - 1))
        self.queries = tuple(sorted({max(0, min(row * columns + column, cells - 2)) for row, column in shown}))
        self.num_seen, self.num_first = 0, min(MAP_ROWS * columns, cells)
        self._tokens = torch.tensor([*range(self.num_first), *self.queries])  # whose attention is stored
        self._weights = {head: torch.zeros(len(self._tokens), cells) for head in heads}
        self._prompt = {head: torch.zeros(len(self._tokens)) for head in heads}

    def observe(self, layer_idx: int, weights: torch.Tensor, num_prompt: int, rows: slice) -> None:
        """Store the attention of the chosen heads and queries, for one row of the batch; see `recorder.Observer`."""
        if not rows.start <= self.row < rows.stop:
            return
        stored = weights.shape[-1] - num_prompt
        first = stored - weights.shape[-2]
        chosen = (first <= self._tokens) & (self._tokens < stored)
        for layer, head in self._weights:
            if layer == layer_idx:
                pooled = weights[self.row - rows.start, head].mean(0).cpu()[self._tokens[chosen] - first]
                self._weights[layer, head][chosen, :stored] = pooled[:, num_prompt:]
                self._prompt[layer, head][chosen] = pooled[:, :num_prompt].sum(1)
        self.num_seen = max(self.num_seen, stored)

    def result(self) -> tuple[HeadAttention, ...]:
        """The recorded attention, one entry per head.

        Raises:
            ValueError: the image ended before the last query to show.
        """
        if self.num_seen <= max(self.queries):
            raise ValueError(
                f"attention of {self.num_seen} visual tokens was recorded, which does not include token "
                f"{max(self.queries)}: call finish() of the RecordingCache"
            )
        first = self.num_first
        return tuple(
            HeadAttention(
                *head, self.grid, self.queries, weights[first:], self._prompt[head][first:], weights[:first, :first]
            )
            for head, weights in self._weights.items()
        )


def plot_attention(attention: HeadAttention) -> Figure:
    """Weights over the grid at each query, which is outlined, and below them by query and key over the first rows."""
    (rows, columns), number = attention.grid, len(attention.queries)
    names = [str(index) for index in range(number)]
    panels: list = [[names[index], names[min(index + 1, number - 1)]] for index in range(0, number, 2)]
    heights = [2.15 * min(1.5, rows / columns)] * len(panels) + [4.0]
    figure = new_figure(0.6 + sum(heights))
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplot_mosaic([*panels, ["keys", "keys"]], height_ratios=heights)
    to_come = torch.ones(attention.first_rows.shape, dtype=torch.bool).triu(1)
    # a few weights of 1 in the first steps would make all others too dark to see
    top = max(attention.weights.max().item(), attention.first_rows[~to_come].quantile(0.995).item())
    style = {"cmap": color_map(), "norm": PowerNorm(0.5, vmin=0, vmax=top)}  # keeps small weights visible
    for name, query, weights, prompt in zip(
        names, attention.queries, attention.weights, attention.prompt_share, strict=True
    ):
        seen = weights.masked_fill(torch.arange(len(weights)) > query, torch.nan).reshape(attention.grid)
        axes[name].imshow(seen.numpy(), **style)
        row, column = divmod(query, columns)
        for color, width in (("white", 2.6), ("#D55E00", 1.4)):  # visible on bright and on dark colours
            cell = (column - 0.5, row - 0.5)
            axes[name].add_patch(Rectangle(cell, 1, 1, fill=False, edgecolor=color, linewidth=width))
        axes[name].set_title(f"row {row}, column {column}\nprompt {prompt.item():.0%}", fontsize=10)
        axes[name].set(xticks=sorted({0, columns - 1}), yticks=sorted({0, rows - 1}))
    image = axes["keys"].imshow(attention.first_rows.masked_fill(to_come, torch.nan).numpy(), **style)
    edges = range(0, len(attention.first_rows), columns)
    axes["keys"].set(xlabel="key: visual token", ylabel="query: visual token", xticks=edges, yticks=edges)
    bar = figure.colorbar(image, ax=list(axes.values()), label="weight (root scale)", location="bottom", extend="max")
    bar.locator = MaxNLocator(4)  # on the root scale, large weights are close together
    bar.update_ticks()
    return figure
