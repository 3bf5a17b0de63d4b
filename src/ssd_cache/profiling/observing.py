"""The observer that computes head statistics from the attention of a `RecordingCache`.

It also simulates which tokens a semantic head would hold at every level. `profiling/statistics.py` defines the sums.
Nothing here evicts a token from a cache or labels a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from ssd_cache.cache.eviction import is_spared, lowest
from ssd_cache.layout import ImageLayout
from ssd_cache.profiling.statistics import HeadStatistics, Level


class HeadObserver:
    """Computes the `HeadStatistics` of one batch; `finish` returns them.

    In addition to the cache, it holds 4 bytes for every row, KV head, level and cell of the grid, in every layer
    (`retention`), and for short times a few copies of the weights that it receives.

    Args:
        layout, num_layers, num_kv_heads, levels: as for `HeadStatistics`.
        is_unconditional: boolean `[rows]`, True for guidance's unconditional rows of the batch.
    """

    def __init__(
        self,
        layout: ImageLayout,
        num_layers: int,
        num_kv_heads: int,
        levels: Sequence[Level],
        is_unconditional: torch.Tensor,
    ):
        self.statistics = HeadStatistics(layout, num_layers, num_kv_heads, levels)
        self.statistics.num_images = int((~is_unconditional).sum())
        self.branch = is_unconditional.long()
        self.num_rows = torch.bincount(self.branch, minlength=2).double()  # conditional, unconditional
        self.retention: dict[int, torch.Tensor] = {}  # by layer: `scores` of `retain`
        self._row_sums: torch.Tensor | None = None

    def observe(self, layer_idx: int, weights: torch.Tensor, num_prompt: int, rows: slice) -> None:
        """See `recorder.Observer.observe`."""
        batch, groups = len(self.branch), weights.shape[2]
        if not self.retention:
            self._move_to(weights.device)  # device of the first layer; a model can use several devices
        levels = self.statistics.levels
        if layer_idx not in self.retention:
            shape = batch, weights.shape[1], len(levels), self.layout.num_tokens
            self.retention[layer_idx] = weights.new_zeros(shape)
        branch = self.branch[rows].to(weights.device)
        prompt, visual = weights[..., :num_prompt].sum(-1), weights[..., num_prompt:]
        kept = retain(levels, self.retention[layer_idx][rows], prompt, visual)
        self._add(layer_idx, "semantic", _by_branch(kept, branch))
        # statistics that treat all rows alike are computed once, from the sum over rows
        sums = _by_branch(weights.sum(2) if groups > 1 else weights[:, :, 0], branch)
        self._row_sums = sums if self._row_sums is None else self._row_sums + sums
        if rows.stop == batch:
            sums, self._row_sums = self._row_sums.to(self.num_rows.device), None
            parts = sums[..., :num_prompt].sum(-1), sums[..., num_prompt:], groups * self.num_rows
            self._add_spatial(layer_idx, *parts)
            self._add_shares(layer_idx, *parts)

    def finish(self) -> HeadStatistics:
        """Return the statistics of the batch, on the CPU."""
        self._move_to(torch.device("cpu"))
        return self.statistics

    @property
    def layout(self) -> ImageLayout:
        return self.statistics.layout

    def _move_to(self, device: torch.device) -> None:
        self.branch = self.branch.to(device)
        home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.num_rows = self.num_rows.to(home)
        self.statistics.sums = {name: value.to(home) for name, value in self.statistics.sums.items()}

    def _add(self, layer_idx: int, name: str, values: torch.Tensor, level: int | None = None) -> None:
        """Add `[kv_heads, 2, ...]`, or a tensor that broadcasts to it, to a sum or to one level of a sum."""
        target = self.statistics.sums[name][layer_idx]
        (target if level is None else target[..., level]).add_(values.to(target.device))

    def _add_spatial(
        self, layer_idx: int, prompt: torch.Tensor, visual: torch.Tensor, num_queries: torch.Tensor
    ) -> None:
        """Add the attention that spatial heads retain. All rows hold the same tokens, so the sum over rows suffices.

        `prompt` is `[kv_heads, 2, steps]`, `visual` `[kv_heads, 2, steps, stored]`, `num_queries` (of a step) `[2]`.
        """
        before = F.pad(visual.cumsum(-1), (1, 0))  # [..., i]: tokens before i
        steps, stored = visual.shape[-2:]
        first = stored - steps
        for index, level in enumerate(self.statistics.levels):
            late = range(max(first, level.num_slots), stored)
            if late:
                step = torch.tensor(late, device=visual.device) - first
                oldest = torch.tensor([level.oldest(token) for token in late], device=visual.device)
                kept = before[:, :, step, stored] - before[:, :, step, oldest] + before[:, :, step, level.num_sinks]
                self._add(layer_idx, "spatial", (kept + prompt[:, :, step]).sum(-1), index)
                self._add(layer_idx, "evicting", num_queries * len(late), index)

    def _add_shares(
        self, layer_idx: int, prompt: torch.Tensor, visual: torch.Tensor, num_queries: torch.Tensor
    ) -> None:
        """Add offsets, prompt and margins of the counted queries; arguments as for `_add_spatial`."""
        (rows, columns), before = self.layout.grid, self.layout.num_draft_tokens
        steps, stored = visual.shape[-2:]
        row = (stored - steps - before) // columns
        if row < min(2, rows - 1):
            return
        self._add(layer_idx, "queries", num_queries * steps)
        self._add(layer_idx, "prompt", prompt.sum(-1))
        # the last row is one short, because the last token is not fed back
        visual = F.pad(visual, (0, columns - steps))
        if before:
            self._add(layer_idx, "previews", visual[..., :before].sum((2, 3)))
        by_cell = visual[..., before:].unflatten(-1, (row + 1, columns))
        by_cell = by_cell.transpose(2, 3)  # [kv_heads, 2, row above, step, column]
        column = torch.arange(columns, device=visual.device)
        is_margin = ((column == 0) | (column == columns - 1)).to(visual)
        self._add(layer_idx, "margin", (by_cell * is_margin).sum((2, 3, 4)))
        # a product with a one-hot matrix sums equal offsets in the same order on every device
        offset = column - column[:steps, None] + columns - 1
        bins = F.one_hot(offset.flatten(), 2 * columns - 1).to(visual)
        by_offset = by_cell.flatten(3) @ bins
        self.statistics.sums["offsets"][layer_idx, :, :, : row + 1] += by_offset.flip(2)


def retain(levels: Sequence[Level], scores: torch.Tensor, prompt: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Simulate which tokens the semantic heads of a layer would hold at each level during a grid row of queries.

    Args:
        levels: the caches that are simulated.
        scores: `[rows, kv_heads, levels, cells]`, float32, changed in place: attention received so far; -inf once
            evicted.
        prompt: `[rows, kv_heads, groups, steps]`, softmax weights of the full cache on the prompt.
        visual: `[rows, kv_heads, groups, steps, stored]`, on visual tokens.

    Returns:
        The attention that queries `t >= num_slots` retain, summed: `[rows, kv_heads, levels]`.
    """
    steps, stored = visual.shape[-2:]
    first = stored - steps
    retained = visual.new_zeros(scores.shape[:3])
    cuts = {step for level in levels for step in range(steps) if level.evicts_at(first + step)}
    for begin, end in pairwise(sorted(cuts | {0, steps})):  # no level evicts between begin and end
        start, stop = first + begin, first + end
        for index, level in enumerate(levels):
            if level.evicts_at(start):
                evict(scores[:, :, index, :start], level)
        part = visual[..., begin:end, :stop]
        is_held = (scores[..., :stop] > -torch.inf).to(part)[:, :, None]  # [rows, kv_heads, 1, levels, stop]
        kept = part @ is_held.mT + prompt[..., begin:end, None]  # [rows, kv_heads, groups, steps, levels]
        # renormalise, as the cache's softmax runs over kept tokens only; a sum below tiny means all weights are 0
        share = kept.clamp(min=torch.finfo(kept.dtype).tiny).reciprocal()
        scores[..., :stop] += (share.mT @ part).sum(2)
        is_late = torch.tensor([start >= level.num_slots for level in levels]).to(kept)
        retained += kept.sum((2, 3)) * is_late
    return retained


def evict(scores: torch.Tensor, level: Level) -> None:
    """Set the `buffer` lowest scores of each head to -inf; `scores` `[rows, kv_heads, seen]`, in the order of arrival.

    The `num_recent` newest and the `num_sinks` first tokens are kept. Of two equal scores the older token is evicted.
    """
    seen = scores.shape[-1]
    spared = is_spared(torch.arange(seen, device=scores.device), seen, level.num_recent, level.num_sinks)
    victims = lowest(scores, spared | (scores == -torch.inf), level.buffer)
    scores.scatter_(-1, victims, -torch.inf)


def _by_branch(values: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Sum `[rows, kv_heads, ...]` over conditional and over unconditional rows: `[kv_heads, 2, ...]`, float64."""
    sums = values.new_zeros(2, *values.shape[1:]).index_add_(0, branch, values).transpose(0, 1)
    return (sums.cpu() if sums.device.type == "mps" else sums).double()
