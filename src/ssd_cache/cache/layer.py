"""`SSDLayer`: what `SSDCache` holds for one layer of the model, every head by its own kind.

It answers transformers' questions about lengths (tokens seen and tokens stored are two numbers here), hands K and V to
slot stores, and meets the queries that the attention "ssd" brings. How attention is computed is `attention.py`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ssd_cache._compat import in_prefill
from ssd_cache.cache.quantized import QuantizedStore
from ssd_cache.cache.retention import WITHOUT_QUERIES
from ssd_cache.cache.slots import SlotStore, normal_tensors
from ssd_cache.head_map.learned_score import LearnedScore

USE_SSD_ATTENTION = (
    "load the model with attn_implementation='ssd', call model.set_attn_implementation('ssd'), "
    "or generate inside `with ssd_cache.enable(model, head_map):`"
)


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps, with all settings resolved to tokens.

    `is_spatial`, `num_slots` and `num_recent` have one entry a KV head (`num_recent` says nothing of spatial ones). An
    online layer starts with semantic heads and finds out which are spatial when its slots are first full (see
    `retention.prefers_window`); its heads have equally many slots. `columns`, of the grid, is what the score "margin"
    asks for; `learned`, of the layer's heads, is the score "learned". Slots are stored in the model's dtype, or
    quantised to `kv_dtype`.
    """

    layer_idx: int
    is_spatial: tuple[bool, ...]
    num_slots: tuple[int, ...]
    num_cells: int
    buffer: int
    num_recent: tuple[int, ...]
    num_sinks: int
    is_online: bool = False
    score: str = "sum"
    columns: int = 1
    learned: LearnedScore | None = None
    kv_dtype: str | None = None

    @property
    def kinds(self) -> list[str]:
        """The kind of each KV head, "spatial" or "semantic"."""
        return ["spatial" if spatial else "semantic" for spatial in self.is_spatial]

    @property
    def takes_kernel(self) -> bool:
        """Whether the kernel of `fused.py` may do the steps, which then holds no queries.

        An online layer needs the queries of a whole stretch when it finds its labels, and the kernel can not read
        quantised slots.
        """
        return not self.is_online and self.kv_dtype is None


class GroupedStates(list):
    """Keys (or values) of a layer that are not one tensor: one for each group of heads that hold equally many tokens.

    Or the new token's alone, where the kernel is to write them (see `SSDLayer.use_kernel`). Only the attention "ssd"
    can read it; anything else that takes it for a tensor is told so.
    """

    ssd_layer: SSDLayer

    def __getattr__(self, name: str):
        raise AttributeError(
            "this layer's heads hold different numbers of tokens, or a kernel of its own writes them, which only the "
            f"attention 'ssd' can do; {USE_SSD_ATTENTION}"
        )


class SSDLayer(CacheLayerMixin):
    """K and V of one layer: the prompt whole, and of the visual tokens what each head's kind keeps.

    Stored as `[batch, heads, prompt + slots, head_dim]` a store, with one store for each number of slots.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.plan = plan
        self.reset()

    def reset(self) -> None:
        """Forget everything; ready for the next picture."""
        self.is_initialized = False
        self.keys: torch.Tensor | None = None  # of the prompt, until the first visual token arrives
        self.values: torch.Tensor | None = None
        self.prompt_mask: torch.Tensor | None = None
        self.is_fused = False  # see `use_kernel`
        self.is_fast = False  # whether a kernel may serve on a CPU too; see `SSDCache.be_fast`
        self.num_prompt = self.num_visual = 0
        self._query_missing = False
        self.step: torch.Tensor | None = None
        self.stores: list[SlotStore] = []
        self.labels: tuple[bool, ...] | None = None if self.plan.is_online else self.plan.is_spatial
        self.order: torch.Tensor | None = None
        self.head_indices: list[list[int]] = []
        self.heads: list[torch.Tensor] = []  # the same, on the device, where the kernel reads them

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        _, heads, _, head_dim = key_states.shape
        self.token_nbytes = heads * (head_dim + value_states.shape[3]) * key_states.itemsize
        self.is_initialized = True

    @property
    def needs_queries(self) -> bool:
        """Whether this layer works with the attention "ssd" alone.

        That is so when attention scores its tokens, and when its heads differ in length or are stored in another order.
        """
        plan = self.plan
        kinds, slots = plan.kinds, set(plan.num_slots)
        if len(slots) > 1:
            return True
        is_reordered = kinds != sorted(kinds)  # a store has its semantic heads first
        is_ranked = max(slots) < plan.num_cells and "semantic" in kinds
        return is_ranked and (plan.score not in WITHOUT_QUERIES or is_reordered)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Take in new tokens and return what their queries may look at.

        Args:
            key_states: `[batch, kv_heads, new, head_dim]`, after RoPE.
            value_states: the same shape but for the last dimension.

        Returns:
            Keys and values `[batch, kv_heads, stored, head_dim]`, or a `GroupedStates` where heads differ in length or
            the kernel is to write the token.

        Raises:
            ValueError: several tokens at once after visual tokens, another batch size, or queries that do not arrive.
        """
        if self.step is not None:
            key_states, value_states = self._check_visual(key_states, value_states)
            if self.is_fused:
                return self._show([(key_states, value_states)], as_groups=True)
            for store, keys, values in zip(
                self.stores, self._split(key_states), self._split(value_states), strict=True
            ):
                store.write_at(self.step, keys, values)
            return self._show([store.states() for store in self.stores])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # The cache holds values, not graphs: no gradient flows into the past.
        key_states, value_states = key_states.detach(), value_states.detach()
        if self._query_missing and self.needs_queries:
            raise ValueError(
                f"layer {self.plan.layer_idx} of SSDCache does not get to see the model's queries, which its heads "
                f"need: the model's attention is not 'ssd'. Remedy: {USE_SSD_ATTENTION}."
            )
        if self.num_visual == 0 and (self.num_prompt == 0 or key_states.shape[2] > 1 or in_prefill()):
            self._query_missing = True
            return self._update_prompt(key_states, value_states)
        key_states, value_states = self._check_visual(key_states, value_states)
        self._query_missing = True
        if self.keys is not None and self.values is not None:
            with normal_tensors():
                self._open_stores(self.keys, self.values)
            self.keys = self.values = None
        self._settle()
        self.num_visual += 1
        if self.is_fused:
            for store in self.stores:
                store.count(self.num_visual - 1)
            return self._show([(key_states, value_states)], as_groups=True)
        parts = zip(self.stores, self._split(key_states), self._split(value_states), strict=True)
        for store, keys, values in parts:
            store.append(keys, values, self.num_visual - 1)
        return self._show([store.states(store.num_stored) for store in self.stores])

    def _settle(self) -> None:
        """Score what is due and find labels, before the next token."""
        for store in self.stores:
            store.score_due()
        if self.labels is None:
            self._find_labels()

    @property
    def can_begin_step(self) -> bool:
        """Whether the first visual token has set everything up, so that the next ones can be counted ahead."""
        return self.num_visual > 0

    def begin_step(self, step: torch.Tensor) -> None:
        """Count the next visual token in, and do all that changes numbers, shapes or places of older tokens.

        Until `end_step`, `update` and the attention write at places worked out from `step`, the token's number as a
        tensor without dimensions, and show all slots under a mask: the forward touches tensors of fixed shape alone.
        """
        self._settle()
        for store in self.stores:
            store.count(self.num_visual)
            store.count_query()
        self.num_visual += 1
        self.step = step

    def end_step(self) -> None:
        """Back to steps that count for themselves."""
        self.step = None

    def _update_prompt(self, key_states: torch.Tensor, value_states: torch.Tensor):
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states = _own(key_states), _own(value_states)
        self.num_prompt = key_states.shape[2]
        seen = key_states[:]  # an alias, since the layer must not hold the tensor that holds the layer
        seen.ssd_layer = self  # type: ignore[attr-defined]
        return seen, value_states

    def _check_visual(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse a visual token that does not fit what is held; in compiled static steps, the checks become guards.

        Returns:
            The states, under autocast in the dtype held: what a model's prompt and steps give may differ there.
        """
        if key_states.shape[2] != 1:
            raise ValueError(
                f"SSDCache got {key_states.shape[2]} tokens at once while it holds a picture of {self.num_visual} "
                "visual tokens. For the next picture call cache.reset() or make a new SSDCache (ssd_cache.enable does "
                "that for every generate call); speculative and assisted decoding are not supported."
            )
        held_keys, held_values = self._held_states
        return self._fit(key_states, held_keys), self._fit(value_states, held_values)

    def _fit(self, states: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        if states.shape[0] != held.shape[0]:
            raise ValueError(
                f"SSDCache holds {held.shape[0]} rows and got {states.shape[0]}: one cache serves one batch. "
                "Call cache.reset() before another batch."
            )
        if states.device != held.device:
            raise ValueError(
                f"layer {self.plan.layer_idx} of SSDCache holds its tokens on {held.device} and got one on "
                f"{states.device}; moving a model in mid-picture is not supported."
            )
        if states.dtype == held.dtype:
            return states
        if not torch.is_autocast_enabled(held.device.type):
            raise ValueError(
                f"layer {self.plan.layer_idx} of SSDCache holds its tokens in {held.dtype} and got one in "
                f"{states.dtype}: generate the whole image in one dtype, or call cache.reset() before the next."
            )
        return states.to(held.dtype)

    @property
    def _held_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the prompt, or of the first store."""
        if self.keys is not None and self.values is not None:
            return self.keys, self.values
        return self.stores[0].keys, self.stores[0].values

    @property
    def num_rows(self) -> int:
        """Rows of the batch held; reordering and selecting rows change it."""
        return self._held_states[0].shape[0]

    def _open_stores(self, prompt_keys: torch.Tensor, prompt_values: torch.Tensor) -> None:
        """Move the prompt into stores, one for each number of slots, the semantic heads of a store first."""
        plan = self.plan
        by_slots: dict[int, list[int]] = {}
        kinds = plan.kinds
        for head in sorted(range(len(kinds)), key=lambda head: kinds[head]):  # "semantic" < "spatial"
            by_slots.setdefault(plan.num_slots[head], []).append(head)
        for num_slots, heads in by_slots.items():
            # with room for the whole grid nothing is evicted within a picture, so nothing is scored
            scored = num_slots < plan.num_cells
            heads = heads if scored else sorted(heads)
            num_semantic = sum(kinds[head] == "semantic" for head in heads) if scored else 0
            store = self.make_store(
                prompt_keys[:, heads],
                prompt_values[:, heads],
                self.prompt_mask,
                num_slots=num_slots,
                num_semantic=num_semantic,
                buffer=min(plan.buffer, num_slots),
                num_recent=plan.num_recent[heads[0]],  # of the first semantic head, if there is one
                num_sinks=plan.num_sinks if scored else 0,
                score=plan.score,
                columns=plan.columns,
                learned=None if plan.learned is None else plan.learned.at(heads[:num_semantic]).to(prompt_keys.device),
                is_online=plan.is_online and scored,
                is_fused=self.is_fused,
            )
            self.stores.append(store)
            self.head_indices.append(heads)
            self.heads.append(torch.tensor(heads, device=self.device))
        self._set_order()

    def _set_order(self) -> None:
        order = [head for heads in self.head_indices for head in heads]
        if order != list(range(len(order))):
            self.order = torch.tensor(order, device=self.device)
            self.inverse_order = self.order.argsort()

    def _find_labels(self) -> None:
        """Once an online layer's store has found its spatial heads, sort its heads by kind; before the next token."""
        (store,) = self.stores
        if store.found is None:
            return
        self.labels = labels = tuple(store.found.tolist())
        heads = sorted(range(len(labels)), key=lambda head: labels[head])
        store.take_order(torch.tensor(heads, device=self.device), labels.count(False))
        self.head_indices = [heads]
        self._set_order()

    def _split(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """`[batch, kv_heads, ...]` in the model's order of heads, split over the stores in theirs."""
        if self.order is not None:
            states = states.index_select(1, self.order)
        return states.split([len(heads) for heads in self.head_indices], dim=1)

    def make_store(self, *args, **kwargs) -> SlotStore:
        """The store for a group of heads; profiling puts in one that watches."""
        if self.plan.kv_dtype is not None:
            return QuantizedStore(*args, kv_dtype=self.plan.kv_dtype, **kwargs)
        return SlotStore(*args, **kwargs)

    def _show(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], as_groups: bool = False):
        """What the stores show, each keys and values, as the model and the attention "ssd" take it."""
        is_one = len(pairs) == 1 and not as_groups
        states: Any = pairs[0] if is_one else [GroupedStates(group) for group in zip(*pairs, strict=True)]
        keys, values = states
        keys.ssd_layer = self
        return keys, values

    def receive_mask(self, allowed: torch.Tensor | None) -> None:
        """Learn from the prompt's attention which columns are padding, `[batch, num_prompt]`, False on padding."""
        self._query_missing = False
        self.prompt_mask = None if allowed is None else _own(allowed)

    def use_kernel(self, can_serve: bool) -> None:
        """Let the kernel of `fused.py` do the steps, if it can; before the first visual token.

        It writes K and V where `update` otherwise would, so `update` returns the new token's states alone.
        """
        self.is_fused = can_serve and self.plan.takes_kernel

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that a counted step reads or writes."""
        found = [self.step, self.order, *self.heads]
        found += [self.inverse_order] if self.order is not None else []
        yield from (tensor for tensor in found if tensor is not None)
        for store in self.stores:
            yield from store.tensors()

    def step_at(self) -> torch.Tensor:
        """The newest token's number as a tensor without dimensions; its query has then been asked for."""
        if self.step is not None:
            return self.step
        self._query_missing = False
        return torch.full((), self.num_visual - 1, device=self.device)

    def receive_query(self, query_states: torch.Tensor, scaling: float) -> Sequence[torch.Tensor]:
        """Take the newest token's query, `[batch, kv_heads, groups, head_dim]`; returns it split over the stores."""
        parts = self._split(query_states)
        for store, part in zip(self.stores, parts, strict=True):
            if self.step is None:
                store.hold_query(part, scaling)
            else:
                store.hold_query_at(self.step, part)
        if self.step is None:
            self._query_missing = False
        return parts

    def visible(
        self, keys: torch.Tensor | GroupedStates, values: torch.Tensor | GroupedStates
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Keys, values and mask of each store for the newest token's query, from what `update` returned."""
        groups = zip(keys, values, strict=True) if isinstance(keys, GroupedStates) else [(keys, values)]
        for store, (store_keys, store_values) in zip(self.stores, groups, strict=True):
            mask = store.visible() if self.step is None else store.visible_at(self.step)
            yield store_keys, store_values, mask

    def restore_order(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the stores' results, each `[batch, heads, groups, head_dim]`, in the model's order of heads."""
        output = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=1)
        return output if self.order is None else output.index_select(1, self.inverse_order)

    def get_seq_length(self) -> int:
        """Tokens seen, prompt included; positions count from here. Not the tokens stored."""
        return self.num_prompt + self.num_visual

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next `update` with `query_length` tokens will return."""
        if self.num_visual == 0 and (self.num_prompt == 0 or query_length > 1):
            return self.num_prompt + query_length, 0
        if not self.stores:
            return self.num_prompt + 1, 0
        return self.num_prompt + self.stores[0].num_after_append, 0

    def get_max_length(self) -> int:
        """-1: any number of tokens may go by."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, unless nothing is to be removed: evicted tokens can not come back."""
        if tokens_to_remove != 0:
            raise ValueError(
                "SSDCache can not be cropped, since tokens once evicted can not come back; assisted and speculative "
                "decoding need a DynamicCache."
            )

    def offload(self) -> None:
        raise NotImplementedError(
            "SSDCache does not support offloading; lower the budget instead, or use DynamicCache."
        )

    prefetch = offload

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in ("keys", "values", "prompt_mask"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, select(tensor))
        for store in self.stores:
            store.select_rows(select)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let row `i` go on from row `beam_idx[i]`, with all its state."""
        self._select_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, which may be numbers or a boolean mask."""
        self._select_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._select_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @property
    def nbytes(self) -> int:
        """Bytes of K and V really held."""
        prompt = sum(states.nbytes for states in (self.keys, self.values) if states is not None)
        return prompt + sum(store.nbytes for store in self.stores)

    @property
    def full_nbytes(self) -> int:
        """Bytes of K and V of a full cache that had seen the same tokens."""
        if not self.is_initialized:
            return 0
        return self.num_rows * self.token_nbytes * self.get_seq_length()

    @property
    def bookkeeping_nbytes(self) -> int:
        """Bytes of positions, scores, held queries and masks."""
        prompt = 0 if self.prompt_mask is None else self.prompt_mask.nbytes
        return prompt + sum(store.bookkeeping_nbytes for store in self.stores)

    def __repr__(self) -> str:
        heads = len(self.plan.is_spatial)
        stored = "/".join(str(store.num_stored) for store in self.stores) or "0"
        kinds = f"{heads} heads without labels yet"
        if self.labels is not None:
            kinds = f"{sum(self.labels)} spatial + {heads - sum(self.labels)} semantic heads"
        return f"SSDLayer({kinds}, {stored} of {self.num_visual} visual tokens)"


def _own(states: torch.Tensor) -> torch.Tensor:
    """A tensor that holds no memory but its own: a copy of a view of a larger one, such as fused queries, K and V."""
    if torch.compiler.is_compiling():  # which cannot trace storages
        return states
    is_view = states.untyped_storage().nbytes() > states.nbytes
    return states.clone(memory_format=torch.contiguous_format) if is_view else states
