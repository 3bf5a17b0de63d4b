"""The loops of `cpu_kernels.cpp`, built for the processor at hand with the compiler that `torch.compile` uses.

`fast_decode` works with them on a CPU. Where they can not be built, torch's own attention and products run. What is
kept and when they serve is decided elsewhere (`slots.py`, `fused.py`, `packed_linears.py`).
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch

from ssd_cache import cpu_library

PANEL = 16
"""Outputs that a linear layer makes at once; `PANEL` of the C++ as well."""

DECODERS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}
"""The loop over a store, by the dtype of its K and V."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loops as a library, built within seconds at most once on a machine; None where they cannot be.

    Warns:
        UserWarning: once, with the reason, where the compiler fails. That there is none, `torch.compile` says itself.
    """
    try:
        found = cpu_library.load(
            Path(__file__).with_suffix(".cpp"), functions=("linear", *DECODERS.values())
        )
    except Exception as error:  # what compilers, loaders and torch's private modules raise has no class in common
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(f"fast_decode goes on without ssd-cache's own loops for the CPU: {reason}", stacklevel=2)
        return None
    if found is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    found.linear.argtypes = [pointer] * 4 + [size] * 3
    for name in DECODERS.values():
        getattr(found, name).argtypes = [pointer] * 8 + [ctypes.c_float] + [pointer] * 2
    for name in ("linear", *DECODERS.values()):
        getattr(found, name).restype = None
    return found


def pack(weight: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """A weight `[out, in]` as `linear` reads it, written to a place of as many numbers.

    Returns:
        `[out / PANEL, in, PANEL]`, in that place; `out` has to be a multiple of `PANEL`.
    """
    turned = weight.reshape(-1, PANEL, weight.shape[1]).transpose(1, 2)
    return place.view(turned.shape).copy_(turned)


def linear(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` by a weight of `pack`, in float32.

    Args:
        states: `[..., in]`.
        packed: `[out / PANEL, in, PANEL]`.
        bias: `[out]`, or None.

    Returns:
        `[..., out]`.
    """
    loops = library()
    assert loops is not None
    states = states.contiguous()
    in_features, out_features = packed.shape[1], packed.shape[0] * PANEL
    output = states.new_empty(*states.shape[:-1], out_features)
    loops.linear(
        states.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        states.numel() // in_features,
        in_features,
        out_features,
    )
    return output


def launch(
    query: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    heads: torch.Tensor,
    mask: torch.Tensor | None,
    step: torch.Tensor,
    scaling: float,
    buffer: int,
    output: torch.Tensor,
) -> None:
    """Run the loop over a store; see `fused.decode` for the shapes."""
    loops = library()
    assert loops is not None
    query, new_key, new_value = (states.contiguous() for states in (query, new_key, new_value))
    number, num_slots = int(step), scores.shape[2]
    # slots fill in order, and from then on the last `buffer` of them again
    slot = number if number < num_slots else num_slots - buffer + (number - num_slots) % buffer
    sizes = (
        *query.shape,
        values.shape[3],
        *keys.shape[1:2],
        scores.shape[1],
        keys.shape[2] - num_slots,
        num_slots,
        slot,
    )
    getattr(loops, DECODERS[query.dtype])(
        query.data_ptr(),
        new_key.data_ptr(),
        new_value.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        scores.data_ptr(),
        heads.data_ptr(),
        None if mask is None else mask.data_ptr(),
        scaling,
        output.data_ptr(),
        (ctypes.c_int64 * len(sizes))(*sizes),
    )
