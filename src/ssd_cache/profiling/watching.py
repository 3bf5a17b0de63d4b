"""A full cache that passes the attention of every step to an observer and never stores an attention matrix.

It holds the queries of a grid row and computes their softmax once per grid row, for a few batch rows at a time. It
reports attention that is not finite, for all observers. Observers process the attention: `profiling/observing.py` sums
it up, `analysis` plots it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from transformers import Cache

from ssd_cache.cache.layer import LayerPlan, SSDLayer
from ssd_cache.cache.slots import SlotStore
from ssd_cache.layout import ImageLayout
from ssd_cache.runs.run_state import ProfilingError

CHUNK = 1 << 18
"""Softmax weights computed at once: 1 MB in float32, so that the extra memory does not grow with the batch."""

GPU_CHUNK = 1 << 22
"""The same on any other device: 16 MB, because on less work the kernel launch would dominate."""


class Observer(Protocol):
    """Receives attention during generation."""

    def observe(self, layer_idx: int, weights: torch.Tensor, num_prompt: int, rows: slice) -> None:
        """Receive the attention of one grid row of queries (the last row is one short), for some rows of the batch.

        Draft grids are split into parts of the same number of queries, so that the image's own grid rows arrive whole;
        the first part may be shorter.

        Args:
            layer_idx: the decoder layer.
            weights: `[rows, kv_heads, groups, steps, num_prompt + stored]`, float32, summing to 1 over the last
                dimension. The last step is visual token `stored - 1`, counted from 0. Nothing was evicted, so visual
                token `j` is in column `num_prompt + j`. Tokens that a step cannot see yet have weight 0.
            num_prompt: columns of the prompt, padding included; padding has weight 0.
            rows: the rows of the batch that the weights belong to.
        """


class WatchingCache(Cache):
    """A full cache for one batch of images that records attention; call `finish` after generation.

    Args:
        layout: the grids of an image.
        num_layers: decoder layers.
        num_kv_heads: KV heads in each layer.
        observer: receives all attention.
        num_queries: queries whose attention is computed at once, and passed to the observer. Default: a grid row.
    """

    def __init__(
        self,
        layout: ImageLayout,
        num_layers: int,
        num_kv_heads: int,
        observer: Observer,
        *,
        num_queries: int | None = None,
    ):
        cells, buffer = layout.num_tokens, num_queries or layout.grid[1]
        slots, recent = (cells,) * num_kv_heads, (0,) * num_kv_heads
        # one cell more than the grid has, so that the layer treats every head as scored
        plans = [
            LayerPlan(layer, (False,) * num_kv_heads, slots, cells + 1, buffer, recent, 0)
            for layer in range(num_layers)
        ]
        super().__init__(layers=[_WatchingLayer(plan, observer) for plan in plans])

    def finish(self) -> None:
        """Pass the last, incomplete grid row to the observer; transformers never feeds back an image's last token.

        Raises:
            ProfilingError: some attention was NaN; the message names the first such layer and its KV heads.
        """
        for index, layer in enumerate(self.layers):
            for store in layer.stores:
                store.score_held()
                heads = (~store.soundness.isfinite()).nonzero().flatten().tolist()
                if heads:
                    raise ProfilingError(
                        f"the attention of layer {index}, KV head {', '.join(map(str, heads))}, is NaN: the model's "
                        "numbers overflow, as they may in float16; load it in bfloat16 or float32"
                    )

    @property
    def watching_nbytes(self) -> int:
        """Bytes held in addition to K and V, without those of the observer."""
        return sum(layer.bookkeeping_nbytes for layer in self.layers)


class _WatchingStore(SlotStore):
    """Slots that keep every token and pass its attention to the observer instead of to scores."""

    def __init__(self, *args, layer_idx: int, observer: Observer, **kwargs):
        super().__init__(*args, **kwargs)
        # nothing is evicted, so no scores are needed, and all heads can share one row of positions
        self.scores, self.positions = self.scores[..., :0].clone(), self.positions[:, :1].clone()
        self.layer_idx, self.observer = layer_idx, observer
        # a NaN stays in this sum, so one check at the end suffices and no GPU synchronisation is needed before
        self.soundness = self.keys.new_zeros(self.keys.shape[1], dtype=torch.float32)

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, position: int) -> None:
        if self.num_stored == self.num_slots:
            raise ValueError(
                f"a token arrives after the {self.num_slots} of the grid: the model's grid is another, or this cache "
                "was used for a second picture; it serves one batch of pictures"
            )
        super().append(key_states, value_states, position)

    def score_held(self) -> None:
        if self.queries is None or self.num_held == 0:
            return
        batch, heads, groups = self.queries.shape[:3]
        of_row = heads * groups * self.num_held * (self.num_prompt + self.num_stored)
        num_rows = max(1, (CHUNK if self.keys.device.type == "cpu" else GPU_CHUNK) // of_row)
        for start in range(0, batch, num_rows):
            rows = slice(start, min(start + num_rows, batch))
            weights = self.held_attention(rows)
            self.soundness += weights[..., 0].sum((0, 2, 3))  # one column suffices: a softmax is NaN in all or in none
            self.observer.observe(self.layer_idx, weights, self.num_prompt, rows)
        self.num_held, self.num_to_hold = 0, self.buffer

    @property
    def bookkeeping_nbytes(self) -> int:
        return super().bookkeeping_nbytes + self.soundness.nbytes


class _WatchingLayer(SSDLayer):
    def __init__(self, plan: LayerPlan, observer: Observer):
        self.observer = observer
        super().__init__(plan)

    def make_store(self, *args, **kwargs) -> SlotStore:
        return _WatchingStore(*args, layer_idx=self.plan.layer_idx, observer=self.observer, **kwargs)

    def use_kernel(self, can_serve: bool) -> None:
        """Never use the kernel: it does not return the attention weights."""
