"""How one token attends to the stores of a layer: torch's attention, or the fused kernel of `kernels/dispatch.py`.

A layer chooses its backend once for each image, at the prompt. The functions take a step's query and return the output;
they decide nothing about which tokens are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from ssd_cache.cache.heads import HeadGroups
from ssd_cache.cache.slots import Slot, SlotStore
from ssd_cache.kernels import dispatch


def attend_in_torch(
    stores: Sequence[SlotStore],
    slots: Sequence[Slot],
    groups: HeadGroups,
    query: torch.Tensor,
    states: Iterable[tuple[torch.Tensor, torch.Tensor]],
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Hold the query in the stores that score attention, and attend to the tokens of every store.

    Args:
        query: `[batch, kv_heads, groups, head_dim]`, in the model's order of heads.
        states: K and V of each store, as `SlotStore.states` returns them.

    Returns:
        `[batch, kv_heads, groups, value_dim]`.
    """
    # Two matrix products beat sdpa for one query on a CPU, above all in bfloat16. Eager steps keep sdpa, because their
    # tokens then equal those of a full cache bit for bit.
    is_static = not isinstance(slots[0], int)
    attend = _attend_by_products if is_static and query.is_cpu and not dropout else F.scaled_dot_product_attention
    outputs = []
    for store, slot, part, (keys, values) in zip(stores, slots, groups.split(query), states, strict=True):
        store.hold(slot, part)
        outputs.append(attend(part, keys, values, store.visible(slot), dropout, scale=scaling))
    return groups.join(outputs)


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


def attend_by_kernel(
    stores: Sequence[SlotStore],
    slots: Sequence[Slot],
    groups: HeadGroups,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Run one kernel per store: write K and V, attend, and add the attention to what the tokens received.

    Args:
        query: `[batch, kv_heads, groups, head_dim]`, in the model's order of heads.
        key, value: K and V of the new token, `[batch, kv_heads, 1, head_dim]`.

    Returns:
        `[batch, kv_heads, groups, value_dim]`.
    """
    if query.dtype != key.dtype and torch.is_autocast_enabled(query.device.type):
        query = query.to(key.dtype)  # as sdpa does under autocast
    output = query.new_empty(*query.shape[:3], value.shape[3])
    for store, slot, heads in zip(stores, slots, groups.heads, strict=True):
        if isinstance(slot, int):
            slot = torch.full((), slot, device=query.device)
        dispatch.decode(
            query, key, value, store.keys, store.values, store.received, heads, store.mask, slot, scaling, output
        )
    return output
