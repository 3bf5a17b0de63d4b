"""One launch instead of five: a step's K and V written, attention made, and what each token received scored.

A Triton kernel on CUDA, a loop in C++ on a CPU inside `fast_decode`; chosen where it agrees with torch on a small
trial. It then holds no queries, since a step's attention is added to the scores at once. It knows tensors alone;
`attention.py` calls it, and where it does not serve, torch's own attention runs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch

from ssd_cache.kernels import cpu_loops as cpu_kernels
from ssd_cache.kernels.checks import DTYPES, PLAIN


def can_serve(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, on_cpu: bool = False) -> bool:
    """Whether steps with such tensors, `[batch, heads, new, head_dim]`, can run through the kernel.

    Not where a gradient is asked for, since the kernel has none, and on a CPU only where that is wanted, and not under
    autocast: sums in another order give other last bits than a full cache has.

    Warns:
        UserWarning: once for such sizes, where a kernel is there and fails, or errs, on a small trial.
    """
    if torch.is_grad_enabled() or not query.dtype == key.dtype == value.dtype:
        return False
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return False
    if any(type(states) not in PLAIN for states in (query, key, value)) or not is_wanted(query.device, on_cpu):
        return False
    try:
        return passes_trial(query.device, query.dtype, query.shape[1] // key.shape[1], query.shape[3], value.shape[3])
    except torch.OutOfMemoryError:  # of this moment: the next image may find room
        return False


def is_wanted(device: torch.device, on_cpu: bool) -> bool:
    """Whether to look for a kernel at all; `on_cpu` says what is wanted on a CPU."""
    return on_cpu or not _takes_loops(device)


def _takes_loops(device: torch.device) -> bool:
    """Whether the loops for the CPU serve, and not Triton's kernel, which its interpreter runs there when asked."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


def _is_there(device: torch.device, dtype: torch.dtype) -> bool:
    if _takes_loops(device):
        return dtype in cpu_kernels.DECODERS and cpu_kernels.library() is not None
    return device.type in ("cuda", "cpu") and dtype in DTYPES and importlib.util.find_spec("triton") is not None


@functools.cache
def passes_trial(device: torch.device, dtype: torch.dtype, groups: int, head_dim: int, value_dim: int) -> bool:
    """Whether the kernel runs with such sizes and agrees with a reference in float64 on the CPU.

    Two steps of two rows over 145 columns, more than a tile: without and with a mask, one of two heads scored. Outputs,
    scores, and K and V written are compared.

    Raises:
        torch.OutOfMemoryError: the device is full now; nothing is concluded from that, and the next call tries again.
    """
    if not _is_there(device, dtype):
        return False
    try:
        found = (_try(device, dtype, groups, head_dim, value_dim, has_mask) for has_mask in (False, True))
        failed = next(filter(None, found), "")
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # what a compiler or a driver raises has no class in common
        failed = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
    if failed:
        warnings.warn(
            f"ssd-cache's kernel does not serve on this {device.type}, torch's attention does: {failed}", stacklevel=2
        )
    return not failed


def _try(device: torch.device, dtype: torch.dtype, groups: int, head_dim: int, value_dim: int, has_mask: bool) -> str:
    """What is wrong with a step of the kernel; empty where nothing is."""
    num_prompt, num_slots, number, buffer, scaling = 5, 150, 139, 8, head_dim**-0.5
    end, generator = num_prompt + number, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, new_key, new_value = draw(2, 2, groups, head_dim), draw(2, 2, 1, head_dim), draw(2, 2, 1, value_dim)
    keys, values = draw(2, 2, num_prompt + num_slots, head_dim), draw(2, 2, num_prompt + num_slots, value_dim)
    heads, mask = torch.tensor([1, 0]), torch.ones(2, num_prompt + num_slots, dtype=torch.bool)
    mask[1, :2] = not has_mask
    given = [query, new_key, new_value, keys, values, torch.zeros(2, 1, num_slots), heads, mask, torch.tensor(number)]
    given = [tensor.to(device, copy=True) for tensor in given]
    output = given[0].new_full((2, 2, groups, value_dim), float("nan"))
    _launch(*given[:7], given[7] if has_mask else None, given[8], scaling, buffer, output)

    keys[:, :, end : end + 1], values[:, :, end : end + 1] = new_key[:, heads], new_value[:, heads]
    stored = slice(end + 1)
    logits = scaling * query[:, heads].double() @ keys[:, :, stored].double().mT
    weights = logits.masked_fill(~mask[:, None, None, stored], float("-inf")).softmax(-1)
    attended = (weights @ values[:, :, stored].double())[:, heads.argsort()]
    received = torch.zeros(2, num_slots, dtype=torch.float64)
    received[:, : number + 1] = weights[:, 0, :, num_prompt:].sum(1)
    # a few roundings of the output's dtype; scores are float32 sums of at most `groups` shares below 1
    for name, found, expected, limit in (
        ("", output, attended, 8 * torch.finfo(dtype).eps * float(values.abs().max())),
        (" in the scores", given[5][:, 0], received, 1e-5 * groups),
    ):
        error = float((found.cpu().double() - expected).abs().max())
        if not error <= limit:
            return f"it errs by {error:.1e}{name}"
    is_written = torch.equal(given[3].cpu(), keys) and torch.equal(given[4].cpu(), values)
    return "" if is_written else "it writes K and V wrongly"


def decode(
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
    """One token's step over a store (see `SlotStore`), in place; nothing waits for the device.

    Args:
        query: `[batch, kv_heads, groups, head_dim]`, all heads of the layer in the model's order.
        new_key, new_value: the token's, `[batch, kv_heads, 1, head_dim]`.
        keys, values: `[batch, heads, num_prompt + num_slots, head_dim]`; the token's column is written.
        scores: `[batch, num_scored, num_slots]`, float32; what tokens of the first `num_scored` heads receive is added.
        heads: `[heads]`, which of the layer's heads these are.
        mask: `[batch, num_prompt + num_slots]`, False on the prompt's padding, or None.
        step: the token's number, counted from 0, without dimensions.
        scaling: factor on the products.
        buffer: slots that are written anew after each eviction.
        output: `[batch, kv_heads, groups, value_dim]`; these heads' rows are written.
    """
    run = torch.ops.ssd_cache.decode if torch.compiler.is_compiling() else _launch
    run(query, new_key, new_value, keys, values, scores, heads, mask, step, scaling, buffer, output)


def _launch(query: torch.Tensor, *arguments) -> None:
    if _takes_loops(query.device):
        return cpu_kernels.launch(query, *arguments)
    from ssd_cache.kernels.triton_decode import launch

    return launch(query, *arguments)


def _trace(query: torch.Tensor, *arguments) -> None:
    """What the launch does to shapes: nothing. A tensor without numbers among others would choose this, though."""
    if any(isinstance(other, torch.Tensor) and other.device != query.device for other in arguments):
        raise ValueError("the decode kernel got tensors on several devices, and takes those of one")


# As an operator of torch the launch is one node of a compiled graph; called by itself, that would only cost time.
# Defined at the lowest level, since the wrapper of torch.library.custom_op takes half as long as a layer's attention.
_library = torch.library.Library("ssd_cache", "FRAGMENT")
_library.define(
    "decode(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) scores, "
    "Tensor heads, Tensor? mask, Tensor step, float scaling, SymInt buffer, Tensor(d!) output) -> ()"
)
_library.impl("decode", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("ssd_cache::decode", _trace, lib=_library)
