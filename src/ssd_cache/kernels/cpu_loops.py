"""The loops of `cpu_loops.cpp`, built for this machine's processor with the compiler that `torch.compile` uses.

`fast_decode` uses them on a CPU, and so do eager steps over heads that evict or slots in 8 bits. Where they cannot be
built, torch's own operations run. This module does not decide which tokens are kept (`cache/slots.py` does) or when the
loops run (`dispatch.py`, `packed_linears.py` and `cache/fused_eviction.py` do).
"""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ssd_cache.io.showing import first_line
from ssd_cache.kernels import cpu_library
from ssd_cache.kernels.checks import PLAIN, Arguments, LayerSizes, check_stores, check_token, is_plain_on_cpu
from ssd_cache.kernels.eight_bits import KV_DTYPES

PANEL = 16
"""Outputs of a linear layer computed together; must equal `PANEL` in the C++ source."""

DECODERS = {torch.float32: "decode_float32", torch.bfloat16: "decode_bfloat16"}
"""Name of the decode loop for each dtype of K and V."""

TABLE = "_ssd_table"
"""Name of the attribute of a layer's first keys, or of a store's positions, that holds its `_Table`."""

CODES = (None, *KV_DTYPES)
"""The formats of slots, in the order of the C++ source."""

FIXED = ("num_prompt", "num_evict", "num_recent", "num_sinks")
"""Numbers of an eviction that are the same at every eviction of a store."""

_Sizes = ctypes.c_int64 * (len(LayerSizes._fields) + 3)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loops as a library; None where they cannot be built. A build takes seconds, at most once on a machine.

    Warns:
        UserWarning: once, with the reason, when the compiler fails. `torch.compile` itself reports a missing compiler.
    """
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    try:
        found = cpu_library.load(Path(__file__).with_suffix(".cpp"))
        if found is None:
            return None
        found.linear.argtypes, found.linear.restype = [pointer] * 4 + [size] * 4, None
        found.evict.argtypes, found.evict.restype = [pointer], None
        for name in DECODERS.values():
            loop = getattr(found, name)
            loop.argtypes, loop.restype = [pointer] * 4 + [ctypes.c_float] + [pointer] * 2, ctypes.c_bool
    except Exception as error:  # compilers, loaders and torch's private modules raise many unrelated classes
        warnings.warn(f"fast_decode continues without ssd-cache's CPU kernels: {first_line(error)}", stacklevel=2)
        return None
    return found


def is_loaded() -> bool:
    """Whether the loops are there, without building them."""
    return library.cache_info().currsize > 0 and library() is not None


def _loops() -> ctypes.CDLL:
    loops = library()
    if loops is None:
        raise RuntimeError("ssd-cache's loops for the CPU cannot be built here: use torch's own operations")
    return loops


def takes_weight(weight: torch.Tensor) -> bool:
    """Whether a weight `[out, in]` can be packed: plain, contiguous, float32, on the CPU, `out` a multiple of PANEL."""
    return (
        is_plain_on_cpu(weight, torch.float32)
        and weight.dim() == 2
        and weight.shape[0] % PANEL == 0
        and weight.numel() > 0
        and weight.is_contiguous()
    )


def pack(weight: torch.Tensor, place: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """Copy a weight that `takes_weight` accepts, in the layout `[out / PANEL, in, PANEL]`, for any number of rows.

    The copy is written to `place`, an earlier copy of a weight of this size, if there is one.
    """
    turned = weight.detach().reshape(-1, PANEL, weight.shape[1]).transpose(1, 2)
    place = torch.empty(turned.shape) if place is None else place.view(turned.shape)
    return place.copy_(turned)


def linear(
    states: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`F.linear` of states `[..., in]` and a weight `[out, in]` that `pack` copied to `place`, in float32.

    The result is None where the loop cannot take these tensors; torch may still be able to multiply them.
    """
    out_features, in_features = weight.shape
    if not (is_plain_on_cpu(states, torch.float32) and states.dim() and states.shape[-1] == in_features):
        return None
    if bias is not None and not (
        is_plain_on_cpu(bias, torch.float32) and bias.shape == (out_features,) and bias.is_contiguous()
    ):
        return None
    states = states.contiguous()
    output = states.new_empty(*states.shape[:-1], out_features)
    _loops().linear(
        states.data_ptr(),
        place.data_ptr(),
        None if bias is None else bias.data_ptr(),
        output.data_ptr(),
        states.numel() // in_features,
        in_features,
        out_features,
        torch.get_num_threads(),
    )
    return output


class _Table:
    """Addresses and sizes of tensors as a loop reads them, in `numbers`; made once, and kept by one of the tensors."""

    def __init__(self, numbers: Sequence[int], tensors: Sequence[torch.Tensor], facts: object):
        self.numbers, self.facts = (ctypes.c_int64 * len(numbers))(*numbers), facts
        self.tensors = [weakref.ref(tensor) for tensor in tensors]

    def __reduce__(self):
        """Copies and pickles of the tensor hold None instead."""
        return (type(None), ())

    def serves(self, tensors: Sequence[torch.Tensor], facts: object) -> bool:
        """Whether these are the tensors and facts that the table was made for."""
        return (
            self.facts == facts
            and len(tensors) == len(self.tensors)
            and all(kept() is tensor for kept, tensor in zip(self.tensors, tensors, strict=True))
        )


def _store_tensors(given: Arguments) -> list[torch.Tensor]:
    return [*given.keys, *given.values, *given.scores, *given.heads, *given.masks, *given.slots, *given.codes]


def _store_numbers(given: Arguments, layer: LayerSizes) -> list[int]:
    """Addresses and sizes of the stores, each checked."""
    numbers, checked = [], check_stores(given, layer)
    for store, sizes in zip(given.stores(), checked, strict=True):
        numbers += [0 if tensor is None else tensor.data_ptr() for tensor in store] + list(sizes)
    return numbers


def launch(given: Arguments) -> None:
    """Run the decode loop over the stores of a layer; see `dispatch.decode`.

    The stores are checked when one of their tensors is another object than at the last launch. Their data must stay
    where it was.

    Raises:
        ValueError: as for `checks.check_token`; also for a slot that is not there, or for heads that the layer does not
            have.
    """
    layer = check_token(given, dtypes=DECODERS)
    if not given.query.is_cpu:
        raise ValueError(f"the loops for the CPU got a query on {given.query.device}")
    table: _Table | None = getattr(given.keys[0], TABLE, None) if given.keys else None
    tensors, facts = _store_tensors(given), (layer, given.query.dtype, given.kv_dtype)
    if table is None or not table.serves(tensors, facts):
        table = _Table(_store_numbers(given, layer), tensors, facts)
        setattr(given.keys[0], TABLE, table)
    new = [states.contiguous() for states in (given.query, given.new_key, given.new_value)]  # kept alive by the list
    is_done = getattr(_loops(), DECODERS[given.query.dtype])(
        *(tensor.data_ptr() for tensor in new),
        table.numbers,
        given.scaling,
        given.output.data_ptr(),
        _Sizes(*layer, len(given.keys), CODES.index(given.kv_dtype), torch.get_num_threads()),
    )
    if not is_done:
        found = [(store.heads.tolist(), int(store.slot), store.scores.shape[2]) for store in given.stores()]
        raise ValueError(
            f"a store has no such slot, or heads that are not among the layer's {layer.kv_heads} KV heads; heads, slot "
            f"and number of slots of each store: {found}"
        )


def evict(
    positions: torch.Tensor,
    ranks: torch.Tensor | None,
    received: torch.Tensor,
    states: list[torch.Tensor],
    scales: list[torch.Tensor],
    counts: Mapping[str, int],
    weights: tuple[torch.Tensor, ...] = (),
) -> None:
    """Evict tokens from full slots, in place; the arguments are those of `triton_evict.launch`.

    By a learned score's `weights`, it ranks K and V of a dtype in DECODERS.

    Raises:
        ValueError: a tensor has not the shape, dtype, device or layout that the loop reads.
    """
    tensors, facts = [positions, received, *states, *scales, *weights], [counts[name] for name in FIXED]
    table: _Table | None = getattr(positions, TABLE, None)
    if table is None or not table.serves(tensors, facts):
        table = _Table(_eviction_numbers(positions, received, states, scales, weights, facts), tensors, facts)
        setattr(positions, TABLE, table)
    num_ranked = received.shape[1] if weights else 0
    if ranks is not None:
        ranks = ranks.contiguous()
        num_ranked = ranks.shape[1]
        _check_tensor(ranks, torch.float32, (len(positions), min(num_ranked, positions.shape[1]), positions.shape[2]))
    table.numbers[:5] = [
        *(0 if ranks is None else ranks.data_ptr(), num_ranked, counts["num_seen"]),
        *(counts.get("first_new", 0), torch.get_num_threads()),
    ]
    _loops().evict(table.numbers)


def _eviction_numbers(
    positions: torch.Tensor,
    received: torch.Tensor,
    states: list[torch.Tensor],
    scales: list[torch.Tensor],
    weights: Sequence[torch.Tensor],
    facts: Sequence[int],
) -> list[int]:
    """Addresses and sizes of a store that evicts, each checked, after five numbers that every eviction sets."""
    (batch, num_heads, num_slots), num_scored = positions.shape, received.shape[1]
    num_prompt, num_evict, *_ = facts
    rows, grid = (batch, num_heads), weights[3].shape[1:] if weights else (0, 0)
    sizes = [states[0].shape[-1:], states[1].shape[-1:], (grid[0], grid[0]), grid]
    ranked = states[0].dtype if states[0].dtype in DECODERS else torch.float32  # with weights, K and V have this dtype
    expected: list[tuple[torch.Tensor, torch.dtype, tuple[int, ...]]] = [
        (positions, torch.int32, (*rows, num_slots)),
        (received, torch.float32, (batch, min(num_scored, num_heads), num_slots)),
        *(
            (tensor, ranked if weights else tensor.dtype, (*rows, num_prompt + num_slots, tensor.shape[-1]))
            for tensor in states
        ),
        *((tensor, torch.float32, (*rows, num_slots)) for tensor in scales),
        *((tensor, torch.float32, (num_scored, *size)) for tensor, size in zip(weights, sizes, strict=False)),
    ]
    for tensor, dtype, shape in expected:
        _check_tensor(tensor, dtype, shape)
    if not 1 <= num_evict <= num_slots:
        raise ValueError(f"num_evict={num_evict} tokens cannot be evicted from {num_slots} slots")
    return [
        *[0] * 5,
        *(positions.data_ptr(), received.data_ptr()),
        *([tensor.data_ptr() for tensor in scales] or (0, 0)),
        *(tensor.data_ptr() for tensor in states),
        *(batch, num_heads, num_scored, num_slots, *facts),
        *(tensor.shape[3] * tensor.element_size() for tensor in states),
        *([tensor.data_ptr() for tensor in weights] or (0, 0, 0, 0)),
        *(*grid, states[0].dtype is torch.bfloat16),
    ]


def _check_tensor(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not (
        tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.is_cpu
        and type(tensor) in PLAIN
        and tensor.is_contiguous()
    ):
        raise ValueError(
            f"the eviction loop got a tensor of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device} "
            f"({type(tensor).__name__}), and takes a plain, contiguous one of shape {shape}, {dtype} on the CPU"
        )
