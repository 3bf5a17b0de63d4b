"""`SlotStore`: the prompt and the kept visual tokens of heads with equally many slots, and the attention they received.

Tokens are written into free slots, nothing is concatenated per step, and eviction moves rows in place. A store does not
depend on other stores, on models, or on how attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from ssd_cache.cache.eviction import compact, select_victims
from ssd_cache.cache.online import prefers_window
from ssd_cache.cache.plans import GroupPlan
from ssd_cache.cache.scorers import attention_weights

Slot = int | torch.Tensor
"""A slot: an int in an eager step, a 0-d int64 tensor in a static step, where no Python number may change."""


def normal_tensors() -> AbstractContextManager:
    """Inside the block, make tensors that can be written in place later, also outside of `torch.inference_mode`."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


class SlotStore:
    """K and V of one group of heads.

    One token takes `slot = reserve()`, then `write(slot, keys, values)`, then `hold(slot, query)` for scoring. Slots
    fill in order; an eviction moves the kept tokens to the front and frees the last `buffer` slots. The queries between
    two evictions form query windows that end where the slots end, so nothing is evicted within a window.

    Args:
        plan: the heads and their eviction rule.
        keys, values: the whole prompt, `[batch, heads, num_prompt, head_dim]`.
        mask: `[batch, num_prompt]`, False on padding, or None if there is none.
        queries: an example of a step's queries, `[batch, kv_heads, groups, head_dim]`, if queries are to be held.
        scaling: factor on the products of queries and keys, as in the model's attention.

    Attributes:
        keys, values: `[batch, heads, num_prompt + num_slots, head_dim]`; slots from `num_stored` on are free.
        mask: `[batch, num_prompt + num_slots]`, False on padding, or None.
        positions: `[batch, heads, num_slots]`, int32, number of the visual token in each slot, counted from 0.
        received: `[batch, num_semantic, num_slots]`, float32, the attention received; without heads if not needed.
        queries: `[batch, num_semantic, groups, buffer, head_dim]`, queries whose attention is not yet in `received`.
        num_seen: visual tokens seen.
        num_stored: visual tokens stored in each head; the next token takes this slot or, after an eviction, another.
        num_scored: of these, the tokens whose queries are already in `received`.
        labels: `[heads]`, True for heads that an online store has found to be spatial, in their order before that.
    """

    STATES: tuple[str, ...] = ("keys", "values")
    """Attributes that hold K and V."""

    def __init__(
        self,
        plan: GroupPlan,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        queries: torch.Tensor | None = None,
        scaling: float = 1.0,
    ):
        self.plan, self.scaling = plan, scaling
        batch, heads, self.num_prompt, _ = keys.shape
        num_slots, device = plan.num_slots, keys.device
        self._allocate(keys, values)
        self.positions = torch.zeros(batch, heads, num_slots, dtype=torch.int32, device=device)
        num_scored = plan.num_semantic if plan.holds_queries else 0
        self.received = torch.zeros(batch, num_scored, num_slots, device=device)
        self.queries: torch.Tensor | None = None
        if queries is not None and num_scored:
            _, _, groups, head_dim = queries.shape
            self.queries = queries.new_empty(batch, num_scored, groups, plan.buffer, head_dim)
        self.mask: torch.Tensor | None = None
        if mask is not None:
            self.mask = torch.ones(batch, self.num_prompt + num_slots, dtype=torch.bool, device=device)
        self.begin(keys, values, mask)

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Allocate K and V."""
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], self.num_prompt + self.plan.num_slots, states.shape[3])
            for states in (keys, values)
        )

    def begin(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Begin an image: take its prompt into the tensors that are here; shapes as for `SlotStore`."""
        self.keys[:, :, : self.num_prompt] = keys
        self.values[:, :, : self.num_prompt] = values
        if self.mask is not None and mask is not None:
            self.mask[:, : self.num_prompt] = mask
        self.received.zero_()
        self.num_seen = self.num_stored = self.num_scored = 0
        self.labels: torch.Tensor | None = None

    @property
    def room(self) -> int:
        """Tokens that the next `reserve` can take at once: those before the next query window ends."""
        return self.plan.buffer - self._place_in_window(self.num_stored)

    def reserve(self, n: int = 1) -> int:
        """Reserve slots for the next `n` visual tokens; score and evict first if it is time.

        Returns:
            The first of the slots, which are consecutive.

        Raises:
            ValueError: `n` exceeds `room`, so that an eviction would be due among these tokens.
        """
        if not 1 <= n <= self.room:
            raise ValueError(f"{n} tokens at once, and there is room for 1 to {self.room} before the next eviction")
        if not self._place_in_window(self.num_stored):  # a query window ends, and another begins
            self.score_window()
            if self.num_stored == self.plan.num_slots:
                self._evict()
            if self.queries is None:  # otherwise its attention is added at its end
                self.plan.scorer.begin_window(self.received)
        slot = self.num_stored
        for index in range(n):
            self.positions[:, :, slot + index] = self.num_seen + index
        self.num_stored += n
        self.num_seen += n
        return slot

    def write(self, slot: Slot, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens into slots from `slot` on; K and V `[batch, heads, n, head_dim]`."""
        column = self.num_prompt + slot
        put(self.keys, column, keys)
        put(self.values, column, values)

    def states(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V that the token in `slot` attends to: up to this slot, or in a static step all, see `visible`."""
        end = self.num_prompt + slot + 1 if isinstance(slot, int) else None
        return self.keys[:, :, :end], self.values[:, :, :end]

    def visible(self, slot: Slot) -> torch.Tensor | None:
        """Mask of the columns of `states(slot)`, `[batch or 1, 1, 1, columns]`; None if all are visible."""
        if isinstance(slot, int):
            return None if self.mask is None else self.mask[:, None, None, : self.num_prompt + slot + 1]
        columns = torch.arange(self._num_columns, device=self.keys.device)
        mask = (columns <= self.num_prompt + slot)[None, None, None]
        return mask if self.mask is None else mask & self.mask[:, None, None]

    @property
    def _num_columns(self) -> int:
        """Number of prompt tokens and slots, read from the tensors, because compiled steps may have dynamic sizes."""
        return self.keys.shape[2]

    def hold(self, slot: Slot, query: torch.Tensor) -> None:
        """Hold the query of the token in `slot`, `[batch, heads, groups, head_dim]`, until its window is scored."""
        if self.queries is None:
            return
        query = query[:, : self.queries.shape[1], :, None].to(self.queries.dtype)
        put(self.queries, self._place_in_window(slot), query, dim=3)

    def _place_in_window(self, slot):
        """Number of the token's query in its query window."""
        return (slot - self.plan.num_slots) % self.plan.buffer

    def window_weights(self) -> torch.Tensor:
        """Softmax weights of the held queries, float32, `[batch, semantic, groups, steps, num_prompt + num_stored]`.

        Exact, because nothing was evicted after the first of them. The last query is the newest token's.
        """
        assert self.queries is not None
        end = self._place_in_window(self.num_stored - 1) + 1
        num_held = self.num_stored - self.num_scored
        return attention_weights(
            self.queries[:, :, :, end - num_held : end],
            self._scored_keys(),
            self.scaling,
            num_prompt=self.num_prompt,
            num_first=self.num_scored + 1,
            prompt_mask=None if self.mask is None else self.mask[:, : self.num_prompt],
        )

    def _scored_keys(self) -> torch.Tensor:
        """Keys that the held queries saw, `[batch, num_semantic, num_prompt + num_stored, head_dim]`."""
        return self.keys[:, : self.plan.num_semantic, : self.num_prompt + self.num_stored]

    def score_window(self) -> None:
        """Add the attention of the held queries to what the tokens received."""
        if self.queries is not None and self.num_scored < self.num_stored:
            weights = self.window_weights()
            if self.plan.is_online and self.num_stored == self.plan.num_slots:
                # tokens older than the held queries, in the order of arrival
                ranks = self._rank(self.num_scored, slice(self.num_scored))
                self.labels = prefers_window(weights, ranks, self.num_prompt, self.plan.num_recent)
            self.plan.scorer.observe(self.received[..., : self.num_stored], weights[..., self.num_prompt :])
            if self.labels is not None and self.plan.is_online:
                self._sort_heads(self.labels.tolist())
        self.num_scored = self.num_stored

    def _sort_heads(self, labels: list[bool]) -> None:
        """Store the heads that were found to be semantic first."""
        order = sorted(range(len(labels)), key=lambda head: labels[head])
        index, num_semantic = torch.tensor(order, device=self.keys.device), labels.count(False)
        with normal_tensors():
            for name in (*self.STATES, "positions"):
                setattr(self, name, getattr(self, name)[:, index])
            self.received = self.received[:, index[:num_semantic]]
            if self.queries is not None:
                self.queries = self.queries[:, index[:num_semantic]]
        heads = tuple(self.plan.heads[head] for head in order)
        self.plan = replace(self.plan, heads=heads, num_semantic=num_semantic, is_online=False)

    def _rank(self, num_seen: int, slots: slice = slice(None)) -> torch.Tensor:
        """Ranks of the semantic heads' tokens in these slots, `[batch, num_semantic, slots]`."""
        semantic = slice(None), slice(self.plan.num_semantic), slots

        def states() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = self._visual_states()
            return keys[semantic], values[semantic]

        return self.plan.scorer.rank(self.received[..., slots], self.positions[semantic], num_seen, states)

    def _evict(self) -> None:
        plan = self.plan
        victims = select_victims(
            self.positions,
            self._rank(self.num_seen) if plan.num_semantic else None,
            plan.buffer,
            self.num_seen,
            num_recent=plan.num_recent,
            num_sinks=plan.num_sinks,
        )
        compact([*self._slot_tensors(), self.positions, self.received], victims)
        self.num_stored = self.num_scored = plan.num_slots - plan.buffer
        self.received[..., self.num_stored :] = 0

    def _visual_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all slots, `[batch, heads, num_slots, head_dim]`."""
        return self.keys[:, :, self.num_prompt :], self.values[:, :, self.num_prompt :]

    def _slot_tensors(self) -> list[torch.Tensor]:
        """Tensors with one row for each slot, `[batch, heads, num_slots, ...]`, that hold K and V."""
        return list(self._visual_states())

    def select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by `select(tensor)`, which picks, repeats or reorders rows of the batch."""
        with normal_tensors():
            for name in (*self.STATES, "positions", "received", "queries", "mask"):
                if (tensor := getattr(self, name)) is not None:
                    setattr(self, name, select(tensor))

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(getattr(self, name).nbytes for name in self.STATES)

    @property
    def bookkeeping_nbytes(self) -> int:
        """Bytes of everything else: positions, received attention, held queries, the prompt's mask."""
        tensors = (self.positions, self.received, self.queries, self.mask)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def put(target: torch.Tensor, index: Slot, states: torch.Tensor, dim: int = 2) -> None:
    """Write `states` into `target` along `dim`, from `index` on."""
    n = states.shape[dim]
    if isinstance(index, int):
        target.narrow(dim, index, n).copy_(states)
    else:
        target.index_copy_(dim, index.view(1) if n == 1 else index + torch.arange(n, device=target.device), states)
