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
        queries: visual tokens to show, counted from 0; see `default_queries`.
        row: batch row to record; 0 is the conditional row of the first image.
    """

    def __init__(
        self,
        heads: Sequence[tuple[int, int]],
        grid: tuple[int, int],
        *,
        queries: Sequence[int] | None = None,
        row: int = 0,
    ):
        self.grid, self.row = grid, row
        self.queries = default_queries(grid) if queries is None else tuple(queries)
        self.num_seen, cells = 0, grid[0] * grid[1]
        self.num_first = min(MAP_ROWS * grid[1], cells)
        self._tokens = torch.tensor([*range(self.num_first), *self.queries])  # whose attention is stored
        self._weights = {head: torch.zeros(len(self._tokens), cells) for head in heads}
        self._prompt = {head: torch.zeros(len(self._tokens)) for head in heads}

    def observe(self, layer_idx: int, weights: torch.Tensor, num_prompt: int, rows: slice) -> None:
        """Store the attention of a grid row; see `recorder.Observer`."""
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
                f"{max(self.queries)}: call finish() of the RecordingCache, or choose earlier queries"
            )
        first = self.num_first
        return tuple(
            HeadAttention(
                *head, self.grid, self.queries, weights[first:], self._prompt[head][first:], weights[:first, :first]
            )
            for head, weights in self._weights.items()
        )


def default_queries(grid: tuple[int, int]) -> tuple[int, ...]:
    """Four queries that distinguish the head kinds: two in the middle column, one in the first, one in the last."""
    rows, columns = grid
    cells = ((rows // 4, columns // 2), (rows // 2, columns // 2), (rows * 3 // 4, 0), (rows * 3 // 4, columns - 1))
    # the last token of the image is generated but never fed to the model, so it has no query
    return tuple(sorted({max(0, min(row * columns + column, rows * columns - 2)) for row, column in cells}))


def plot_queries(attention: HeadAttention) -> Figure:
    """One panel per query, with its weights on the visual tokens so far. An outline marks the query."""
    (rows, columns), number = attention.grid, len(attention.queries)
    figure = new_figure(0.6 + (number + 1) // 2 * 2.15 * min(1.5, rows / columns))
    from matplotlib.colors import PowerNorm
    from matplotlib.patches import Rectangle

    panels = figure.subplots((number + 1) // 2, 2, squeeze=False).flatten()
    norm = PowerNorm(0.5, vmin=0, vmax=attention.weights.max().item())  # keeps small weights visible
    for axes in panels[number:]:
        axes.set_visible(False)
    for axes, query, weights, prompt in zip(
        panels, attention.queries, attention.weights, attention.prompt_share, strict=False
    ):
        shown = weights.masked_fill(torch.arange(len(weights)) > query, torch.nan).reshape(attention.grid)
        image = axes.imshow(shown.numpy(), cmap=color_map(), norm=norm)
        row, column = divmod(query, columns)
        for color, width in (("white", 2.6), ("#D55E00", 1.4)):  # visible on bright and on dark colours
            cell = (column - 0.5, row - 0.5)
            axes.add_patch(Rectangle(cell, 1, 1, fill=False, edgecolor=color, linewidth=width))
        axes.set_title(f"row {row}, column {column}\nprompt {prompt.item():.0%}", fontsize=10)
        axes.set(xticks=sorted({0, (columns - 1) // 2, columns - 1}), yticks=sorted({0, (rows - 1) // 2, rows - 1}))
    figure.colorbar(image, ax=list(panels), label="weight (root scale)", shrink=0.7)
    return figure


def plot_first_rows(attention: HeadAttention) -> Figure:
    """Weights by query (down) and key (across) over the first grid rows; lines separate the rows."""
    columns, weights = attention.grid[1], attention.first_rows
    to_come = torch.ones(weights.shape, dtype=torch.bool).triu(1)
    seen = weights[~to_come]
    top = seen.quantile(0.995).item()  # a few weights of 1 in the first steps would make all others too dark to see
    figure = new_figure(4.3)
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot()
    norm = PowerNorm(0.5, vmin=0, vmax=top)
    image = axes.imshow(weights.masked_fill(to_come, torch.nan).numpy(), cmap=color_map(), norm=norm)
    edges = range(0, len(weights), columns)
    for edge in edges[1:]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.5, alpha=0.7)
        axes.axvline(edge - 0.5, color="white", linewidth=0.5, alpha=0.7)
    axes.set(xlabel="key: visual token", ylabel="query: visual token", xticks=edges, yticks=edges)
    extend = "max" if seen.max().item() > top else "neither"
    figure.colorbar(image, ax=axes, label="weight (root scale)", shrink=0.85, extend=extend)
    return figure
