"""The loops of `cpu_loops.cpp`, built for this machine's processor with the compiler that `torch.compile` uses.

`fast_decode` uses them on a CPU. Where they cannot be built, torch's own attention and matrix products run. This module
does not decide which tokens are kept (`cache/slots.py` does) or when the loops run (`dispatch.py` and
`packed_linears.py` do).
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
"""Outputs of a linear layer computed together; must equal `PANEL` in the C++ source."""

DECODERS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}
"""Name of the decode loop for each dtype of K and V."""

_Sizes = ctypes.c_int64 * 10
_DONE, _NO_MEMORY, _NO_SUCH_HEAD, _WEIGHT_CHANGED = range(4)  # `Status` in the C++ source


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loops as a library; None where they cannot be built. A build takes seconds, at most once on a machine.

    Warns:
        UserWarning: once, with the reason, when the compiler fails. `torch.compile` itself reports a missing compiler.
    """
    try:
        found = cpu_library.load(
            Path(__file__).with_suffix(".cpp"), functions=("linear", "is_packed", *DECODERS.values())
        )
    except Exception as error:  # compilers, loaders and torch's private modules raise many unrelated classes
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
    """Whether a weight `[out, in]` can be packed: plain, contiguous, float32, on the CPU, `out` a multiple of PANEL."""
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
    """Copy a weight `[out, in]` to `place`, which has as many numbers, in the layout `[out / PANEL, in, PANEL]`.

    Raises:
        ValueError: the weight cannot be packed (see `takes_weight`), or `place` does not fit.
    """
    _check_weight(weight, place)
    turned = weight.reshape(-1, PANEL, weight.shape[1]).transpose(1, 2)
    place.view(turned.shape).copy_(turned)


def is_packed(weight: torch.Tensor, place: torch.Tensor) -> bool:
    """Whether `place` holds exactly the numbers of a weight; raises the same errors as `pack`."""
    _check_weight(weight, place)
    out_features, in_features = weight.shape
    return _loops().is_packed(weight.data_ptr(), place.data_ptr(), in_features, out_features)


def linear(
    states: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`torch.nn.functional.linear` on a packed weight, in float32.

    Args:
        states: `[..., in]`.
        weight: `[out, in]`; 32 of its numbers are compared with the packed ones.
        place: where `pack` wrote the weight.
        bias: `[out]`, or None.

    Returns:
        `[..., out]`; None when the weight has changed since it was packed.

    Raises:
        ValueError: the loop cannot take these tensors; torch may still be able to multiply them.
        MemoryError: no memory for the product.
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
    slot: torch.Tensor,
    scaling: float,
    output: torch.Tensor,
) -> None:
    """Run the decode loop over a store; see `dispatch.decode` for the shapes.

    Raises:
        ValueError: as for `checks.check`; also for a slot that is not there, or for heads that the layer does not have.
    """
    sizes = check(query, new_key, new_value, keys, values, scores, heads, mask, slot, output, dtypes=DECODERS)
    if not query.is_cpu:
        raise ValueError(f"the loops for the CPU got a query on {query.device}")
    query, new_key, new_value = query.contiguous(), new_key.contiguous(), new_value.contiguous()
    number, num_slots = int(slot), sizes[-1]
    if not 0 <= number < num_slots:
        raise ValueError(f"slot is {number}: the store has slots 0 to {num_slots - 1}")
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
        _Sizes(*sizes, number),
    )
    if status == _NO_SUCH_HEAD:
        raise ValueError(f"heads {heads.tolist()} are not all among the layer's {query.shape[1]} KV heads")
