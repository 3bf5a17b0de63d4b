"""Storage for some heads of one layer: prompt and slots in one tensor, and their scores.

All heads of a store have equally many slots. Tokens are written into free slots, nothing is concatenated per step, and
eviction moves rows in place. A store does not depend on other stores, on models, or on how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from ssd_cache.cache.retention import (
    WITHOUT_QUERIES,
    attention_weights,
    compact,
    form_scores,
    prefers_window,
    select_victims,
)
from ssd_cache.head_map.learned_score import LearnedScore


def normal_tensors() -> AbstractContextManager:
    """Inside the block, make tensors that can be written in place later, also outside of `torch.inference_mode`."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


class SlotStore:
    """K and V of heads with equally many slots, the semantic heads first.

    Args:
        key_states, value_states: the whole prompt, `[batch, heads, num_prompt, head_dim]`.
        prompt_mask: `[batch, num_prompt]`, False on padding, or None if there is none.
        num_slots: slots for visual tokens in each head.
        num_semantic: number of semantic heads, which come first and keep tokens by score; the others keep them by age.
        buffer: eviction interval: tokens evicted at once, when a token arrives and all slots are taken.
        num_recent: newest tokens that a semantic head never drops.
        num_sinks: first tokens that no head drops.
        score: how semantic heads rank tokens (see `retention.form_scores`).
        columns: number of grid columns, for the score "margin".
        learned: learned score of the semantic heads, for the score "learned".
        is_online: find the spatial heads when the slots are first full, since they are not known yet.
        is_fused: the kernel of `kernels/dispatch.py` writes, attends and scores every step, so no query is held.

    Attributes:
        keys, values: `[batch, heads, num_prompt + num_slots, head_dim]`; slots from `num_stored` on are free.
        positions: `[batch, heads, num_slots]`, int32, number of the visual token in each slot, counted from 0.
        scores: `[batch, num_semantic, num_slots]`, float32, attention received so far; for "last", only from the last
            query window. For "margin" and "learned" it has no heads, since they need neither attention nor queries.
        queries: `[batch, num_semantic, groups, buffer, head_dim]`, queries whose attention is not yet in `scores`.
        found: `[heads]`, True for the heads found to be spatial, until `take_order` sorts them; otherwise None.
    """

    STATES: tuple[str, ...] = ("keys", "values")
    """Attributes that hold K and V."""

    def __init__(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        prompt_mask: torch.Tensor | None,
        *,
        num_slots: int,
        num_semantic: int,
        buffer: int,
        num_recent: int,
        num_sinks: int,
        score: str = "sum",
        columns: int = 1,
        learned: LearnedScore | None = None,
        is_online: bool = False,
        is_fused: bool = False,
    ):
        self.num_slots, self.num_semantic = num_slots, num_semantic
        self.buffer, self.num_recent, self.num_sinks = buffer, num_recent, num_sinks
        self.score, self.columns, self.learned = score, columns, learned
        self.num_stored = self.num_held = 0
        # the first scoring is early, so that the scoring before an eviction always covers a whole buffer
        self.num_to_hold = num_slots % buffer or buffer
        self.is_online, self.is_fused = is_online, is_fused
        self.found: torch.Tensor | None = None
        self.scaling = 1.0
        batch, heads, self.num_prompt, _ = key_states.shape
        self._open(key_states, value_states)
        self.positions = torch.zeros(batch, heads, num_slots, dtype=torch.int32, device=key_states.device)
        num_scored = 0 if score in WITHOUT_QUERIES else num_semantic
        self.scores = torch.zeros(batch, num_scored, num_slots, device=key_states.device)
        self.queries: torch.Tensor | None = None
        self.mask: torch.Tensor | None = None
        if prompt_mask is not None:
            self.mask = torch.ones(batch, self.num_prompt + num_slots, dtype=torch.bool, device=key_states.device)
            self.mask[:, : self.num_prompt] = prompt_mask

    def _open(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate K and V, and copy the prompt into them."""
        self.keys, self.values = (
            torch.zeros(
                *states.shape[:2],
                self.num_prompt + self.num_slots,
                states.shape[3],
                dtype=states.dtype,
                device=states.device,
            )
            for states in (key_states, value_states)
        )
        self.keys[:, :, : self.num_prompt] = key_states
        self.values[:, :, : self.num_prompt] = value_states

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor, position: int) -> None:
        """Store visual token number `position`, `[batch, heads, 1, head_dim]`; evict first if all slots are taken."""
        self.count(position)
        column = self.num_prompt + self.num_stored - 1
        self.keys[:, :, column] = key_states[:, :, 0]
        self.values[:, :, column] = value_states[:, :, 0]

    def count(self, position: int) -> None:
        """Reserve a slot for token number `position` before it is written; evict first if all slots are taken."""
        if self.num_stored == self.num_slots:
            self._evict(position)
        if self.is_fused and self.score == "last" and (position - self.num_slots) % self.buffer == 0:
            self.scores.zero_()  # a query window begins
        self.positions[:, :, self.num_stored] = position
        self.num_stored += 1

    def write_at(self, step: torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write the token of a static step; `step` is its number as a 0-d tensor, so that no shape changes."""
        column = (self.num_prompt + self._slot_at(step)).view(1)
        self.keys.index_copy_(2, column, key_states)
        self.values.index_copy_(2, column, value_states)

    def _slot_at(self, step: torch.Tensor) -> torch.Tensor:
        """The slot of token number `step`: slots fill in order; then the last `buffer` slots are refilled in order."""
        after = self.num_slots - self.buffer + (step - self.num_slots) % self.buffer
        return torch.where(step < self.num_slots, step, after)

    @property
    def num_after_append(self) -> int:
        """Number of visual tokens stored after the next one has arrived."""
        left = self.num_slots - self.buffer if self.num_stored == self.num_slots else self.num_stored
        return left + 1

    def states(self, num_slots: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the prompt and the first slots, or all: `[batch, heads, num_prompt + slots, head_dim]`."""
        end = None if num_slots is None else self.num_prompt + num_slots
        return self.keys[:, :, :end], self.values[:, :, :end]

    def visible(self) -> torch.Tensor | None:
        """Mask of the stored columns, `[batch, 1, 1, num_prompt + num_stored]`, False on padding; None if none."""
        return None if self.mask is None else self.mask[:, None, None, : self.num_prompt + self.num_stored]

    def hold_query(self, query_states: torch.Tensor, scaling: float) -> None:
        """Hold the newest token's query, `[batch, heads, groups, head_dim]`, until its query window is scored."""
        if not self.scores.shape[1]:
            return
        query_states = query_states[:, : self.num_semantic]
        if self.queries is None:
            batch, heads, groups, head_dim = query_states.shape
            with normal_tensors():
                self.queries = query_states.new_empty(batch, heads, groups, self.buffer, head_dim)
        self.scaling = scaling
        self.queries[:, :, :, self.num_held] = query_states
        self.num_held += 1

    def count_query(self) -> None:
        """Count a query before `hold_query_at` holds it; `hold_query` must have held at least one before."""
        if self.scores.shape[1] and not self.is_fused:
            self.num_held += 1

    def hold_query_at(self, step: torch.Tensor, query_states: torch.Tensor) -> None:
        """Hold the query of a static step (see `write_at`), which `count_query` has already counted."""
        if self.queries is None:
            return
        first = self.num_slots % self.buffer
        index = torch.where(step < first, step, (step - first) % self.buffer).view(1)
        self.queries.index_copy_(3, index, query_states[:, : self.num_semantic].unsqueeze(3))

    def score_due(self) -> None:
        """Score the held queries if their query window is complete; call before the next token is counted."""
        if self.num_held == self.num_to_hold:
            self.score_held()

    def visible_at(self, step: torch.Tensor) -> torch.Tensor:
        """Mask of the columns that a static step's token attends to, `[batch or 1, 1, 1, num_prompt + num_slots]`."""
        columns = torch.arange(self._num_columns, device=self.keys.device)
        mask = (columns <= self.num_prompt + self._slot_at(step))[None, None, None]
        return mask if self.mask is None else mask & self.mask[:, None, None]

    @property
    def _num_columns(self) -> int:
        """Number of prompt tokens and slots, read from the tensors, because compiled steps may have dynamic sizes."""
        return self.keys.shape[2]

    def held_attention(self, rows: slice = slice(None)) -> torch.Tensor:
        """Softmax weights of the held queries, float32, `[rows, num_semantic, groups, held, num_prompt + num_stored]`.

        Exact, because nothing was evicted after the first of them. The last query is the newest token's.
        """
        assert self.queries is not None
        return attention_weights(
            self.queries[rows, :, :, : self.num_held],
            self._scored_keys(rows),
            self.scaling,
            num_prompt=self.num_prompt,
            num_first=self.num_stored - self.num_held + 1,
            prompt_mask=None if self.mask is None else self.mask[rows, : self.num_prompt],
        )

    def _scored_keys(self, rows: slice) -> torch.Tensor:
        """Keys that the held queries saw, `[rows, num_semantic, num_prompt + num_stored, head_dim]`."""
        return self.keys[rows, : self.num_semantic, : self.num_prompt + self.num_stored]

    def score_held(self) -> None:
        """Add the attention of the held queries, one query window, to the scores, and discard the queries."""
        if self.num_held == 0:
            return
        weights = self.held_attention()
        if self.is_online and self.num_stored == self.num_slots:
            before = slice(self.num_stored - self.num_held)  # tokens older than the held queries, in order of arrival
            ranks = self._ranks(before.stop, before)
            self.found = prefers_window(weights, ranks, self.num_prompt, self.num_recent)
            self.is_online = False
        if self.score == "last":
            self.scores.zero_()
        self.scores[:, :, : self.num_stored] += weights[..., self.num_prompt :].sum((2, 3))
        self.num_held, self.num_to_hold = 0, self.buffer

    def take_order(self, order: torch.Tensor, num_semantic: int) -> None:
        """Reorder the heads after their labels are found, the semantic ones first."""
        with normal_tensors():
            for name in self.STATES:
                setattr(self, name, getattr(self, name)[:, order])
            self.positions, self.scores = self.positions[:, order], self.scores[:, order[:num_semantic]]
            if self.queries is not None:
                self.queries = self.queries[:, order[:num_semantic]]
        self.num_semantic, self.found = num_semantic, None

    def _ranks(self, num_seen: int, slots: slice = slice(None)) -> torch.Tensor:
        """Scores of the semantic heads' tokens in these slots, `[batch, num_semantic, slots]`."""
        positions = self.positions[:, : self.num_semantic, slots]
        if self.learned is not None:
            visual = (states[:, : self.num_semantic, self.num_prompt :] for states in self.states())
            keys, values = (states[:, :, slots] for states in visual)
            return self.learned.of_places(positions, num_seen) + self.learned.of_states(keys, values)
        return form_scores(self.score, self.scores[..., slots], positions, num_seen, self.columns)

    def _evict(self, num_seen: int) -> None:
        self.score_held()
        victims = select_victims(
            self.positions,
            self._ranks(num_seen),
            self.buffer,
            num_seen,
            num_recent=self.num_recent,
            num_sinks=self.num_sinks,
        )
        compact([*self._slots(), self.positions, self.scores], victims)
        self.num_stored -= self.buffer
        self.scores[:, :, self.num_stored :] = 0

    def _slots(self) -> list[torch.Tensor]:
        """Tensors with K and V of the visual tokens, `[batch, heads, num_slots]`, with or without `head_dim`."""
        return [self.keys[:, :, self.num_prompt :], self.values[:, :, self.num_prompt :]]

    def select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by `select(tensor)`, which picks, repeats or reorders rows of the batch."""
        with normal_tensors():
            for name in (*self.STATES, "positions", "scores", "queries", "mask"):
                if (tensor := getattr(self, name)) is not None:
                    setattr(self, name, select(tensor))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that a static step reads or writes."""
        found = [*(getattr(self, name) for name in self.STATES), self.scores, self.queries, self.mask]
        return (tensor for tensor in found if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(getattr(self, name).nbytes for name in self.STATES)

    @property
    def bookkeeping_nbytes(self) -> int:
        """Bytes of everything else: positions, scores, held queries, the prompt's mask."""
        tensors = (self.positions, self.scores, self.queries, self.mask)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
