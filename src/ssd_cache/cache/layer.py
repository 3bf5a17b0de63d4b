"""`SSDLayer`: the part of `SSDCache` for one layer of the model, where each head keeps tokens by its kind.

It implements transformers' length methods (tokens seen and tokens stored are different numbers here), passes K and V to
slot stores, and takes the queries from the attention "ssd". It does not compute attention; `attention.py` does.
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
    """Settings of one layer, all resolved to tokens.

    `is_spatial`, `num_slots` and `num_recent` have one entry per KV head (`num_recent` has no effect on spatial heads).
    An online layer starts with semantic heads and finds the spatial ones when its slots are first full (see
    `retention.prefers_window`); its heads have equally many slots. `columns` is the number of grid columns, for the
    score "margin". `learned` is the learned score of the layer's heads, for the score "learned". Slots are stored in
    the model's dtype, or quantised to `kv_dtype`.
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
        """Whether the fused kernel of `kernels/dispatch.py` may run the steps; the layer then holds no queries.

        It may not in an online layer, which needs all queries of a query window to find its labels, nor with quantised
        slots, which the kernel cannot read.
        """
        return not self.is_online and self.kv_dtype is None


class GroupedStates(list):
    """Keys (or values) of a layer as a list: one tensor for each group of heads that hold equally many tokens.

    If the kernel writes K and V, the list holds only the new token's keys or values (see `SSDLayer.use_kernel`). Only
    the attention "ssd" can read it; code that uses it as a tensor gets an AttributeError with the remedy.
    """

    ssd_layer: SSDLayer

    def __getattr__(self, name: str):
        raise AttributeError(
            "this layer's heads hold different numbers of tokens, or a kernel of its own writes them, which only the "
            f"attention 'ssd' can do; {USE_SSD_ATTENTION}"
        )


class SSDLayer(CacheLayerMixin):
    """K and V of one layer: the whole prompt, and the visual tokens that each head keeps.

    Stored as `[batch, heads, prompt + slots, head_dim]` per store, with one store for each number of slots.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.plan = plan
        self.reset()

    def reset(self) -> None:
        """Clear the layer for the next image."""
        self.is_initialized = False
        self.keys: torch.Tensor | None = None  # of the prompt, until the first visual token arrives
        self.values: torch.Tensor | None = None
        self.prompt_mask: torch.Tensor | None = None
        self.is_fused = False  # see `use_kernel`
        self.is_fast = False  # whether the kernel may also run on a CPU; see `SSDCache.be_fast`
        self.num_prompt = self.num_visual = 0
        self._query_missing = False
        self.step: torch.Tensor | None = None
        self.stores: list[SlotStore] = []
        self.labels: tuple[bool, ...] | None = None if self.plan.is_online else self.plan.is_spatial
        self.order: torch.Tensor | None = None
        self.head_indices: list[list[int]] = []
        self.heads: list[torch.Tensor] = []  # `head_indices` on the device, where the kernel reads them

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        _, heads, _, head_dim = key_states.shape
        self.token_nbytes = heads * (head_dim + value_states.shape[3]) * key_states.itemsize
        self.is_initialized = True

    @property
    def needs_queries(self) -> bool:
        """Whether this layer works only with the attention "ssd".

        True if its tokens are scored by attention, or if its heads differ in length or are stored in another order.
        """
        plan = self.plan
        kinds, slots = plan.kinds, set(plan.num_slots)
        if len(slots) > 1:
            return True
        is_reordered = kinds != sorted(kinds)  # a store has its semantic heads first
        is_ranked = max(slots) < plan.num_cells and "semantic" in kinds
        return is_ranked and (plan.score not in WITHOUT_QUERIES or is_reordered)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store new tokens and return the keys and values that their queries attend to.

        Args:
            key_states: `[batch, kv_heads, new, head_dim]`, after RoPE.
            value_states: the same shape except for the last dimension.

        Returns:
            Keys and values `[batch, kv_heads, stored, head_dim]`, or a `GroupedStates` each if heads differ in length
            or the kernel writes the token.

        Raises:
            ValueError: several tokens at once after visual tokens, another batch size, device or dtype, or missing
                queries (the model's attention is not "ssd").
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
        # Detach: no gradient flows through the cache into earlier steps.
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
        """Compute due scores and find labels, before the next token."""
        for store in self.stores:
            store.score_due()
        if self.labels is None:
            self._find_labels()

    @property
    def can_begin_step(self) -> bool:
        """Whether the next token can be a static step: the first visual token must have created the stores."""
        return self.num_visual > 0

    def begin_step(self, step: torch.Tensor) -> None:
        """Host-side work before a static step: score, evict, reserve a slot.

        Until `end_step`, `update` and the attention write to the slot computed from `step`, the token's number as a 0-d
        tensor, and return all slots under a mask. The forward then uses only tensors of fixed shape.
        """
        self._settle()
        for store in self.stores:
            store.count(self.num_visual)
            store.count_query()
        self.num_visual += 1
        self.step = step

    def end_step(self) -> None:
        """Return to eager steps."""
        self.step = None

    def _update_prompt(self, key_states: torch.Tensor, value_states: torch.Tensor):
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states = _own(key_states), _own(value_states)
        self.num_prompt = key_states.shape[2]
        seen = key_states[:]  # an alias: `self.keys` with a reference to `self` would be a cycle
        seen.ssd_layer = self  # type: ignore[attr-defined]
        return seen, value_states

    def _check_visual(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse a visual token that does not fit the stored ones; in compiled static steps, the checks become guards.

        Returns:
            The states. Under autocast they are converted to the stored dtype, since prompt and steps may differ there.
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
        """Move the prompt into stores, one for each number of slots; semantic heads come first in a store."""
        plan = self.plan
        by_slots: dict[int, list[int]] = {}
        kinds = plan.kinds
        for head in sorted(range(len(kinds)), key=lambda head: kinds[head]):  # "semantic" < "spatial"
            by_slots.setdefault(plan.num_slots[head], []).append(head)
        for num_slots, heads in by_slots.items():
            # with room for the whole grid nothing is evicted within an image, so nothing is scored
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
        """Sort an online layer's heads by kind, once its store has found the spatial ones; before the next token."""
        (store,) = self.stores
        if store.found is None:
            return
        self.labels = labels = tuple(store.found.tolist())
        heads = sorted(range(len(labels)), key=lambda head: labels[head])
        store.take_order(torch.tensor(heads, device=self.device), labels.count(False))
        self.head_indices = [heads]
        self._set_order()

    def _split(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split `[batch, kv_heads, ...]`, in the model's order of heads, over the stores, in their order of heads."""
        if self.order is not None:
            states = states.index_select(1, self.order)
        return states.split([len(heads) for heads in self.head_indices], dim=1)

    def make_store(self, *args, **kwargs) -> SlotStore:
        """Make the store for a group of heads; profiling overrides this to record attention."""
        if self.plan.kv_dtype is not None:
            return QuantizedStore(*args, kv_dtype=self.plan.kv_dtype, **kwargs)
        return SlotStore(*args, **kwargs)

    def _show(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], as_groups: bool = False):
        """Convert the stores' keys and values to the return values of `update`, with a reference to this layer."""
        is_one = len(pairs) == 1 and not as_groups
        states: Any = pairs[0] if is_one else [GroupedStates(group) for group in zip(*pairs, strict=True)]
        keys, values = states
        keys.ssd_layer = self
        return keys, values

    def receive_mask(self, allowed: torch.Tensor | None) -> None:
        """Take the padding mask, `[batch, num_prompt]`, False on padding, from the attention over the prompt."""
        self._query_missing = False
        self.prompt_mask = None if allowed is None else _own(allowed)

    def use_kernel(self, can_serve: bool) -> None:
        """Run the steps with the fused kernel of `kernels/dispatch.py`, if it can; before the first visual token.

        The kernel writes K and V in place of `update`, so `update` returns only the new token's states.
        """
        self.is_fused = can_serve and self.plan.takes_kernel

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that a static step reads or writes."""
        found = [self.step, self.order, *self.heads]
        found += [self.inverse_order] if self.order is not None else []
        yield from (tensor for tensor in found if tensor is not None)
        for store in self.stores:
            yield from store.tensors()

    def step_at(self) -> torch.Tensor:
        """The newest token's number as a 0-d tensor; also note that the attention "ssd" has its query."""
        if self.step is not None:
            return self.step
        self._query_missing = False
        return torch.full((), self.num_visual - 1, device=self.device)

    def receive_query(self, query_states: torch.Tensor, scaling: float) -> Sequence[torch.Tensor]:
        """Hold the newest token's query, `[batch, kv_heads, groups, head_dim]`; return it split over the stores."""
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
        """Keys, values and mask of each store for the newest token's query, from the return values of `update`."""
        groups = zip(keys, values, strict=True) if isinstance(keys, GroupedStates) else [(keys, values)]
        for store, (store_keys, store_values) in zip(self.stores, groups, strict=True):
            mask = store.visible() if self.step is None else store.visible_at(self.step)
            yield store_keys, store_values, mask

    def restore_order(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join the stores' results, each `[batch, heads, groups, head_dim]`, in the model's order of heads."""
        output = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=1)
        return output if self.order is None else output.index_select(1, self.inverse_order)

    def get_seq_length(self) -> int:
        """Number of tokens seen, prompt included, from which positions follow; not the number of tokens stored."""
        return self.num_prompt + self.num_visual

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next `update` with `query_length` tokens will return."""
        if self.num_visual == 0 and (self.num_prompt == 0 or query_length > 1):
            return self.num_prompt + query_length, 0
        if not self.stores:
            return self.num_prompt + 1, 0
        return self.num_prompt + self.stores[0].num_after_append, 0

    def get_max_length(self) -> int:
        """-1: there is no limit on the number of tokens seen."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless nothing is to be removed: evicted tokens cannot be restored."""
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
        """Replace row `i` by row `beam_idx[i]`, with all its state."""
        self._select_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, given as numbers or as a boolean mask."""
        self._select_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._select_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @property
    def nbytes(self) -> int:
        """Bytes of K and V held in memory."""
        prompt = sum(states.nbytes for states in (self.keys, self.values) if states is not None)
        return prompt + sum(store.nbytes for store in self.stores)

    @property
    def full_nbytes(self) -> int:
        """Bytes of K and V of a full cache that has seen the same tokens."""
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
    """The tensor, or a copy if it is a view of a larger one (fused queries, K and V), to free the larger one."""
    if torch.compiler.is_compiling():  # the compiler cannot trace storages
        return states
    is_view = states.untyped_storage().nbytes() > states.nbytes
    return states.clone(memory_format=torch.contiguous_format) if is_view else states
