"""`SSDLayer`: the part of `SSDCache` for one layer of the model, where each head keeps tokens by its kind.

It implements transformers' layer interface and passes K, V and queries to slot stores. The count of tokens seen, which
gives positions, differs from the count of tokens stored. Each visual token calls `update` once and `attend` once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ssd_cache._compat import in_prefill
from ssd_cache.cache.backends import HeadGroups
from ssd_cache.cache.plans import LayerPlan
from ssd_cache.cache.quantized import QuantizedStore
from ssd_cache.cache.slots import Slot, SlotStore, normal_tensors
from ssd_cache.kernels import dispatch

USE_SSD_ATTENTION = (
    "load the model with attn_implementation='ssd', call model.set_attn_implementation('ssd'), "
    "or generate inside `with ssd_cache.enable(model, head_map):`"
)


class GroupedStates(list):
    """Keys (or values) of a layer, for the attention "ssd": a tensor for each group of heads with equally many tokens.

    If the kernel writes K and V, the list holds only the new token's keys or values. Another attention, which uses it
    as a tensor, gets an AttributeError with the remedy.
    """

    ssd_layer: SSDLayer

    def __getattr__(self, name: str):
        raise AttributeError(
            "this layer's heads hold different numbers of tokens, or a kernel writes them, which only the attention "
            f"'ssd' supports; {USE_SSD_ATTENTION}"
        )


class SSDLayer(CacheLayerMixin):
    """K and V of one layer: the whole prompt, and the visual tokens that each head keeps.

    Attributes:
        plan: the settings.
        keys, values: K and V of the prompt, until the first visual token arrives; then None.
        prompt_mask: `[batch, num_prompt]`, False on padding, or None.
        stores: one store for each number of slots, from the first visual token on.
        groups: how the layer's heads are spread over the stores.
        slots: slot of the newest token in each store.
        is_static: whether a static step runs.
        has_kernel: whether the fused kernel runs the steps of this image; chosen at the prompt.
        allows_cpu_kernel: whether the kernel may run on a CPU where nothing is evicted, though its tokens are not
            bit-exact there. It runs in any case for heads that evict, and for slots in 8 bits.
        version: changes whenever a tensor that a static step uses is replaced.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, plan: LayerPlan):
        super().__init__()
        self.plan, self.num_kv_heads = plan, len(plan.is_spatial)
        self.version = 0
        self._former: tuple[Any, list[SlotStore]] | None = None
        self.reset()

    def reset(self) -> None:
        """Clear the layer for the next image. Its tensors stay in memory, and serve again if the next image fits."""
        self.is_initialized = self.is_static = False
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.prompt_mask: torch.Tensor | None = None
        self.stores: list[SlotStore] = []
        self.slots: list[Slot] = []
        self.num_prompt = 0
        self.has_kernel = self.allows_cpu_kernel = False
        self._num_groups, self._scaling = 0, 1.0  # query heads per KV head, and the factor on attention logits
        self._query_missing = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device, self.is_initialized = key_states.device, True

    @property
    def in_prompt(self) -> bool:
        """Whether no visual token has arrived."""
        return not self.stores

    @property
    def backend(self) -> str:
        """The attention of this image's steps: "Triton kernel", "CPU loop" or "torch's attention"."""
        return dispatch.kernel_name(self.device) if self.has_kernel else "torch's attention"

    @property
    def num_visual(self) -> int:
        """Visual tokens seen."""
        return self.stores[0].num_seen if self.stores else 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store new tokens and return the keys and values that their queries attend to.

        Args:
            key_states: `[batch, kv_heads, new, head_dim]`, after RoPE.
            value_states: the same shape except for the last dimension.

        Returns:
            Keys and values, `[batch, kv_heads, stored, head_dim]`. Each is a `GroupedStates` if the heads hold
            different numbers of tokens, or if the kernel writes the new token.

        Raises:
            ValueError: several tokens at once after visual tokens, another batch size, device or dtype, or missing
                queries (the model's attention is not "ssd").
        """
        if not self.is_static:
            if self._query_missing:
                raise ValueError(
                    f"layer {self.plan.layer_idx} of SSDCache does not get to see the model's queries, which its heads "
                    f"need: the model's attention is not 'ssd'. Remedy: {USE_SSD_ATTENTION}."
                )
            if torch.is_grad_enabled():  # no gradient flows through the cache into earlier steps
                key_states, value_states = key_states.detach(), value_states.detach()
            if not self.stores and (self.num_prompt == 0 or key_states.shape[2] > 1 or in_prefill()):
                self._query_missing = self.plan.needs_ssd_attention
                return self._extend_prompt(key_states, value_states)
        held_keys, held_values = self._held_states
        key_states, value_states = self._fit(key_states, held_keys), self._fit(value_states, held_values)
        if not self.is_static:
            self._query_missing = self.plan.needs_ssd_attention
            if not self.stores:
                self._open_stores()
            self._reserve()
        keys, values = GroupedStates(), GroupedStates()
        if self.has_kernel:  # it writes them in `attend`
            keys.append(key_states)
            values.append(value_states)
        else:
            parts = zip(self.groups.split(key_states), self.groups.split(value_states), strict=True)
            for store, slot, (new_keys, new_values) in zip(self.stores, self.slots, parts, strict=True):
                store.write(slot, new_keys, new_values)
                store_keys, store_values = store.states(slot)
                keys.append(store_keys)
                values.append(store_values)
            if len(self.stores) == 1:
                keys, values = keys[0], values[0]
        keys.ssd_layer = self
        return keys, values

    def attend(self, query: torch.Tensor, key: Any, value: Any, scaling: float, dropout: float) -> torch.Tensor:
        """Attend with one visual token's query.

        Args:
            query: `[batch, kv_heads, groups, head_dim]`.
            key, value: as `update` returned them.
            scaling: factor on the dot products of query and keys.
            dropout: share of softmax weights dropped in training.

        Returns:
            `[batch, kv_heads, groups, value_dim]`.
        """
        if not self.is_static:
            self._query_missing = False
        if self.has_kernel:
            if dropout or (torch.is_grad_enabled() and query.requires_grad):
                raise ValueError(
                    "an image that was begun without gradients now needs them, or dropout, which the kernel of "
                    "SSDCache does not have: generate it to the end under torch.no_grad() and model.eval()"
                )
            return self.groups.attend_by_kernel(self.stores, self.slots, query, key[0], value[0], scaling)
        states = zip(key, value, strict=True) if isinstance(key, GroupedStates) else [(key, value)]
        return self.groups.attend_in_torch(self.stores, self.slots, query, states, scaling, dropout)

    def see_prompt(
        self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float, window: int | None, dropout: float = 0.0
    ) -> None:
        """Receive the queries of the prompt, after `update`, and choose the backend of this image.

        Args:
            query: `[batch, heads, new, head_dim]`.
            mask: `[batch, num_prompt]`, False on padding, or None.
            scaling: factor on the dot products of queries and keys.
            window: tokens of a sliding window, or None for full attention.
            dropout: probability of dropping a softmax weight; above 0, no kernel is used.

        Raises:
            ValueError: a layer with sliding window attention whose window does not hold prompt and image.
        """
        length = self.num_prompt + self.plan.num_cells
        if window is not None and window < length:
            raise ValueError(
                f"layer {self.plan.layer_idx} attends a sliding window of {window} tokens, and prompt and image are "
                f"{length}: SSDCache is for layers of full attention"
            )
        self._query_missing = False
        self.prompt_mask = None if mask is None else _own(mask)
        self._num_groups, self._scaling = query.shape[1] // self.num_kv_heads, scaling
        kv_dtype = self.plan.kv_dtype
        # where heads evict, no full cache's bits are to be matched
        takes_loops = dispatch.takes_loops(query.device)
        is_optional = takes_loops and self.plan.evicts and not self.allows_cpu_kernel and kv_dtype is None
        on_cpu = self.allows_cpu_kernel or is_optional
        can_take = self.plan.takes_kernel and not dropout
        self.has_kernel = can_take and dispatch.can_serve(
            query, *self._held_states, on_cpu=on_cpu, kv_dtype=kv_dtype, is_optional=is_optional
        )

    def begin_step(self, slots: list[Slot]) -> None:
        """Host-side work before a static step: score, evict, reserve a slot.

        Until `is_static` is set to False, `update` and `attend` use `slots`, a 0-d int64 tensor for each store, and all
        columns under a mask. The forward then uses only tensors of fixed shape.
        """
        self._reserve()
        self.slots, self.is_static = slots, True

    def _reserve(self) -> None:
        self.slots = [store.reserve() for store in self.stores]

    def _extend_prompt(self, key_states: torch.Tensor, value_states: torch.Tensor):
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        else:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states = _own(key_states), _own(value_states)
        self.num_prompt = key_states.shape[2]
        seen = key_states[:]  # an alias: `self.keys` with a reference to `self` would be a cycle
        seen.ssd_layer = self  # type: ignore[attr-defined]
        return seen, value_states

    def _open_stores(self) -> None:
        """Move the prompt into stores: those of the last image if they fit, else new ones."""
        keys, values = self._held_states
        has_mask, num_groups = self.prompt_mask is not None, 0 if self.has_kernel else self._num_groups
        fit = keys.shape, values.shape, keys.dtype, self.device, has_mask, self.has_kernel, num_groups, self._scaling
        with normal_tensors():
            if self._former is None or self._former[0] != fit:
                self._former = None  # frees memory before more is taken
                kv_dtype = self.plan.kv_dtype
                make = SlotStore if kv_dtype is None else partial(QuantizedStore, kv_dtype=kv_dtype)
                stores = [make(plan, keys, values, has_mask, num_groups, self._scaling) for plan in self.plan.groups]
                self._former = fit, stores
                self.groups = HeadGroups(stores)
                self.version += 1
            self.stores = self._former[1]
            for store, *parts in zip(self.stores, *map(self.groups.split, (keys, values)), strict=True):
                store.begin(*parts, self.prompt_mask)
        self.keys = self.values = None

    def _fit(self, states: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Refuse keys or values that do not fit those held; under autocast, convert them to the dtype held.

        In compiled static steps, the checks become guards.
        """
        if states.shape[2] != 1:
            raise ValueError(
                f"SSDCache got {states.shape[2]} tokens at once while it holds an image of {self.num_visual} visual "
                "tokens. For the next image call cache.reset() or make a new SSDCache (ssd_cache.enable does that for "
                "every generate call); speculative and assisted decoding are not supported."
            )
        is_same = states.dtype == held.dtype
        if (
            states.shape[0] != held.shape[0]
            or states.device != held.device
            or not (is_same or torch.is_autocast_enabled(held.device.type))
        ):
            raise ValueError(
                f"layer {self.plan.layer_idx} of SSDCache holds {held.shape[0]} rows of {held.dtype} on {held.device} "
                f"and got {states.shape[0]} rows of {states.dtype} on {states.device}: one cache serves one batch, "
                "and generates an image in one dtype on one device. Call cache.reset() before another batch."
            )
        return states if is_same else states.to(held.dtype)

    @property
    def _held_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the prompt, or of the first store once visual tokens arrive; for their shape, dtype and device."""
        if self.keys is not None and self.values is not None:
            return self.keys, self.values
        return self.stores[0].keys, self.stores[0].values

    @property
    def num_rows(self) -> int:
        """Rows of the batch held; reordering and selecting rows change it."""
        return self._held_states[0].shape[0]

    def held_positions(self) -> list[torch.Tensor]:
        """Numbers of the visual tokens that each KV head holds, ascending, int32 `[batch, held]` for each head."""
        by_head: dict[int, torch.Tensor] = {}
        for store in self.stores:
            held = store.positions[..., : store.num_stored].sort(-1).values
            by_head |= dict(zip(store.plan.heads, held.unbind(1), strict=True))
        return [by_head[head] for head in sorted(by_head)]

    def get_seq_length(self) -> int:
        """Number of tokens seen, prompt included, from which positions follow; not the number of tokens stored."""
        return self.num_prompt + self.num_visual

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that the next `update` with `query_length` tokens will return."""
        if not self.stores:
            return self.num_prompt + query_length, 0
        store = self.stores[0]
        is_full = store.num_stored == store.plan.num_slots
        return self.num_prompt + store.num_stored + 1 - (store.plan.buffer if is_full else 0), 0

    def get_max_length(self) -> int:
        """-1: there is no limit on the number of tokens seen."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless nothing is to be removed: evicted tokens cannot be restored."""
        if tokens_to_remove != 0:
            raise ValueError(
                "SSDCache cannot be cropped, since evicted tokens are gone; assisted and speculative decoding need a "
                "DynamicCache."
            )

    def offload(self) -> None:
        raise NotImplementedError("SSDCache cannot be offloaded: lower the budget instead, or use DynamicCache")

    prefetch = offload

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by `select(tensor)`; all have the rows of the batch as their first dimension."""
        with normal_tensors():
            for holder in (self, *self.stores):
                for name, value in list(vars(holder).items()):
                    if isinstance(value, torch.Tensor):
                        setattr(holder, name, select(value))
        self._former = None
        self.version += 1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row `i` by row `beam_idx[i]`, with all its state."""
        self._select_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, a tensor of integers or a boolean mask."""
        self._select_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._select_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @property
    def nbytes(self) -> int:
        """Bytes of K and V held in memory."""
        prompt = sum(states.nbytes for states in (self.keys, self.values) if states is not None)
        return prompt + sum(store.nbytes for store in self._all_stores)

    @property
    def full_nbytes(self) -> int:
        """Bytes of K and V of a full cache that has seen the same tokens."""
        if not self.is_initialized:
            return 0
        keys, values = self._held_states
        of_token = self.num_kv_heads * (keys.shape[3] + values.shape[3]) * keys.itemsize
        return keys.shape[0] * self.get_seq_length() * of_token

    @property
    def bookkeeping_nbytes(self) -> int:
        """Bytes of positions, scores, held queries and masks."""
        prompt = 0 if self.prompt_mask is None else self.prompt_mask.nbytes
        return prompt + sum(store.bookkeeping_nbytes for store in self._all_stores)

    @property
    def _all_stores(self) -> list[SlotStore]:
        """The stores of this image, or after `reset` those that are kept for the next."""
        return self.stores or ([] if self._former is None else self._former[1])


def _own(states: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy if it is a view, such as K in fused queries, K and V, which a view would keep in memory."""
    if torch.compiler.is_compiling():  # the compiler cannot trace storages
        return states
    is_view = states.untyped_storage().nbytes() > states.nbytes
    return states.clone(memory_format=torch.contiguous_format) if is_view else states
