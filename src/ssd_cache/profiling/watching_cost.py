"""What watching a full cache takes in memory, counted out from a model's sizes before anything is drawn.

The formulas of what `watching.py` and `observing.py` hold; the tests hold them to the real tensors. Nothing is measured
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ssd_cache.layout import Grid, count_cells
from ssd_cache.profiling.watching import CHUNK, GPU_CHUNK


@dataclass(frozen=True)
class WatchingCost:
    """Bytes of one profiling run with batches of one size.

    Attributes:
        full_cache: K and V of the pictures, which plain generation holds too.
        held: from one grid row to the next: queries of a grid row, scores of the levels, positions.
        sums: the statistics of a batch, of the run, and both added up; they do not grow with the batch.
        moment: at most, while the softmax of a grid row is made and summed up, a few rows of the batch at a time.
    """

    full_cache: int
    held: int
    sums: int
    moment: int

    @property
    def share(self) -> float:
        """All of it together, as a share of the full cache."""
        return (self.held + self.sums + self.moment) / self.full_cache


def watching_cost(
    config: PreTrainedConfig,
    grid: Grid,
    *,
    previews: Sequence[Grid] = (),
    num_rows: int,
    num_prompt: int,
    num_levels: int = 1,
    itemsize: int = 4,
    on_gpu: bool = False,
) -> WatchingCost:
    """The bytes for a model.

    Args:
        config: the model's.
        grid: rows and columns of visual tokens.
        previews: grids that are drawn before this one.
        num_rows: of the batch; guidance makes two of a picture.
        num_prompt: tokens of the longest prompt.
        num_levels: budgets whose retention is followed.
        itemsize: bytes of a number in K and V.
        on_gpu: where it runs; a GPU takes more rows at a time.
    """
    text = config.get_text_config(decoder=True)
    layers, kv_heads, heads = text.num_hidden_layers, text.num_key_value_heads, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    (rows, columns), cells = grid, count_cells(grid, previews)
    length = num_prompt + cells
    queries = heads * columns * head_dim * itemsize
    scores = kv_heads * num_levels * cells * 4
    of_row = 4 * heads * columns * length  # softmax weights of a layer, one row of the batch, float32
    chunk = min(num_rows * of_row, max(of_row, 4 * (GPU_CHUNK if on_gpu else CHUNK)))
    return WatchingCost(
        full_cache=layers * num_rows * kv_heads * 2 * head_dim * length * itemsize,
        held=layers * (num_rows * (queries + scores + 4 * cells) + 4 * kv_heads),
        sums=3 * layers * kv_heads * 2 * 8 * (rows * (2 * columns - 1) + 6 + bool(previews) + 5 * num_levels),
        # three copies of a chunk in the softmax; then one, and float64 sums over rows, a dozen times a row of it
        moment=chunk + max(5 * chunk // 2, 13 * of_row),
    )
