"""Fused decode step: write K and V, attend, and add the received attention to the scores; one call for a layer.

It runs a Triton kernel on CUDA, and a C++ loop on a CPU (inside `fast_decode`, for heads that evict, and over slots in
8 bits), if that kernel passes a small trial against torch. A step's attention is added to the scores at once,
so no queries are stored. This module handles only tensors. `cache/backends.py` calls it; where no kernel can run, the
attention of torch does.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import warnings
from collections.abc import Sequence

import torch

from ssd_cache.io.showing import first_line
from ssd_cache.kernels import cpu_loops as cpu_kernels
from ssd_cache.kernels.checks import DTYPES, PLAIN, Arguments
from ssd_cache.kernels.eight_bits import dequantize, quantize

NOT_BUILT = "the CPU kernels, which need a C++ compiler, are not built"


def can_serve(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    on_cpu: bool = False,
    kv_dtype: str | None = None,
    is_optional: bool = False,
) -> bool:
    """Whether the kernel can run steps with tensors of these sizes, `[batch, heads, new, head_dim]`.

    It has no backward pass. On a CPU it runs only if `on_cpu` is set, since its last bits differ from a full cache's,
    or for slots in `kv_dtype`, which differ from it in any case.

    Warns:
        UserWarning: once, when there is no kernel for the device or dtype, unless `is_optional` is set; and once for
            each set of sizes, when an available kernel fails or is inaccurate in a small trial.
    """
    device, sizes = query.device, (query.shape[1] // key.shape[1], query.shape[3], value.shape[3])
    if (
        torch.is_grad_enabled()
        or not query.dtype == key.dtype == value.dtype
        or any(type(states) not in PLAIN for states in (query, key, value))
        or (device.type == "cpu" and torch.is_autocast_enabled("cpu"))
        or (takes_loops(device) and not on_cpu and kv_dtype is None)
    ):
        return False
    if reason := _missing(device, query.dtype):
        # inside `fast_decode`, torch.compile itself warns of a missing compiler; eager steps elsewhere expect no kernel
        if not is_optional and (reason != NOT_BUILT if on_cpu else device.type in ("cpu", "cuda")):
            _warn_of_torch(reason, kv_dtype)
        return False
    try:
        return passes_trial(device, query.dtype, *sizes, kv_dtype)
    except torch.OutOfMemoryError:  # memory is full now; it may be free for the next image
        return False


def has_triton(device: torch.device) -> bool:
    """Whether kernels in Triton run on a device; TRITON_INTERPRET=1 runs them on a CPU."""
    is_there = device.type == "cuda" or (device.type == "cpu" and not takes_loops(device))
    return is_there and importlib.util.find_spec("triton") is not None


def kernel_name(device: torch.device) -> str:
    """What the kernel of a device is called in reports."""
    return "CPU loop" if takes_loops(device) else "Triton kernel"


def takes_loops(device: torch.device) -> bool:
    """Whether to use the CPU loops: on a CPU, unless TRITON_INTERPRET=1 requests Triton's interpreter."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def _missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for this device and dtype; None if there is one."""
    dtypes = cpu_kernels.DECODERS if takes_loops(device) else DTYPES
    if device.type not in ("cuda", "cpu") or dtype not in dtypes:
        return f"no kernel of ssd-cache takes {dtype} on this {device.type}"
    if takes_loops(device):
        return None if cpu_kernels.library() is not None else NOT_BUILT
    return None if has_triton(device) else "Triton is not installed"


@functools.cache
def _warn_of_torch(reason: str, kv_dtype: str | None) -> None:
    how = f", for which slots in {kv_dtype} are converted to the model's dtype at every step" if kv_dtype else ""
    warnings.warn(f"torch's attention runs the steps over an SSDCache{how}: {reason}", stacklevel=2)


@functools.cache
def passes_trial(
    device: torch.device, dtype: torch.dtype, groups: int, head_dim: int, value_dim: int, kv_dtype: str | None = None
) -> bool:
    """Whether the kernel runs with these sizes and agrees with float64 on the CPU, without and with a mask (`_try`).

    On a GPU also with so many rows that no tokens of a head are split among programs.

    Raises:
        torch.OutOfMemoryError: the device is full now; no result is cached, and the next call tries again.
    """
    if _missing(device, dtype):
        return False
    try:
        batches = [2]
        if device.type == "cuda":
            from ssd_cache.kernels.triton_decode import num_multiprocessors

            batches.append(num_multiprocessors(device))
        cases = itertools.product((False, True), batches)
        found = (_try(device, dtype, groups, head_dim, value_dim, kv_dtype, *case) for case in cases)
        failed = next(filter(None, found), "")
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # compilers and drivers raise many unrelated classes
        failed = first_line(failure)
    if failed:
        warnings.warn(
            f"ssd-cache's kernel does not serve on this {device.type}, torch's attention does: {failed}", stacklevel=2
        )
    return not failed


def _try(
    device: torch.device,
    dtype: torch.dtype,
    groups: int,
    head_dim: int,
    value_dim: int,
    kv_dtype: str | None,
    has_mask: bool,
    batch: int,
) -> str:
    """The error in output, scores, K or V of one step over 145 columns, of two heads of which one is scored, or ""."""
    num_prompt, num_slots, number, scaling = 5, 150, 139, head_dim**-0.5
    end, generator = num_prompt + number, torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, new_key = random(batch, 2, groups, head_dim), random(batch, 2, 1, head_dim)
    new_value, columns = random(batch, 2, 1, value_dim), num_prompt + num_slots
    keys, values = random(batch, 2, columns, head_dim), random(batch, 2, columns, value_dim)
    heads, mask = torch.tensor([1, 0]), torch.ones(batch, columns, dtype=torch.bool)
    mask[1, :2] = not has_mask

    def held() -> list[torch.Tensor]:
        """K and V as a store holds them; with `kv_dtype` the prompt, and codes and scales of the slots."""
        if kv_dtype is None:
            return [keys, values]
        prompt, slots = slice(num_prompt), slice(num_prompt, None)
        codes = (*quantize(keys[:, :, slots], kv_dtype), *quantize(values[:, :, slots], kv_dtype))
        return [keys[:, :, prompt], values[:, :, prompt], *codes]

    given = [query, new_key, new_value, torch.zeros(batch, 1, num_slots), heads, mask, torch.tensor(number), *held()]
    given = [tensor.to(device, copy=True) for tensor in given]
    output = given[0].new_full((batch, 2, groups, value_dim), float("nan"))
    scores, *store = ([tensor] for tensor in given[3:9])
    masks = store[1] if has_mask else []
    _launch(*given[:3], *store[3:], scores, store[0], masks, store[2], scaling, output, given[9:], kv_dtype)

    keys[:, :, end : end + 1], values[:, :, end : end + 1] = new_key[:, heads], new_value[:, heads]
    expected = held()
    if kv_dtype is not None:
        keys, values = (
            torch.cat([expected[at].float(), dequantize(codes, scales, kv_dtype, torch.float32)], dim=2)
            for at, (codes, scales) in enumerate((expected[2:4], expected[4:6]))
        )
    stored = slice(end + 1)
    logits = scaling * query[:, heads].double() @ keys[:, :, stored].double().mT
    weights = logits.masked_fill(~mask[:, None, None, stored], float("-inf")).softmax(-1)
    attended = (weights @ values[:, :, stored].double())[:, heads.argsort()]
    received = torch.zeros(batch, num_slots, dtype=torch.float64)
    received[:, : number + 1] = weights[:, 0, :, num_prompt:].sum(1)
    # limits: a few roundings of the output's dtype; scores are float32 sums of at most `groups` weights below 1
    for name, found, exact, limit in (
        ("", output, attended, 8 * torch.finfo(dtype).eps * float(values.abs().max())),
        (" in the scores", given[3][:, 0], received, 1e-5 * groups),
    ):
        error = float((found.cpu().double() - exact).abs().max())
        if not error <= limit:
            return f"it errs by {error:.1e}{name}"
    is_written = all(torch.equal(found.cpu(), states) for found, states in zip(given[7:], expected, strict=True))
    return "" if is_written else "it writes K and V wrongly"


def decode(
    query: torch.Tensor,
    new_key: torch.Tensor,
    new_value: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    scores: list[torch.Tensor],
    heads: list[torch.Tensor],
    masks: list[torch.Tensor],
    slots: list[torch.Tensor],
    scaling: float,
    output: torch.Tensor,
    codes: Sequence[torch.Tensor] = (),
    kv_dtype: str | None = None,
) -> None:
    """Run one token's decode step over a layer's stores (see `SlotStore`), in place, without waiting for the device.

    The lists have one tensor for each store. `heads` and `num_slots` are those of the store.

    Args:
        query: `[batch, kv_heads, groups, head_dim]`, all heads of the layer in the model's order.
        new_key, new_value: K and V of the new token, `[batch, kv_heads, 1, head_dim]`.
        keys, values: `[batch, heads, num_prompt + num_slots, head_dim]`; the token's column is written.
        scores: `[batch, num_scored, num_slots]`, float32; the attention received in the first `num_scored` heads is
            added.
        heads: `[heads]`, the layer's KV head of each head in the store.
        masks: `[batch, num_prompt + num_slots]`, False on the prompt's padding; an empty list without padding.
        slots: slot of the token, int64, a tensor without dimensions; the token sees the slots up to it.
        scaling: factor applied to the dot products of query and keys.
        output: `[batch, kv_heads, groups, value_dim]`; the rows of the stores' heads are written.
        codes: with `kv_dtype`, four tensors of each store: codes `[batch, heads, num_slots, head_dim]`, int8, and
            scales `[batch, heads, num_slots]`, float32, of K, and then of V. `keys` and `values` are then the prompt.
        kv_dtype: what the codes are, a name of `eight_bits.KV_DTYPES`.
    """
    run = torch.ops.ssd_cache.decode if torch.compiler.is_compiling() else _launch
    run(query, new_key, new_value, keys, values, scores, heads, masks, slots, scaling, output, list(codes), kv_dtype)


def _launch(*arguments) -> None:
    given = Arguments(*arguments)
    if takes_loops(given.query.device):
        return cpu_kernels.launch(given)
    from ssd_cache.kernels.triton_decode import launch

    return launch(given)


def _trace(query: torch.Tensor, *arguments) -> None:
    """Fake implementation for tracing: no output shapes. torch also runs it when any argument is a meta tensor."""
    tensors = (tensor for given in arguments for tensor in (given if isinstance(given, list) else [given]))
    if any(isinstance(tensor, torch.Tensor) and tensor.device != query.device for tensor in tensors):
        raise ValueError("the decode kernel got tensors on several devices, and takes those of one")


# As a torch operator, the launch is one node in a compiled graph. Outside of compiled graphs, the operator would only
# add overhead. It is defined with torch.library.Library, since the wrapper of torch.library.custom_op takes half as
# long as a layer's attention.
_library = torch.library.Library("ssd_cache", "FRAGMENT")
_library.define(
    "decode(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!)[] keys, Tensor(b!)[] values, "
    "Tensor(c!)[] scores, Tensor[] heads, Tensor[] masks, Tensor[] slots, float scaling, Tensor(d!) output, "
    "Tensor(e!)[] codes, str? kv_dtype) -> ()"
)
_library.impl("decode", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("ssd_cache::decode", _trace, lib=_library)
