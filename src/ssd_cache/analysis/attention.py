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

from ssd_cache.analysis.plotting import color_map, draw_grid_axes, new_figure, outline_cell, root_norm
from ssd_cache.analysis.scores import HeadScores

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

    def strongest(self, index: int) -> tuple[int, int]:
        """Row and column of the visual token with the highest weight for `queries[index]`."""
        row, column = divmod(int(self.weights[index].argmax()), self.grid[1])
        return row, column


class AttentionRecorder:
    """An observer for `RecordingCache` that records the attention of a few heads during one image.

    Args:
        heads: (layer, head) pairs.
        grid: rows and columns of visual tokens.
        queries: visual tokens to show, counted from 0; see `default_queries`.
        num_rows: grid rows of the (query, key) map.
        row: batch row to record; 0 is the conditional row of the first image.
    """

    def __init__(
        self,
        heads: Sequence[tuple[int, int]],
        grid: tuple[int, int],
        *,
        queries: Sequence[int] | None = None,
        num_rows: int = MAP_ROWS,
        row: int = 0,
    ):
        self.heads, self.grid, self.row = tuple(dict.fromkeys(heads)), grid, row
        self.queries = default_queries(grid) if queries is None else tuple(queries)
        cells = grid[0] * grid[1]
        tokens = min(num_rows * grid[1], cells)
        self.num_seen = 0
        self._weights = {head: torch.zeros(len(self.queries), cells) for head in self.heads}
        self._prompt = {head: torch.zeros(len(self.queries)) for head in self.heads}
        self._first_rows = {head: torch.zeros(tokens, tokens) for head in self.heads}

    def observe(self, layer_idx: int, weights: torch.Tensor, num_prompt: int, rows: slice) -> None:
        """Store the attention of a grid row; see `recorder.Observer`."""
        if not rows.start <= self.row < rows.stop:
            return
        for layer, head in self.heads:
            if layer == layer_idx:
                self._take((layer, head), weights[self.row - rows.start, head].mean(0).cpu(), num_prompt)

    def _take(self, key: tuple[int, int], pooled: torch.Tensor, num_prompt: int) -> None:
        """Store the needed rows of `pooled`, `[steps, num_prompt + stored]`; the last step is token `stored - 1`."""
        visual = pooled[:, num_prompt:]
        steps, stored = visual.shape
        first = stored - steps
        for index, query in enumerate(self.queries):
            if first <= query < stored:
                self._weights[key][index, :stored] = visual[query - first]
                self._prompt[key][index] = pooled[query - first, :num_prompt].sum()
        end = min(stored, len(self._first_rows[key]))
        if first < end:
            self._first_rows[key][first:end, :end] = visual[: end - first, :end]
        self.num_seen = max(self.num_seen, stored)

    def result(self) -> tuple[HeadAttention, ...]:
        """The recorded attention, one entry per head.

        Raises:
            ValueError: the image ended before the last query to show.
        """
        if self.num_seen <= max(self.queries):
            raise ValueError(
                f"attention of {self.num_seen} visual tokens was observed, and token {max(self.queries)} is to be "
                "shown: call finish() of the RecordingCache, or choose earlier queries"
            )
        return tuple(
            HeadAttention(*key, self.grid, self.queries, self._weights[key], self._prompt[key], self._first_rows[key])
            for key in self.heads
        )


def default_queries(grid: tuple[int, int]) -> tuple[int, ...]:
    """Four queries that distinguish the head kinds: two in the middle column, one in the first, one in the last."""
    rows, columns = grid
    cells = ((rows // 4, columns // 2), (rows // 2, columns // 2), (rows * 3 // 4, 0), (rows * 3 // 4, columns - 1))
    # the last token of the image is generated but never fed to the model, so it has no query
    return tuple(sorted({max(0, min(row * columns + column, rows * columns - 2)) for row, column in cells}))


def choose_heads(scores: HeadScores, wanted: tuple[int, int] | None = None) -> tuple[tuple[int, int], ...]:
    """The most spatial and the most semantic head; `wanted` replaces the one of its own kind.

    If the map has the score "prompt", heads with more than half of their attention on the prompt come last within
    their kind. They attend too little to the image to illustrate a kind.
    """
    prompt = scores.all.get("prompt", torch.zeros(scores.is_spatial.shape))

    def clearest(kind: str) -> tuple[int, int]:
        is_kind = scores.is_spatial == (kind == "spatial")
        return min(scores.most(kind), key=lambda head: (not is_kind[head], bool(prompt[head] > 0.5)))

    spatial, semantic = clearest("spatial"), clearest("semantic")
    if wanted is not None:
        if scores.is_spatial[wanted]:
            spatial = wanted
        else:
            semantic = wanted
    return tuple(dict.fromkeys((spatial, semantic)))


def draw_queries(attention: HeadAttention) -> Figure:
    """One panel per query, with its weights on the visual tokens so far. An outline marks the query."""
    rows, columns = attention.grid
    number = len(attention.queries)
    figure = new_figure(0.6 + (number + 1) // 2 * 2.15 * min(1.5, rows / columns))
    panels = figure.subplots((number + 1) // 2, 2 if number > 1 else 1, squeeze=False).flatten()
    norm = root_norm(attention.weights.max().item())
    cells = torch.arange(rows * columns)
    for index, (axes, query) in enumerate(zip(panels, attention.queries, strict=False)):
        shown = attention.weights[index].masked_fill(cells > query, float("nan")).reshape(rows, columns)
        image = axes.imshow(shown.numpy(), cmap=color_map(), norm=norm)
        row, column = divmod(query, columns)
        outline_cell(axes, row, column)
        share = 100 * attention.prompt_share[index].item()
        axes.set_title(f"row {row}, column {column}\nprompt {share:.0f}%", fontsize=10)
        draw_grid_axes(axes, attention.grid)
    for axes in panels[number:]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(panels), label="weight (root scale)", shrink=0.7)
    return figure


def draw_first_rows(attention: HeadAttention) -> Figure:
    """Weights by query (down) and key (across) over the first grid rows; lines separate the rows."""
    columns, weights = attention.grid[1], attention.first_rows
    tokens = len(weights)
    to_come = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    seen = weights[~to_come]
    top = seen.quantile(0.995).item()  # a few weights of 1 in the first steps would make all others too dark to see
    figure = new_figure(4.3)
    axes = figure.add_subplot()
    image = axes.imshow(weights.masked_fill(to_come, float("nan")).numpy(), cmap=color_map(), norm=root_norm(top))
    for edge in range(columns, tokens, columns):
        axes.axhline(edge - 0.5, color="white", linewidth=0.5, alpha=0.7)
        axes.axvline(edge - 0.5, color="white", linewidth=0.5, alpha=0.7)
    axes.set_xticks(range(0, tokens, columns))
    axes.set_yticks(range(0, tokens, columns))
    axes.set(xlabel="key: visual token", ylabel="query: visual token")
    above = seen.max().item() > top
    figure.colorbar(image, ax=axes, label="weight (root scale)", shrink=0.85, extend="max" if above else "neither")
    return figure
