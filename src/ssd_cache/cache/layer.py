"""`SSDLayer`: the part of `SSDCache` for one layer of the model, where each head keeps tokens by its kind.

It implements transformers' layer interface (tokens seen and tokens stored are different numbers here), and passes K, V
and queries to slot stores. One token is one `update` and one `attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ssd_cache._compat import in_prefill
from ssd_cache.cache.backends import attend_by_kernel, attend_in_torch
from ssd_cache.cache.heads import HeadGroups
from ssd_cache.cache.plans import LayerPlan
from ssd_cache.cache.quantized import QuantizedStore
from ssd_cache.cache.slots import Slot, SlotStore, normal_tensors
from ssd_cache.kernels import dispatch

USE_SSD_ATTENTION = (
    "load the model with attn_implementation='ssd', call model.set_attn_implementation('ssd'), "
    "or generate inside `with ssd_cache.enable(model, head_map):`"
)


class GroupedStates(list):
    """Keys (or values) of a layer as a list: one tensor for each group of heads that hold equally many tokens.

    If the kernel writes K and V, the list holds only the new token's keys or values. Only the attention "ssd" can read
    it; code that uses it as a tensor gets an AttributeError with the remedy.
    """

    ssd_layer: SSDLayer

    def __getattr__(self, name: str):
        raise AttributeError(
            "this layer's heads hold different numbers of tokens, or a kernel of its own writes them, which only the "
            f"attention 'ssd' can do; {USE_SSD_ATTENTION}"
        )


class SSDLayer(CacheLayerMixin):
    """K and V of one layer: the whole prompt, and the visual tokens that each head keeps.

    Attributes:
        plan: the settings.
        keys, values: K and V of the prompt, until the first visual token arrives; then None.
        prompt_mask: `[batch, num_prompt]`, False on padding, or None.
        stores: one store for each number of slots, from the first visual token on.
        groups: how the layer's heads are distributed over the stores.
        slots: slot of the newest token in each store.
        has_kernel: whether the fused kernel runs the steps of this image; chosen at the prompt.
        allows_cpu_kernel: whether the kernel may run on a CPU, where its tokens are not bit-exact.
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
        self.is_initialized = False
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.prompt_mask: torch.Tensor | None = None
        self.stores: list[SlotStore] = []
        self.slots: list[Slot] = []
        self.num_prompt = 0
        self.has_kernel = self.allows_cpu_kernel = False
        self._query: torch.Tensor | None = None  # no rows; the shape and dtype of a step's queries
        self._scaling = 1.0  # of these queries
        self._query_missing = self._is_static = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        _, heads, _, head_dim = key_states.shape
        self.token_nbytes = heads * (head_dim + value_states.shape[3]) * key_states.itemsize
        self.is_initialized = True

    @property
    def num_visual(self) -> int:
        """Visual tokens seen."""
        return self.stores[0].num_seen if self.stores else 0

    @property
    def in_prompt(self) -> bool:
        """Whether no visual token has arrived."""
        return not self.stores

    @property
    def labels(self) -> tuple[bool, ...] | None:
        """For each KV head whether it is spatial; None while an online layer has not found its labels."""
        if not self.plan.is_online:
            return self.plan.is_spatial
        found = self.stores[0].labels if self.stores else None
        return None if found is None else tuple(found.tolist())

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
        if not self._is_static:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            # Detach: no gradient flows through the cache into earlier steps.
            key_states, value_states = key_states.detach(), value_states.detach()
            if self._query_missing and self.plan.needs_ssd_attention:
                raise ValueError(
                    f"layer {self.plan.layer_idx} of SSDCache does not get to see the model's queries, which its heads "
                    f"need: the model's attention is not 'ssd'. Remedy: {USE_SSD_ATTENTION}."
                )
            if self.in_prompt and (self.num_prompt == 0 or key_states.shape[2] > 1 or in_prefill()):
                self._query_missing = True
                return self._update_prompt(key_states, value_states)
        key_states, value_states = self._check_visual(key_states, value_states)
        if not self._is_static:
            self._query_missing = True
            if not self.stores:
                with normal_tensors():
                    self._open_stores()
            self._reserve()
        if self.has_kernel:
            return self._show([(key_states, value_states)], as_groups=True)
        parts = zip(self.groups.split(key_states), self.groups.split(value_states), strict=True)
        for store, slot, (keys, values) in zip(self.stores, self.slots, parts, strict=True):
            store.write(slot, keys, values)
        return self._show([store.states(slot) for store, slot in zip(self.stores, self.slots, strict=True)])

    def attend(self, query: torch.Tensor, key: Any, value: Any, scaling: float, dropout: float) -> torch.Tensor:
        """See `attention.AttendingLayer.attend`."""
        if not self._is_static:
            self._query_missing = False
        if self.has_kernel:
            if dropout or (torch.is_grad_enabled() and query.requires_grad):
                raise ValueError(
                    "an image that was begun without gradients now needs them, or dropout, which the kernel of "
                    "SSDCache does not have: generate it to the end under torch.no_grad() and model.eval()"
                )
            return attend_by_kernel(self.stores, self.slots, self.groups, query, key[0], value[0], scaling)
        states = zip(key, value, strict=True) if isinstance(key, GroupedStates) else [(key, value)]
        return attend_in_torch(self.stores, self.slots, self.groups, query, states, scaling, dropout)

    def see_prompt(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        window: int | None,
    ) -> None:
        """See `attention.AttendingLayer.see_prompt`; chooses the backend of this image.

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
        self._query = query.new_empty(0, self.num_kv_heads, query.shape[1] // self.num_kv_heads, query.shape[3])
        self._scaling = scaling
        served = dispatch.can_serve(query, key, value, on_cpu=self.allows_cpu_kernel)
        self.has_kernel = served and self.plan.takes_kernel

    def begin_step(self, slots: Sequence[torch.Tensor]) -> None:
        """Host-side work before a static step: score, evict, reserve a slot.

        Until `end_step`, `update` and `attend` use `slots`, 0-d int64 tensors with the slot of each store, and all
        columns under a mask. The forward then uses only tensors of fixed shape.
        """
        self._reserve()
        self.slots = list(slots)
        self._is_static = True

    def end_step(self) -> None:
        """Return to eager steps."""
        self._is_static = False

    def _reserve(self) -> None:
        first = self.stores[0].plan
        self.slots = [store.reserve() for store in self.stores]
        if self.stores[0].plan is not first:  # the one store of an online layer has found its labels
            self.groups = HeadGroups([self.stores[0].plan], self.device)
            self.version += 1

    def _update_prompt(self, key_states: torch.Tensor, value_states: torch.Tensor):
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states = _own(key_states), _own(value_states)
        self.num_prompt = key_states.shape[2]
        seen = key_states[:]  # an alias: `self.keys` with a reference to `self` would be a cycle
        seen.ssd_layer = self  # type: ignore[attr-defined]
        return seen, value_states

    def _open_stores(self) -> None:
        """Move the prompt into stores: those of the last image if they fit, else new ones."""
        assert self.keys is not None
        assert self.values is not None
        query = None if self.has_kernel else self._query
        fit = (
            (self.keys.shape, self.values.shape, self.dtype, self.device, self.has_kernel),
            (self.prompt_mask is None, query is None or (query.shape, query.dtype, self._scaling)),
        )
        plans = self.plan.groups()
        prompts = [
            (self.keys[:, list(plan.heads)], self.values[:, list(plan.heads)], self.prompt_mask) for plan in plans
        ]
        if self._former is not None and self._former[0] == fit:
            self.stores = self._former[1]
            for store, prompt in zip(self.stores, prompts, strict=True):
                store.begin(*prompt)
        else:
            self._former = None  # frees memory before more is taken
            for plan, prompt in zip(plans, prompts, strict=True):
                plan = replace(plan, scorer=plan.scorer.to(self.device))
                if self.plan.kv_dtype is None:
                    store = SlotStore(plan, *prompt, query, self._scaling)
                else:
                    store = QuantizedStore(plan, *prompt, query, self._scaling, kv_dtype=self.plan.kv_dtype)
                self.stores.append(store)
            self.groups = HeadGroups(plans, self.device)
            self.version += 1
            # an online store sorts its heads anew in every image
            self._former = None if self.plan.is_online else (fit, self.stores)
        self.keys = self.values = self._query = None

    def _check_visual(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse a visual token that does not fit the stored ones; in compiled static steps, the checks become guards.

        Returns:
            The states. Under autocast they are converted to the stored dtype, since prompt and steps may differ there.
        """
        if key_states.shape[2] != 1:
            raise ValueError(
                f"SSDCache got {key_states.shape[2]} tokens at once while it holds an image of {self.num_visual} "
                "visual tokens. For the next image call cache.reset() or make a new SSDCache (ssd_cache.enable does "
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
                f"{states.device}; moving a model in the middle of an image is not supported."
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

    def _show(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], as_groups: bool = False):
        """Convert the stores' keys and values to the return values of `update`, with a reference to this layer."""
        is_one = len(pairs) == 1 and not as_groups
        states: Any = pairs[0] if is_one else [GroupedStates(group) for group in zip(*pairs, strict=True)]
        keys, values = states
        keys.ssd_layer = self
        return keys, values

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
            return self.num_prompt + (query_length if self.num_prompt == 0 or query_length > 1 else 1), 0
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
        self._former = None
        self.version += 1

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
        return prompt + sum(store.nbytes for store in self._all_stores)

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
        return prompt + sum(store.bookkeeping_nbytes for store in self._all_stores)

    @property
    def _all_stores(self) -> list[SlotStore]:
        """The stores of this image, or after `reset` those that are kept for the next."""
        return self.stores or ([] if self._former is None else self._former[1])

    def __repr__(self) -> str:
        heads = self.num_kv_heads
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
