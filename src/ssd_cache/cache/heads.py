"""`HeadGroups`: split tensors of a layer's heads into groups with equally many slots, and join results again.

The groups come from `plans.py`; nothing here stores tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssd_cache.cache.plans import GroupPlan


class HeadGroups:
    """The order in which a layer stores its KV heads; immutable.

    Args:
        plans: the groups, in the order of storage.
        device: device of the layer.

    Attributes:
        heads: int64 `[heads of the group]` for each group, the numbers of its heads, where the kernel reads them.
        order: int64 `[kv_heads]`, all heads in the order of storage; None if it is the model's own order.
    """

    def __init__(self, plans: Sequence[GroupPlan], device: torch.device):
        self.sizes = [len(plan.heads) for plan in plans]
        self.heads = [torch.tensor(plan.heads, device=device) for plan in plans]
        order = torch.cat(self.heads)
        is_sorted = [head for plan in plans for head in plan.heads] == list(range(len(order)))
        self.order = None if is_sorted else order
        self.inverse = order.argsort()

    def split(self, states: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split `[batch, kv_heads, ...]`, in the model's order of heads, into a tensor for each group."""
        if self.order is not None:
            states = states.index_select(1, self.order)
        return states.split(self.sizes, dim=1)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Join one tensor `[batch, heads, ...]` for each group, in the model's order of heads."""
        states = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        return states if self.order is None else states.index_select(1, self.inverse)
