"""Checks the arguments of a fused decode step before every launch, because the kernels access raw memory.

Both kernels call `check`, so it cannot be bypassed. It checks shapes, dtypes, devices and layouts. It reads no tensor
data, so it never waits for a device. The kernels themselves check the data (heads and slot).
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of K and V that the Triton kernel takes; the CPU loop takes those of `cpu_loops.DECODERS`."""

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types whose `data_ptr` is the address of the tensor's data; this need not hold for a subclass."""


class Arguments(NamedTuple):
    """The arguments of `dispatch.decode`, which gives their shapes."""

    query: torch.Tensor
    new_key: torch.Tensor
    new_value: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    heads: torch.Tensor
    mask: torch.Tensor | None
    slot: torch.Tensor
    scaling: float
    output: torch.Tensor


def check(given: Arguments, dtypes: Container[torch.dtype]) -> tuple[int, ...]:
    """Refuse arguments that do not fit together.

    Returns:
        batch, kv_heads, groups, head_dim, value_dim, heads of the store, heads that are scored, num_prompt, num_slots.

    Raises:
        ValueError: the kernel cannot take a shape, dtype, device or layout; the message names it and what is expected.
    """
    query, keys, values, scores = given.query, given.keys, given.values, given.scores
    dtype, device = query.dtype, query.device
    if dtype not in dtypes or type(query) not in PLAIN:
        raise ValueError(f"the decode kernel does not take a {type(query).__name__} in {dtype}: use torch's attention")
    if not (query.dim() == keys.dim() == values.dim() == 4 and scores.dim() == 3):
        shapes = [tuple(tensor.shape) for tensor in (query, keys, values, scores)]
        raise ValueError(f"query, keys, values and scores have 4, 4, 4 and 3 dimensions, got {shapes}")
    batch, kv_heads, groups, head_dim = query.shape
    num_heads, length, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    num_scored, num_slots = scores.shape[1], scores.shape[2]
    if not 1 <= num_slots <= length:
        raise ValueError(f"{length} columns cannot hold {num_slots} slots: give 1 to {length}")
    if num_scored > num_heads or not (groups and head_dim and value_dim):
        raise ValueError(f"{num_scored} of {num_heads} heads cannot be scored, or a head has no queries or no numbers")
    for name, own, shape, is_in_place in (
        ("new_key", dtype, (batch, kv_heads, 1, head_dim), False),
        ("new_value", dtype, (batch, kv_heads, 1, value_dim), False),
        ("keys", dtype, (batch, num_heads, length, head_dim), True),
        ("values", dtype, (batch, num_heads, length, value_dim), True),
        ("scores", torch.float32, (batch, num_scored, num_slots), True),
        ("heads", torch.int64, (num_heads,), True),
        ("mask", torch.bool, (batch, length), True),
        ("slot", torch.int64, (), False),
        ("output", dtype, (batch, kv_heads, groups, value_dim), True),
    ):
        tensor = getattr(given, name)
        if tensor is not None and not (
            tensor.shape == shape
            and tensor.dtype is own
            and tensor.device == device
            and type(tensor) in PLAIN
            and (not is_in_place or tensor.is_contiguous())
        ):
            layout = " and contiguous" if is_in_place else ""
            raise ValueError(
                f"the decode kernel got {name} of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device} "
                f"({type(tensor).__name__}), and takes a plain tensor of shape {shape}, {own} on {device}{layout}"
            )
    return batch, kv_heads, groups, head_dim, value_dim, num_heads, num_scored, length - num_slots, num_slots
