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
import torch.nn.functional as F

from ssd_cache import cpu_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the Triton kernel takes; the loop for the CPU takes `cpu_kernels.DECODERS`."""


def can_serve(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, on_cpu: bool = False) -> bool:
    """Whether steps with such tensors, `[batch, heads, new, head_dim]`, can run through the kernel.

    Not where a gradient is asked for, since the kernel has none, and on a CPU only where that is wanted: sums in
    another order give other last bits than a full cache has.

    Warns:
        UserWarning: once for such sizes, where a kernel is there and fails, or errs, on a small trial.
    """
    if torch.is_grad_enabled() or not query.dtype == key.dtype == value.dtype:
        return False
    if not is_wanted(query.device, on_cpu):
        return False
    return passes_trial(query.device, query.dtype, query.shape[1] // key.shape[1], query.shape[3], value.shape[3])


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
    """Whether the kernel runs with such sizes, by one step of two rows, two heads and five tokens, beside torch's."""
    if not _is_there(device, dtype):
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, new_key, new_value = draw(2, 2, groups, head_dim), draw(2, 2, 1, head_dim), draw(2, 2, 1, value_dim)
    keys, values = draw(2, 2, 5, head_dim), draw(2, 2, 5, value_dim)
    seen_keys, seen_values = torch.cat([keys[:, :, :4], new_key], 2), torch.cat([values[:, :, :4], new_value], 2)
    expected = F.scaled_dot_product_attention(query.float(), seen_keys.float(), seen_values.float())
    scores, output = torch.zeros(2, 2, 3, device=device), query.new_empty(2, 2, groups, value_dim)
    heads, step = torch.arange(2, device=device), torch.full((), 2, device=device)
    try:
        _launch(query, new_key, new_value, keys, values, scores, heads, None, step, head_dim**-0.5, 1, output)
        error = float((output.float() - expected).abs().max())
    except Exception as failure:  # what a compiler or a driver raises has no class in common
        reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
    else:
        if error <= 8 * torch.finfo(dtype).eps * float(seen_values.abs().max()):  # a few roundings
            return True
        reason = f"it errs by {error:.1e}"
    warnings.warn(
        f"ssd-cache's kernel does not serve on this {device.type}, torch's attention does: {reason}", stacklevel=2
    )
    return False


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
    from ssd_cache.fused_kernel import launch

    return launch(query, *arguments)


# As an operator of torch the launch is one node of a compiled graph; called by itself, that would only cost time.
# Defined at the lowest level, since the wrapper of torch.library.custom_op takes half as long as a layer's attention.
_library = torch.library.Library("ssd_cache", "FRAGMENT")
_library.define(
    "decode(Tensor query, Tensor new_key, Tensor new_value, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) scores, "
    "Tensor heads, Tensor? mask, Tensor step, float scaling, SymInt buffer, Tensor(d!) output) -> ()"
)
_library.impl("decode", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("ssd_cache::decode", lambda *arguments: None, lib=_library)
