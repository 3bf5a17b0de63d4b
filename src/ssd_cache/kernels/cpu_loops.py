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

from ssd_cache.kernels import cpu_library
from ssd_cache.kernels.checks import PLAIN, check

PANEL = 16
"""Outputs that a linear layer makes at once; `PANEL` of the C++ as well."""

DECODERS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}
"""The loop over a store, by the dtype of its K and V."""

_Sizes = ctypes.c_int64 * 10
_DONE, _NO_MEMORY, _NO_SUCH_HEAD, _WEIGHT_CHANGED = range(4)  # `Status` of the C++


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loops as a library, built within seconds at most once on a machine; None where they cannot be.

    Warns:
        UserWarning: once, with the reason, where the compiler fails. That there is none, `torch.compile` says itself.
    """
    try:
        found = cpu_library.load(
            Path(__file__).with_suffix(".cpp"), functions=("linear", "is_packed", *DECODERS.values())
        )
    except Exception as error:  # what compilers, loaders and torch's private modules raise has no class in common
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        warnings.warn(f"fast_decode goes on without ssd-cache's own loops for the CPU: {reason}", stacklevel=2)
        return None
    if found is None:
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    found.linear.argtypes = [pointer] * 5 + [size] * 3
    found.is_packed.argtypes = [pointer] * 2 + [size] * 2
    found.is_packed.restype = ctypes.c_bool
    for name in DECODERS.values():
        getattr(found, name).argtypes = [pointer] * 8 + [ctypes.c_float] + [pointer] * 2
    return found


def _loops() -> ctypes.CDLL:
    loops = library()
    if loops is None:
        raise RuntimeError("ssd-cache's loops for the CPU cannot be built here: use torch's own operations")
    return loops


def _is_float32(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and type(tensor) in PLAIN


def takes_weight(weight: torch.Tensor) -> bool:
    """Whether a weight `[out, in]` can be packed: plain, contiguous, float32, on the CPU, and `out` fills panels."""
    return (
        _is_float32(weight)
        and weight.dim() == 2
        and weight.shape[0] % PANEL == 0
        and weight.numel() > 0
        and weight.is_contiguous()
    )


def _check_weight(weight: torch.Tensor, place: torch.Tensor) -> None:
    is_place = _is_float32(place) and place.numel() == weight.numel() and place.is_contiguous()
    if not (is_place and takes_weight(weight)):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} in {weight.dtype} on {weight.device} cannot be packed into "
            f"{place.numel()} numbers: use torch.nn.functional.linear"
        )


def pack(weight: torch.Tensor, place: torch.Tensor) -> None:
    """Write a weight `[out, in]` to a place of as many numbers, laid out `[out / PANEL, in, PANEL]` for `linear`.

    Raises:
        ValueError: a weight that cannot be packed, see `takes_weight`, or a place that does not fit.
    """
    _check_weight(weight, place)
    turned = weight.reshape(-1, PANEL, weight.shape[1]).transpose(1, 2)
    place.view(turned.shape).copy_(turned)


def is_packed(weight: torch.Tensor, place: torch.Tensor) -> bool:
    """Whether a place holds exactly the numbers of a weight; raises as `pack` does."""
    _check_weight(weight, place)
    out_features, in_features = weight.shape
    return _loops().is_packed(weight.data_ptr(), place.data_ptr(), in_features, out_features)


def linear(
    states: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`torch.nn.functional.linear` by a packed weight, in float32.

    Args:
        states: `[..., in]`.
        weight: `[out, in]`; 32 of its numbers are compared with the packed ones.
        place: where `pack` wrote the weight.
        bias: `[out]`, or None.

    Returns:
        `[..., out]`; None where the weight is not what was packed.

    Raises:
        ValueError: tensors that the loop cannot take; those that fit together are torch's to multiply.
    """
    _check_weight(weight, place)
    out_features, in_features = weight.shape
    fits = _is_float32(states) and states.dim() and states.shape[-1] == in_features
    if bias is not None:
        fits = fits and _is_float32(bias) and bias.shape == (out_features,) and bias.is_contiguous()
    if not fits:
        tensors = {"states": states, "bias": bias}
        given = [f"{name} {tuple(t.shape)} {t.dtype} on {t.device}" for name, t in tensors.items() if t is not None]
        raise ValueError(
            f"the loop for linear layers got {' and '.join(given)} for a float32 weight {tuple(weight.shape)} on the "
            "CPU: use torch.nn.functional.linear"
        )
    states = states.contiguous()
    output = states.new_empty(*states.shape[:-1], out_features)
    status = _loops().linear(
        states.data_ptr(),
        weight.data_ptr(),
        place.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        states.numel() // in_features,
        in_features,
        out_features,
    )
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for a product of states {tuple(states.shape)}")
    return None if status == _WEIGHT_CHANGED else output


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
    """Run the loop over a store; see `fused.decode` for the shapes.

    Raises:
        ValueError: as `fused_checks.check`, or heads or a step that are not there.
    """
    sizes = check(query, new_key, new_value, keys, values, scores, heads, mask, step, buffer, output, dtypes=DECODERS)
    if not query.is_cpu:
        raise ValueError(f"the loops for the CPU got a query on {query.device}")
    query, new_key, new_value = query.contiguous(), new_key.contiguous(), new_value.contiguous()
    number, num_slots = int(step), sizes[-1]
    if number < 0:
        raise ValueError(f"step is {number}: visual tokens are counted from 0")
    # slots fill in order, and from then on the last `buffer` of them again
    slot = number if number < num_slots else num_slots - buffer + (number - num_slots) % buffer
    status = getattr(_loops(), DECODERS[query.dtype])(
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
        _Sizes(*sizes, slot),
    )
    if status == _NO_SUCH_HEAD:
        raise ValueError(f"heads {heads.tolist()} are not all among the layer's {query.shape[1]} KV heads")
