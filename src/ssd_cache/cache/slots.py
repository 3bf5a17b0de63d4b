"""`SlotStore`: the prompt and the kept visual tokens of heads with equally many slots, and the attention they received.

Tokens are written into free slots, nothing is concatenated per step, and eviction moves rows in place. A store does not
depend on other stores, on models, or on how attention is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from ssd_cache.cache.eviction import slot_of
from ssd_cache.cache.fused_eviction import Ranks, Slots, evict
from ssd_cache.cache.plans import GroupPlan
from ssd_cache.cache.scorers import attention_weights

Slot = int | torch.Tensor
"""A slot: an int in an eager step, a 0-d int64 tensor in a static step, where no Python number may change."""


def normal_tensors() -> AbstractContextManager:
    """Inside the block, make tensors that can be written in place later, also outside of `torch.inference_mode`."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


NUM_AHEAD = 512
"""Visual tokens whose slots `StaticSlots` computes at once."""


class SlotStore:
    """K and V of one group of heads.

    An image starts with `begin`. One token then takes `slot = reserve()`, `write(slot, keys, values)`, and
    `hold(slot, query)` for scoring. Slots fill in order; an eviction moves the kept tokens to the front and frees the
    last `buffer` slots. The queries between two evictions form query windows that end where the slots end, so nothing
    is evicted within a window.

    Args:
        plan: the heads and their eviction rule.
        keys, values: a prompt of the layer, `[batch, kv_heads, num_prompt, head_dim]`, for sizes, dtype and device.
        has_mask: whether prompts are padded.
        num_groups: query heads of a KV head if queries are to be held for scoring, else 0.
        scaling: factor on the products of queries and keys, as in the model's attention.

    Attributes:
        keys, values: `[batch, heads, num_prompt + num_slots, head_dim]`; slots from `num_stored` on are free.
        mask: `[batch, num_prompt + num_slots]`, False on padding, or None.
        positions: `[batch, heads, num_slots]`, int32, number of the visual token in each slot, counted from 0; in a
            free slot, of the token that it will hold.
        received: `[batch, num_semantic, num_slots]`, float32, the attention received; without heads if not needed.
        worth: `[batch, num_semantic, num_slots]`, float32, the part of each token's rank that never changes; without
            heads if the scorer has none.
        queries: `[batch, num_semantic, num_groups, buffer, head_dim]`, queries whose attention is not yet in
            `received`; None if the kernel adds it at once, or no token is scored.
        num_seen: visual tokens seen.
        num_stored: visual tokens stored in each head; the next token takes this slot or, after an eviction, another.
        num_scored: of these, the tokens whose queries are already in `received`, or whose worth is in `worth`.
    """

    STATES: tuple[str, ...] = ("keys", "values")
    """Attributes that hold K and V. Every tensor of a store has the rows of the batch as its first dimension."""

    kv_dtype: str | None = None
    """The format of the slots, one of `eight_bits.KV_DTYPES`; None if it is the model's dtype."""

    def __init__(
        self,
        plan: GroupPlan,
        keys: torch.Tensor,
        values: torch.Tensor,
        has_mask: bool = False,
        num_groups: int = 0,
        scaling: float = 1.0,
    ):
        self.plan, self.scaling = replace(plan, scorer=plan.scorer.to(keys.device)), scaling
        batch, _, self.num_prompt, head_dim = keys.shape
        heads, num_slots, device = len(plan.heads), plan.num_slots, keys.device
        num_received = plan.num_semantic if plan.is_scored else 0
        num_worth = plan.num_semantic if plan.scorer.has_worth else 0
        self._allocate(keys, values)
        self.positions = torch.zeros(batch, heads, num_slots, dtype=torch.int32, device=device)
        self.received = torch.zeros(batch, num_received, num_slots, device=device)
        self.worth = torch.zeros(batch, num_worth, num_slots, device=device)
        self.queries = self.mask = None
        if num_groups and num_received:
            self.queries = keys.new_empty(batch, num_received, num_groups, plan.buffer, head_dim)
        if has_mask:
            self.mask = torch.ones(batch, self.num_prompt + num_slots, dtype=torch.bool, device=device)

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Allocate K and V."""
        shape = len(keys), len(self.plan.heads), self.num_prompt + self.plan.num_slots
        self.keys, self.values = (states.new_zeros(*shape, states.shape[3]) for states in (keys, values))

    def begin(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Begin an image with its prompt.

        K and V are `[batch, heads, num_prompt, head_dim]`, the mask `[batch, num_prompt]`, False on padding.
        """
        self.keys[:, :, : self.num_prompt] = keys
        self.values[:, :, : self.num_prompt] = values
        if self.mask is not None and mask is not None:
            self.mask[:, : self.num_prompt] = mask
        self.received.zero_()
        self.num_seen = self.num_stored = self.num_scored = 0
        self.positions[:] = torch.arange(self.plan.num_slots, device=self.positions.device)

    def reserve(self, n: int = 1) -> int:
        """Reserve slots for the next `n` visual tokens; score and evict first if it is time.

        Returns:
            The first of the slots, which are consecutive.

        Raises:
            ValueError: an eviction would be due among these tokens.
        """
        place = self._place_in_window(self.num_stored)
        if not 1 <= n <= self.plan.buffer - place:
            raise ValueError(f"n={n} tokens at once: give 1 to {self.plan.buffer - place}, up to the next eviction")
        if not place:  # a query window ends, and another begins
            if self.queries is not None:
                self.score_window()
            if self.num_stored == self.plan.num_slots:
                self._evict()
            if self.queries is None:  # otherwise its attention is added at its end
                self.plan.scorer.begin_window(self.received)
        self.num_stored += n
        self.num_seen += n
        return self.num_stored - n

    def write(self, slot: Slot, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens into the slots from `slot` on; K and V `[batch, heads, n, head_dim]`, n = 1 in a static step."""
        column = self.num_prompt + slot
        put(self.keys, column, keys)
        put(self.values, column, values)

    def states(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V that the token in `slot` attends to: up to this slot, or in a static step all, see `visible`."""
        if not isinstance(slot, int):
            return self.keys, self.values
        end = self.num_prompt + slot + 1
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)

    def visible(self, slot: Slot, length: int) -> torch.Tensor | None:
        """Mask of the `length` columns of `states(slot)`, `[batch or 1, 1, 1, length]`; None if all are visible."""
        if isinstance(slot, int):
            return None if self.mask is None else self.mask[:, None, None, :length]
        mask = (torch.arange(length, device=self.keys.device) <= self.num_prompt + slot)[None, None, None]
        return mask if self.mask is None else mask & self.mask[:, None, None]

    def hold(self, slot: Slot, query: torch.Tensor) -> None:
        """Hold the query of the token in `slot`, `[batch, heads, groups, head_dim]`, until its window is scored."""
        if self.queries is not None:
            query = query.narrow(1, 0, self.queries.shape[1]).unsqueeze(3).to(self.queries.dtype)
            put(self.queries, self._place_in_window(slot), query, dim=3)

    def _place_in_window(self, slot):
        """Number of the token's query in its query window."""
        return (slot - self.plan.num_slots) % self.plan.buffer

    def score_window(self) -> None:
        """Score the new tokens: add the attention of the held queries, or compute worth.

        Nothing was evicted after the first query. Worth is due only when a token is ranked.
        """
        if self.num_scored == self.num_stored:
            return
        if self.queries is not None:
            end = self._place_in_window(self.num_stored - 1) + 1
            weights = attention_weights(
                self.queries[:, :, :, end - (self.num_stored - self.num_scored) : end],
                self._scored_keys(),
                self.scaling,
                num_prompt=self.num_prompt,
                num_first=self.num_scored + 1,
                prompt_mask=None if self.mask is None else self.mask[:, : self.num_prompt],
            )
            self.plan.scorer.observe(self.received[..., : self.num_stored], weights[..., self.num_prompt :])
        if self.worth.shape[1]:
            new = slice(self.num_scored, self.num_stored)
            self.worth[..., new] = self.plan.scorer.worth(*self._ranked_states(new))
        self.num_scored = self.num_stored

    def _scored_keys(self) -> torch.Tensor:
        """Keys that the held queries saw, `[batch, num_semantic, num_prompt + num_stored, head_dim]`."""
        return self.keys[:, : self.plan.num_semantic, : self.num_prompt + self.num_stored]

    @property
    def _ranked_by(self) -> torch.Tensor:
        """Attention received by each token, or its worth, `[batch, num_semantic, num_slots]`; moved by evictions."""
        return self.worth if self.plan.scorer.has_worth else self.received

    def _rank(self) -> torch.Tensor | None:
        """Ranks of the semantic heads' tokens when all slots are taken, `[batch, num_semantic, num_slots]`."""
        self.score_window()
        if not self.plan.num_semantic:
            return None
        positions = self.positions[:, : self.plan.num_semantic]
        states = partial(self._ranked_states, slice(None))
        return self.plan.scorer.rank(self._ranked_by, positions, self.num_seen, states)

    def _ranked_states(self, slots: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V in these slots of the semantic heads, `[batch, num_semantic, slots, head_dim]`."""
        keys, values = (states[:, : self.plan.num_semantic, self.num_prompt :] for states in (self.keys, self.values))
        return keys[:, :, slots], values[:, :, slots]

    def _evict(self) -> None:
        plan = self.plan
        ranks = Ranks(self._rank, plan.scorer.weights if plan.num_semantic else None, self.num_scored)
        counts = {"num_recent": plan.num_recent, "num_sinks": plan.num_sinks}
        evict(self._slots(), ranks, plan.buffer, self.num_seen, **counts)
        self.num_stored = self.num_scored = plan.num_slots - plan.buffer

    def _slots(self) -> Slots:
        """The tensors with one row for each slot."""
        return Slots(self.positions, self._ranked_by, [self.keys, self.values], [])

    @property
    def codes(self) -> list[torch.Tensor]:
        """Codes and scales of slots in `kv_dtype`, as `dispatch.decode` takes them."""
        return []

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(getattr(self, name).nbytes for name in self.STATES)

    @property
    def bookkeeping_nbytes(self) -> int:
        """Bytes of everything else: positions, received attention or worth, held queries, the prompt's mask."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor)) - self.nbytes


class StaticSlots:
    """The slots of a cache's static steps: 0-d int64 tensors at fixed addresses, so that no Python number changes.

    An eager step takes its slots from `SlotStore.reserve`; both are the same numbers.

    Args:
        layers: the stores of each layer. Those of one size on one device share a tensor.

    Attributes:
        slots: the slot of each store.
    """

    def __init__(self, layers: Iterable[Sequence[SlotStore]]):
        sizes = [[(store.keys.device, store.plan.num_slots, store.plan.buffer) for store in layer] for layer in layers]
        tensors: dict[tuple, torch.Tensor] = {}
        self._of_device = []
        for device in {device for layer in sizes for device, _, _ in layer}:
            here = sorted({size[1:] for layer in sizes for size in layer if size[0] == device})
            with normal_tensors():
                num_slots, buffer = torch.tensor(here, device=device).unbind(1)
                slots = torch.zeros_like(num_slots)
            self._of_device.append((slots, num_slots, buffer))
            tensors |= {(device, *size): slot for size, slot in zip(here, slots.unbind(), strict=True)}
        self.slots: list[list[Slot]] = [[tensors[size] for size in layer] for layer in sizes]
        self._first, self._tables = 0, list[torch.Tensor]()

    def fill(self, number: int) -> None:
        """Set the slots to those of visual token `number`: one copy for each device, without waiting for it."""
        if not self._first <= number < self._first + NUM_AHEAD or not self._tables:
            self._first = number
            ahead = (torch.arange(number, number + NUM_AHEAD, device=sizes[0].device) for sizes in self._of_device)
            self._tables = [
                slot_of(numbers[:, None], num_slots, buffer)
                for numbers, (_, num_slots, buffer) in zip(ahead, self._of_device, strict=True)
            ]
        for (slots, _, _), table in zip(self._of_device, self._tables, strict=True):
            slots.copy_(table[number - self._first])


def put(target: torch.Tensor, index: Slot, states: torch.Tensor, dim: int = 2) -> None:
    """Write `states` into `target` from `index` on along `dim`; at a tensor's index, only states of size 1."""
    if isinstance(index, int):
        target.narrow(dim, index, states.shape[dim]).copy_(states)
    else:
        target.index_copy_(dim, index.view(1), states)
