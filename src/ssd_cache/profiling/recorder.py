"""A full cache that passes the attention of every step to an observer and never stores an attention matrix.

It holds the queries of a grid row and computes their softmax once per grid row, for a few batch rows at a time.
Observers process the attention: `profiling/observing.py` sums it up, `analysis` plots it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ssd_cache._compat import in_prefill
from ssd_cache.cache.layer import USE_SSD_ATTENTION
from ssd_cache.cache.scorers import attention_weights
from ssd_cache.layout import ImageLayout
from ssd_cache.runs.run_state import ProfilingError

CHUNK, GPU_CHUNK = 1 << 18, 1 << 22
"""Softmax weights computed at once: 1 MB on a CPU, 16 MB elsewhere, where launching kernels would dominate."""


class Observer(Protocol):
    """Receives attention during generation."""

    def observe(self, layer_idx: int, weights: torch.Tensor, num_prompt: int, rows: slice) -> None:
        """Receive the attention of one grid row of queries (the last row is one short), for some rows of the batch.

        Draft grids are split into parts of the same number of queries, of which the first may be shorter. The rows of
        the image's grid therefore arrive whole.

        Args:
            layer_idx: the decoder layer.
            weights: `[rows, kv_heads, groups, steps, num_prompt + stored]`, float32, summing to 1 over the last
                dimension. The last step is visual token `stored - 1`, counted from 0. Nothing was evicted, so visual
                token `j` is in column `num_prompt + j`. Tokens that a step cannot see yet have weight 0.
            num_prompt: columns of the prompt, padding included; padding has weight 0.
            rows: the rows of the batch that the weights belong to.
        """


class RecordingCache(Cache):
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
        sizes = num_kv_heads, layout.num_tokens, num_queries or layout.grid[1]
        super().__init__(layers=[RecordingLayer(index, *sizes, observer) for index in range(num_layers)])

    def finish(self) -> None:
        """Pass the last, incomplete grid row to the observer; transformers never feeds back an image's last token.

        Raises:
            ProfilingError: some attention was NaN; the message names the first such layer and its KV heads.
        """
        for layer in self.layers:
            layer.report()
            if heads := (~layer.soundness.isfinite()).nonzero().flatten().tolist():
                raise ProfilingError(
                    f"the attention of layer {layer.layer_idx}, KV head {', '.join(map(str, heads))}, is NaN: the "
                    "model's numbers overflow, as they may in float16; load it in bfloat16 or float32"
                )


class RecordingLayer(DynamicLayer):
    """A layer of a full cache that reports the attention of its visual queries.

    Attributes:
        num_prompt: tokens of the prompt.
        num_visual: visual tokens seen.
        queries: `[batch, kv_heads, groups, num_queries, head_dim]`, of which the first `num_held` wait to be reported.
        soundness: `[kv_heads]`, float32, not finite where some attention was NaN.
    """

    keys: Any
    values: Any

    def __init__(self, layer_idx: int, num_kv_heads: int, num_cells: int, num_queries: int, observer: Observer):
        super().__init__()
        self.layer_idx, self.num_kv_heads, self.observer = layer_idx, num_kv_heads, observer
        self.num_cells, self.num_queries = num_cells, num_queries
        self.num_prompt = self.num_visual = self.num_held = 0
        self._query_missing = False
        self._storage: list[torch.Tensor] = []  # K and V with room for the whole image
        self.prompt_mask: torch.Tensor | None = None
        self.queries: torch.Tensor | None = None
        self.soundness = torch.zeros(num_kv_heads)

    def reset(self) -> None:
        """Free all K and V; a layer serves one batch of images."""
        self.keys = self.values = self.queries = None
        self._storage = []
        self.is_initialized = False

    @property
    def in_prompt(self) -> bool:
        return self.num_visual == 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if self._query_missing:
            raise ValueError(
                f"layer {self.layer_idx} of RecordingCache does not get to see the model's queries: the model's "
                f"attention is not 'ssd'. Remedy: {USE_SSD_ATTENTION}."
            )
        self._query_missing = True
        if self.in_prompt and (self.num_prompt == 0 or key_states.shape[2] > 1 or in_prefill()):
            self.num_prompt += key_states.shape[2]
        else:
            if self.num_visual == self.num_cells or key_states.shape[2] > 1:
                raise ValueError(
                    f"a token arrives after the {self.num_visual} of the grid's {self.num_cells}: the model's grid is "
                    "another, or this cache was used for a second image; it serves one batch of images"
                )
            if (self.num_visual - self.num_cells) % self.num_queries == 0:  # for a grid row: it is complete
                self.report()
            self.num_visual += 1
        if self.in_prompt:
            keys, values = super().update(key_states.detach(), value_states.detach(), *args, **kwargs)
        else:
            keys, values = self._append(key_states.detach(), value_states.detach())
        keys = keys[:]  # an alias: `self.keys` with a reference to `self` would be a cycle
        keys.ssd_layer = self
        return keys, values

    def _append(self, *new: torch.Tensor) -> Sequence[torch.Tensor]:
        """Write a visual token in place; `DynamicLayer` would copy all K and V, and leave gaps in the CPU's memory."""
        if not self._storage:
            self._storage = [F.pad(states, (0, 0, 0, self.num_cells)) for states in (self.keys, self.values)]
        held = self.num_prompt + self.num_visual
        for storage, states in zip(self._storage, new, strict=True):
            storage[:, :, held - 1 : held] = states
        self.keys, self.values = found = [storage[:, :, :held] for storage in self._storage]
        return found

    def see_prompt(
        self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float, window: int | None, dropout: float = 0.0
    ) -> None:
        """See `SSDLayer.see_prompt`."""
        self.prompt_mask, self._query_missing = mask, False
        self.soundness = self.soundness.to(query.device)

    def attend(self, query: torch.Tensor, key: Any, value: Any, scaling: float, dropout: float) -> torch.Tensor:
        """See `SSDLayer.attend`."""
        if self.queries is None:
            self.queries = query.new_empty(*query.shape[:3], self.num_queries, query.shape[3])
        self.queries[:, :, :, self.num_held] = query.detach()
        self.num_held, self.scaling, self._query_missing = self.num_held + 1, scaling, False
        mask = None
        if self.prompt_mask is not None:
            mask = F.pad(self.prompt_mask, (0, self.num_visual), value=True)[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)

    def report(self) -> None:
        """Pass the attention of the held queries to the observer, a few batch rows at a time."""
        if self.queries is None or self.keys is None or not self.num_held:
            return
        batch, heads, groups = self.queries.shape[:3]
        of_row = heads * groups * self.num_held * self.keys.shape[2]
        num_rows = max(1, (CHUNK if self.keys.device.type == "cpu" else GPU_CHUNK) // of_row)
        for start in range(0, batch, num_rows):
            rows = slice(start, min(start + num_rows, batch))
            weights = attention_weights(
                self.queries[rows, :, :, : self.num_held],
                self.keys[rows],
                self.scaling,
                num_prompt=self.num_prompt,
                num_first=self.num_visual - self.num_held + 1,
                prompt_mask=None if self.prompt_mask is None else self.prompt_mask[rows],
            )
            # One column suffices: a softmax is NaN in all or in none. A NaN stays in this sum, so one check at the end
            # suffices and no GPU synchronisation is needed before.
            self.soundness += weights[..., 0].sum((0, 2, 3))
            self.observer.observe(self.layer_idx, weights, self.num_prompt, rows)
        self.num_held = 0
