"""Resolved settings, in tokens: `LayerPlan` for a layer, `GroupPlan` for its heads with equally many slots.

`settings.py` makes the plans and checks them. `slots.py` stores the tokens of one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ssd_cache.cache.scorers import Scorer


@dataclass(frozen=True)
class GroupPlan:
    """Heads of one layer with equally many slots, the semantic heads first, and their eviction rule.

    Attributes:
        heads: indices of the group's KV heads in the layer.
        num_semantic: number of semantic heads; the other heads keep tokens by age.
        num_slots: slots for visual tokens in each head.
        buffer: eviction interval: tokens evicted at once, when a token arrives and all slots are taken.
        num_recent: newest tokens that a semantic head never drops.
        num_sinks: first tokens of the image that no head drops.
        scorer: ranks the tokens of the semantic heads.
    """

    heads: tuple[int, ...]
    num_semantic: int
    num_slots: int
    buffer: int
    num_recent: int
    num_sinks: int
    scorer: Scorer

    @property
    def is_scored(self) -> bool:
        """Whether tokens are ranked by the attention that they receive."""
        return self.scorer.needs_queries and self.num_semantic > 0


@dataclass(frozen=True)
class LayerPlan:
    """Settings of one layer.

    `is_spatial`, `num_slots` and `num_recent` have one entry per KV head (`num_recent` has no effect on spatial heads).
    Slots are stored in the model's dtype, or quantised to `kv_dtype`.
    """

    layer_idx: int
    is_spatial: tuple[bool, ...]
    num_slots: tuple[int, ...]
    num_cells: int
    buffer: int
    num_recent: tuple[int, ...]
    num_sinks: int
    scorer: Scorer
    kv_dtype: str | None = None

    @cached_property
    def needs_ssd_attention(self) -> bool:
        """Whether the layer works only with the attention "ssd".

        True if its tokens are scored by attention, or if its heads differ in length or are stored in another order.
        """
        order = [head for group in self.groups for head in group.heads]
        return len(self.groups) > 1 or order != sorted(order) or self.groups[0].is_scored

    @property
    def evicts(self) -> bool:
        """Whether some heads lack room for the whole grid."""
        return min(self.num_slots) < self.num_cells

    @property
    def takes_kernel(self) -> bool:
        """Whether the fused kernel of `kernels/dispatch.py` supports this layer.

        The kernel adds up attention at every step, so the layer then stores no queries. It does not support scorers
        that add up attention in another way.
        """
        return not self.scorer.needs_queries or type(self.scorer).observe is Scorer.observe

    @cached_property
    def groups(self) -> list[GroupPlan]:
        """The heads in groups with equally many slots."""
        by_slots: dict[int, list[int]] = {}
        for head in sorted(range(len(self.is_spatial)), key=lambda head: self.is_spatial[head]):  # semantic first
            by_slots.setdefault(self.num_slots[head], []).append(head)
        return [self._group(num_slots, heads) for num_slots, heads in by_slots.items()]

    def _group(self, num_slots: int, heads: list[int]) -> GroupPlan:
        # with room for the whole grid nothing is evicted within an image, so nothing is scored
        evicts = num_slots < self.num_cells
        num_semantic = sum(not self.is_spatial[head] for head in heads) if evicts else 0
        return GroupPlan(
            heads=tuple(heads if evicts else sorted(heads)),
            num_semantic=num_semantic,
            num_slots=num_slots,
            buffer=min(self.buffer, num_slots),
            num_recent=self.num_recent[heads[0]],  # of the first semantic head, if there is one
            num_sinks=self.num_sinks if evicts else 0,
            scorer=self.scorer.at(heads[:num_semantic]),
        )
