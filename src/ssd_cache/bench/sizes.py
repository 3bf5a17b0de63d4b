"""Bytes of caches: measured from the tensors of a cache, and predicted by formula before a cache is made.

Tests compare the formulas with the tensors. The formulas exclude weights and temporary memory of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ssd_cache.bench.cases import Case
from ssd_cache.bench.subject import Subject
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.layer import LayerPlan
from ssd_cache.cache.quantized import slot_nbytes
from ssd_cache.cache.retention import WITHOUT_QUERIES
from ssd_cache.kernels.dispatch import _takes_loops, passes_trial


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of K and V, and of the bookkeeping beside them."""

    key_value: int
    bookkeeping: int

    @property
    def total(self) -> int:
        return self.key_value + self.bookkeeping


def held_bytes(cache: Cache) -> CacheBytes:
    """Bytes that a cache holds now; for a quantized cache, scales included."""
    if isinstance(cache, SSDCache):
        stats = cache.memory_stats()
        return CacheBytes(stats.key_value, stats.bookkeeping)
    found = [value for layer in cache.layers for value in vars(layer).values()]
    return CacheBytes(sum(map(_nbytes, found)), 0)


def _nbytes(value: Any) -> int:
    """Bytes of K and V in an attribute of a cache layer; tensors without dimensions are counters and do not count."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a tensor of optimum-quanto, which wraps others
            return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.nbytes if value.dim() else 0
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def expected_bytes(subject: Subject, case: Case, num_pictures: int = 1) -> CacheBytes | None:
    """Bytes that a case holds at the end of an image; None for a quantized cache, whose backend chooses the layout.

    A full cache holds every token. A policy holds the prompt and all its slots, used or not. Its bookkeeping is a
    position (int32) for every slot and, in scored heads, a score (float32) for every slot. Scored heads also hold the
    queries of one eviction interval, unless the kernel of `kernels/dispatch.py` computes the scores.
    """
    rows, itemsize = subject.rows_per_picture * num_pictures, subject.model.dtype.itemsize
    of_token = rows * slot_nbytes(subject.head_dim, itemsize, None)  # the prompt is always stored in the model's dtype
    if case.cache == "QuantizedCache":
        return None
    if case.is_full:
        heads = subject.config.num_hidden_layers * subject.config.num_key_value_heads
        seen = subject.length - (case.cache == "DynamicCache")  # the last generated token is never fed back
        return CacheBytes(heads * seen * of_token, 0)
    cache = case.make_ssd(subject.head_map)
    plans = [layer.plan for layer in cache.layers]
    of_slot = rows * slot_nbytes(subject.head_dim, itemsize, cache.kv_dtype)
    groups = subject.config.num_attention_heads // subject.config.num_key_value_heads
    slots = sum(sum(plan.num_slots) for plan in plans)
    heads = sum(len(plan.num_slots) for plan in plans)
    beside = 4 * slots
    model, head_dim = subject.model, subject.head_dim
    has_kernel = (case.is_compiled or not _takes_loops(model.device)) and passes_trial(
        model.device, model.dtype, groups, head_dim, head_dim
    )
    for plan in plans:
        of_query = 0 if has_kernel and plan.takes_kernel else groups * head_dim * itemsize
        beside += sum(4 * num_slots + of_query * min(plan.buffer, num_slots) for num_slots in scored_heads(plan))
    return CacheBytes(heads * subject.num_prompt * of_token + slots * of_slot, rows * beside)


def scored_heads(plan: LayerPlan) -> list[int]:
    """Numbers of slots of a layer's scored heads: those that rank tokens by attention."""
    if plan.score in WITHOUT_QUERIES:
        return []
    kinds = zip(plan.kinds, plan.num_slots, strict=True)
    return [slots for kind, slots in kinds if kind == "semantic" and slots < plan.num_cells]


def weight_bytes(subject: Subject) -> int:
    """Bytes of all weights of the model, towers included; tied weights count once."""
    return sum(weight.nbytes for weight in subject.model.parameters())


def mean_tokens_read(subject: Subject, case: Case, positions: list[int]) -> float:
    """Tokens whose K and V a step must read, prompt and own token included: mean over heads and steps.

    A full cache has seen `position + 1` visual tokens. A head with fewer slots than that holds between `slots - buffer`
    and `slots` older ones. Further reads, for example of masked free slots, are overhead and do not count.
    """
    if case.is_full:
        stored = [position + 1.0 for position in positions]
        return subject.num_prompt + sum(stored) / len(stored)
    plans = [layer.plan for layer in case.make_ssd(subject.head_map).layers]
    kinds = [(slots, min(plan.buffer, slots)) for plan in plans for slots in plan.num_slots]
    means = {kind: sum(_stored(position, *kind) for position in positions) / len(positions) for kind in set(kinds)}
    return subject.num_prompt + sum(means[kind] for kind in kinds) / len(kinds)


def _stored(position: int, num_slots: int, buffer: int) -> int:
    """Visual tokens in a head after token number `position`, counted from 0, has arrived."""
    if position < num_slots:
        return position + 1
    return num_slots - buffer + (position - num_slots) % buffer + 1
