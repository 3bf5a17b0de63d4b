"""Checks the arguments of a fused decode step before a launch, because the kernels access raw memory.

Both kernels call `check_token` at every launch, and `check_stores` whenever a store has another tensor than before, so
neither can be bypassed. They check shapes, dtypes, devices and layouts. They read no tensor data, so they never wait
for a device. The kernels themselves check the data (heads and slots).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch

from ssd_cache.kernels.eight_bits import KV_DTYPES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of K and V that the Triton kernel takes; the CPU loop takes those of `cpu_loops.DECODERS`."""

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types whose `data_ptr` is the address of the tensor's data; this need not hold for a subclass."""


def is_plain_on_cpu(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype has its data in the memory of a CPU, at its `data_ptr`."""
    return tensor.dtype is dtype and tensor.is_cpu and type(tensor) in PLAIN


def address_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's data; for a tensor that has no single one, of the object."""
    return tensor.data_ptr() if type(tensor) in PLAIN and tensor.layout is torch.strided else id(tensor)


class Store(NamedTuple):
    """The tensors of one store; the last four are those of slots in 8 bits."""

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    heads: torch.Tensor
    mask: torch.Tensor | None
    slot: torch.Tensor
    key_codes: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None
    value_codes: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


class Arguments(NamedTuple):
    """The arguments of `dispatch.decode`, which gives their shapes."""

    query: torch.Tensor
    new_key: torch.Tensor
    new_value: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    scores: list[torch.Tensor]
    heads: list[torch.Tensor]
    masks: list[torch.Tensor]
    slots: list[torch.Tensor]
    scaling: float
    output: torch.Tensor
    codes: Sequence[torch.Tensor] = ()
    kv_dtype: str | None = None

    def stores(self) -> list[Store]:
        """The tensors of each store."""
        masks: Sequence[torch.Tensor | None] = self.masks or [None] * len(self.keys)
        lists = (self.keys, self.values, self.scores, self.heads, masks, self.slots)
        codes = zip(*(self.codes[part::4] for part in range(4)), strict=True) if self.codes else [()] * len(self.keys)
        return [Store(*tensors, *quantized) for *tensors, quantized in zip(*lists, codes, strict=True)]


class LayerSizes(NamedTuple):
    """Sizes that the stores of a layer share."""

    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    value_dim: int


class StoreSizes(NamedTuple):
    """Sizes of one store: its heads, those of them that are scored, and its columns."""

    num_heads: int
    num_scored: int
    num_prompt: int
    num_slots: int


def check_token(given: Arguments, dtypes: Container[torch.dtype]) -> LayerSizes:
    """Refuse a query, K, V or output that do not fit together; they are new in every step.

    Raises:
        ValueError: the kernel cannot take a shape, dtype, device or layout; the message names it and what is expected.
    """
    query = given.query
    if query.dtype not in dtypes or type(query) not in PLAIN:
        raise ValueError(
            f"the decode kernel does not take a {type(query).__name__} in {query.dtype}: use torch's attention"
        )
    if not query.dim() == given.output.dim() == 4:
        raise ValueError(
            f"query and output have 4 dimensions, got {tuple(query.shape)} and {tuple(given.output.shape)}"
        )
    batch, kv_heads, groups, head_dim = query.shape
    value_dim = given.output.shape[3]
    if not (groups and head_dim and value_dim):
        raise ValueError("the decode kernel got heads without queries or without numbers")
    _check("new_key", given.new_key, query, query.dtype, (batch, kv_heads, 1, head_dim), is_in_place=False)
    _check("new_value", given.new_value, query, query.dtype, (batch, kv_heads, 1, value_dim), is_in_place=False)
    _check("output", given.output, query, query.dtype, (batch, kv_heads, groups, value_dim))
    return LayerSizes(batch, kv_heads, groups, head_dim, value_dim)


def check_stores(given: Arguments, layer: LayerSizes) -> list[StoreSizes]:
    """Refuse stores that do not fit a token, which `check_token` accepted, or each other.

    Raises:
        ValueError: as for `check_token`.
    """
    query = given.query
    counts = [len(tensors) for tensors in (given.keys, given.values, given.scores, given.heads, given.slots)]
    if len({*counts, len(given.masks) or counts[0]}) > 1 or not counts[0]:
        raise ValueError(f"keys, values, scores, heads, masks and slots are of as many stores, got {counts}")
    if given.kv_dtype not in (None, *KV_DTYPES):
        raise ValueError(f"the decode kernel does not read kv_dtype={given.kv_dtype!r}: give one of {KV_DTYPES}")
    if len(given.codes) != (4 * counts[0] if given.kv_dtype else 0):
        raise ValueError(f"the codes and scales are four tensors of each store with kv_dtype, got {len(given.codes)}")
    return [_check_store(store, layer, query) for store in given.stores()]


def _check_store(store: Store, layer: LayerSizes, query: torch.Tensor) -> StoreSizes:
    keys, values, scores, heads, mask, slot, *codes = store
    if not (keys.dim() == values.dim() == 4 and scores.dim() == 3):
        shapes = [tuple(tensor.shape) for tensor in (keys, values, scores)]
        raise ValueError(f"keys, values and scores have 4, 4 and 3 dimensions, got {shapes}")
    num_heads, num_columns = keys.shape[1], keys.shape[2]
    num_scored, num_slots = scores.shape[1], scores.shape[2]
    length = num_columns if codes[0] is None else num_columns + num_slots
    if not 1 <= num_slots <= length:
        raise ValueError(f"{length} columns cannot hold {num_slots} slots: give 1 to {length}")
    if num_scored > num_heads:
        raise ValueError(f"{num_scored} of {num_heads} heads cannot be scored")
    batch, dtype = layer.batch, query.dtype
    _check("keys", keys, query, dtype, (batch, num_heads, num_columns, layer.head_dim))
    _check("values", values, query, dtype, (batch, num_heads, num_columns, layer.value_dim))
    for at, tensor in enumerate(codes):
        if tensor is not None:
            size = () if at % 2 else ((layer.head_dim, layer.value_dim)[at // 2],)  # none in scales
            kind = torch.float32 if at % 2 else torch.int8
            _check(Store._fields[6 + at], tensor, query, kind, (batch, num_heads, num_slots, *size))
    _check("scores", scores, query, torch.float32, (batch, num_scored, num_slots))
    _check("heads", heads, query, torch.int64, (num_heads,))
    if mask is not None:
        _check("mask", mask, query, torch.bool, (batch, length))
    _check("slot", slot, query, torch.int64, (), is_in_place=False)
    return StoreSizes(num_heads, num_scored, length - num_slots, num_slots)


def _check(
    name: str,
    tensor: torch.Tensor,
    query: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    is_in_place: bool = True,
) -> None:
    if not (
        tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.device == query.device
        and type(tensor) in PLAIN
        and (not is_in_place or tensor.is_contiguous())
    ):
        layout = " and contiguous" if is_in_place else ""
        raise ValueError(
            f"the decode kernel got {name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device} "
            f"({type(tensor).__name__}), and takes a plain tensor of shape {shape}, {dtype} on {query.device}{layout}"
        )
