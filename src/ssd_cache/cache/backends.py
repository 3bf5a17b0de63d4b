"""`HeadGroups`: how the heads of a layer are spread over its stores, and how a token attends to them.

Either torch's attention runs, or the fused kernel of `kernels/dispatch.py`. A layer chooses one of them for each image,
at the prompt. Nothing here decides which tokens are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from ssd_cache.cache.slots import Slot, SlotStore
from ssd_cache.kernels import dispatch


class HeadGroups:
    """The groups of a layer's KV heads, one for each store.

    Args:
        stores: the stores of the layer. No reference is kept to them.

    Attributes:
        heads: for each group, the indices of its heads, int64 `[heads of the group]`, read by the kernel.
        slots: for each group, a 0-d int64 tensor from which the kernel reads the slot of an eager step.
        order: int64 `[kv_heads]`, all heads in the order of storage; None if this is the model's order.
    """

    def __init__(self, stores: Sequence[SlotStore]):
        self.sizes = [len(store.plan.heads) for store in stores]
        self.heads = [torch.tensor(store.plan.heads, device=store.keys.device) for store in stores]
        self.slots = [torch.zeros((), dtype=torch.int64, device=store.keys.device) for store in stores]
        order = torch.cat(self.heads)
        is_sorted = [head for store in stores for head in store.plan.heads] == list(range(len(order)))
        self.order = None if is_sorted else order
        self.inverse = order.argsort()

    def split(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split `[batch, kv_heads, ...]`, in the model's order of heads, into a tensor for each group."""
        if self.order is not None:
            states = states.index_select(1, self.order)
        return [states] if len(self.sizes) == 1 else states.split(self.sizes, dim=1)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join one tensor `[batch, heads, ...]` for each group, in the model's order of heads."""
        states = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return states if self.order is None else states.index_select(1, self.inverse)

    def attend_in_torch(
        self,
        stores: Sequence[SlotStore],
        slots: Sequence[Slot],
        query: torch.Tensor,
        states: Iterable[tuple[torch.Tensor, torch.Tensor]],
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        """Hold the query for scoring, and attend to K and V of every store, as `SlotStore.states` returned them.

        `query` is `[batch, kv_heads, groups, head_dim]`, in the model's order of heads, and the output
        `[batch, kv_heads, groups, value_dim]`.
        """
        # Two matrix products beat sdpa for one query on a CPU, above all in bfloat16. Eager steps, which come here on a
        # CPU if nothing is evicted or no loop can run, keep sdpa: their tokens then equal a full cache's bit for bit.
        is_static = not isinstance(slots[0], int)
        attend = _attend_by_products if is_static and query.is_cpu and not dropout else F.scaled_dot_product_attention
        outputs = []
        for store, slot, part, (keys, values) in zip(stores, slots, self.split(query), states, strict=True):
            store.hold(slot, part)
            outputs.append(attend(part, keys, values, store.visible(slot, keys.shape[2]), dropout, scale=scaling))
        return self.join(outputs)

    def attend_by_kernel(
        self,
        stores: Sequence[SlotStore],
        slots: Sequence[Slot],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Run the kernel over all stores: write K and V, attend, and add the attention to what the tokens received.

        `key` and `value` are K and V of the new token, `[batch, kv_heads, 1, head_dim]`; query and output are as in
        `attend_in_torch`.
        """
        if query.dtype != key.dtype and torch.is_autocast_enabled(query.device.type):
            query = query.to(key.dtype)  # as sdpa does under autocast
        output = query.new_empty(*query.shape[:3], value.shape[3])
        dispatch.decode(
            query,
            key,
            value,
            [store.keys for store in stores],
            [store.values for store in stores],
            [store.received for store in stores],
            self.heads,
            [store.mask for store in stores if store.mask is not None],
            [held.fill_(slot) if isinstance(slot, int) else slot for held, slot in zip(self.slots, slots, strict=True)],
            scaling,
            output,
            [tensor for store in stores for tensor in store.codes],
            stores[0].kv_dtype,
        )
        return output


def _attend_by_products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Compute `scaled_dot_product_attention` as two matrix products."""
    weights = (query * scale) @ keys.mT
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.float().softmax(-1).to(values.dtype) @ values
