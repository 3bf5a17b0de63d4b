"""Bytes of caches: of the tensors that one holds, and by formula before any is made.

The formulas are held to the tensors by tests. Weights and what a step needs for itself are not in them.
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
from ssd_cache.kernels.dispatch import is_wanted, passes_trial


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of K and V, and of all that is kept beside them."""

    key_value: int
    bookkeeping: int

    @property
    def total(self) -> int:
        return self.key_value + self.bookkeeping


def held_bytes(cache: Cache) -> CacheBytes:
    """What a cache holds now; of a quantized one, scales and all."""
    if isinstance(cache, SSDCache):
        stats = cache.memory_stats()
        return CacheBytes(stats.key_value, stats.bookkeeping)
    found = [value for layer in cache.layers for value in vars(layer).values()]
    return CacheBytes(sum(map(_nbytes, found)), 0)


def _nbytes(value: Any) -> int:
    """Bytes of K or V somewhere in an attribute of a cache layer; counters have no dimensions."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # optimum-quanto's, a tensor around others
            return sum(_nbytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.nbytes if value.dim() else 0
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0


def expected_bytes(subject: Subject, case: Case, num_pictures: int = 1) -> CacheBytes | None:
    """What a case holds at the end of a picture; None for a quantized cache, whose layout is its backend's.

    A full cache holds every token. A policy holds the prompt and all its slots, used or not, and beside them, of each
    slot, a position (int32) in every head and a score (float32) in the heads that are scored, whose queries of a buffer
    wait as well, but for where the kernel of `fused.py` makes the scores.
    """
    rows, itemsize = subject.rows_per_picture * num_pictures, subject.model.dtype.itemsize
    of_token = rows * slot_nbytes(subject.head_dim, itemsize, None)  # in the model's dtype, as the prompt always is
    if case.cache == "QuantizedCache":
        return None
    if case.is_full:
        heads = subject.config.num_hidden_layers * subject.config.num_key_value_heads
        seen = subject.length - (case.cache == "DynamicCache")  # the last token drawn is never fed back
        return CacheBytes(heads * seen * of_token, 0)
    cache = case.make_ssd(subject.head_map)
    plans = [layer.plan for layer in cache.layers]
    of_slot = rows * slot_nbytes(subject.head_dim, itemsize, cache.kv_dtype)
    groups = subject.config.num_attention_heads // subject.config.num_key_value_heads
    slots = sum(sum(plan.num_slots) for plan in plans)
    heads = sum(len(plan.num_slots) for plan in plans)
    beside = 4 * slots
    model, head_dim = subject.model, subject.head_dim
    has_kernel = is_wanted(model.device, on_cpu=case.is_compiled) and passes_trial(
        model.device, model.dtype, groups, head_dim, head_dim
    )
    for plan in plans:
        of_query = 0 if has_kernel and plan.takes_kernel else groups * head_dim * itemsize
        beside += sum(4 * num_slots + of_query * min(plan.buffer, num_slots) for num_slots in scored_heads(plan))
    return CacheBytes(heads * subject.num_prompt * of_token + slots * of_slot, rows * beside)


def scored_heads(plan: LayerPlan) -> list[int]:
    """Slots of the heads of a layer whose tokens are ranked by attention."""
    if plan.score in WITHOUT_QUERIES:
        return []
    kinds = zip(plan.kinds, plan.num_slots, strict=True)
    return [slots for kind, slots in kinds if kind == "semantic" and slots < plan.num_cells]


def weight_bytes(subject: Subject) -> int:
    """Bytes of all weights of the model, towers included; tied ones once."""
    return sum(weight.nbytes for weight in subject.model.parameters())


def mean_tokens_read(subject: Subject, case: Case, positions: list[int]) -> float:
    """Tokens whose K and V a step has to read, prompt and own token included: mean over heads and steps.

    A full cache has seen `position + 1` visual tokens. A head with fewer slots than that has between `slots - buffer`
    and `slots` older ones. What is read beyond this, free places under a mask say, is the implementation's loss.
    """
    if case.is_full:
        stored = [position + 1.0 for position in positions]
        return subject.num_prompt + sum(stored) / len(stored)
    plans = [layer.plan for layer in case.make_ssd(subject.head_map).layers]
    kinds = [(slots, min(plan.buffer, slots)) for plan in plans for slots in plan.num_slots]
    means = {kind: sum(_stored(position, *kind) for position in positions) / len(positions) for kind in set(kinds)}
    return subject.num_prompt + sum(means[kind] for kind in kinds) / len(kinds)


def _stored(position: int, num_slots: int, buffer: int) -> int:
    """Visual tokens in a head once token number `position`, counted from 0, has arrived."""
    if position < num_slots:
        return position + 1
    return num_slots - buffer + (position - num_slots) % buffer + 1
