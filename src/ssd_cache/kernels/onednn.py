"""Linear layers in bfloat16 on a CPU, by oneDNN: a weight is put into oneDNN's own layout once.

`F.linear` calls oneDNN too, but with the weight as it lies in memory, which takes longer for few rows. Both operators
are torch's, which its compiler uses for weights that do not change. `packed_linears.py` uses this module.
"""

from __future__ import annotations

import functools

import torch

from ssd_cache.kernels.checks import is_plain_on_cpu


@functools.cache
def _is_supported() -> bool:
    """Whether torch has the operators, and this processor multiplies in bfloat16."""
    operators = torch.ops.mkldnn
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(operators, name) for name in names) and operators._is_mkldnn_bf16_supported()


def takes_weight(weight: torch.Tensor) -> bool:
    """Whether a weight `[out, in]` can be packed: plain, contiguous, bfloat16, on a CPU that multiplies in bfloat16."""
    is_matrix = weight.dim() == 2 and weight.numel() > 0 and weight.is_contiguous()
    return is_plain_on_cpu(weight, torch.bfloat16) and is_matrix and _is_supported()


def pack(weight: torch.Tensor, place: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """Copy a weight that `takes_weight` accepts, in the layout that oneDNN prefers for products of `num_rows` rows.

    oneDNN allocates each copy itself: `place`, an earlier copy, is not written to.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), num_rows)


def linear(
    states: torch.Tensor, weight: torch.Tensor, place: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """`F.linear` of states `[..., in]` and a weight `[out, in]` that `pack` copied to `place`, in bfloat16.

    The result is None where oneDNN cannot take these tensors; torch may still be able to multiply them.
    """
    out_features, in_features = weight.shape
    is_plain = is_plain_on_cpu(states, torch.bfloat16)
    if not (is_plain and states.dim() and states.numel() and states.shape[-1] == in_features):
        return None
    if bias is not None and not (is_plain_on_cpu(bias, torch.bfloat16) and bias.shape == (out_features,)):
        return None
    return torch.ops.mkldnn._linear_pointwise(states.contiguous(), place, bias, "none", [], "")
