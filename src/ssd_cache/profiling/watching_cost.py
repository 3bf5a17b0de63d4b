"""Memory cost of recording attention from a full cache, computed from a model's sizes before generation.

The formulas describe the tensors of `profiling/recorder.py` and `profiling/observing.py`; tests compare them with the
real tensors. Nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ssd_cache.layout import Grid, count_cells
from ssd_cache.profiling.recorder import CHUNK, GPU_CHUNK


@dataclass(frozen=True)
class WatchingCost:
    """Bytes of one profiling run with batches of one size.

    Attributes:
        full_cache: K and V of the images, which plain generation holds too.
        held: bytes held from one grid row to the next: queries of a grid row, scores of the levels, positions.
        sums: the statistics of a batch, those of the run, and their sum; independent of the batch size.
        moment: peak while the softmax of a grid row is computed and summed, for a few rows of the batch at a time.
    """

    full_cache: int
    held: int
    sums: int
    moment: int

    @property
    def share(self) -> float:
        """All extra bytes together, as a share of the full cache."""
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
    """Compute the bytes for a model.

    Args:
        config: the model's configuration.
        grid: rows and columns of visual tokens.
        previews: draft grids that are generated before this grid.
        num_rows: rows of the batch; guidance needs two per image.
        num_prompt: tokens of the longest prompt.
        num_levels: budgets whose retention is simulated.
        itemsize: bytes of a number in K and V.
        on_gpu: whether it runs on a GPU, which processes more rows at a time.
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
        # the softmax needs three copies of a chunk; later one chunk, and float64 sums over rows of a dozen rows' size
        moment=chunk + max(5 * chunk // 2, 13 * of_row),
    )
