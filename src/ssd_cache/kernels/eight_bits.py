"""Numbers in 8 bits: codes, and one scale for the `head_dim` numbers of a token in a head.

Kernels and torch's operators compute the same codes and scales. Nothing here stores tokens; `cache/quantized.py` does.
"""

from __future__ import annotations

import torch

LIMITS = {"int8": 127.0, "fp8": 448.0}
"""The largest number of each `kv_dtype`: an integer, or a float8_e4m3fn (3 mantissa bits, 4 exponent bits)."""

KV_DTYPES = tuple(LIMITS)
"""Names that `kv_dtype` may have."""

SMALLEST = torch.finfo(torch.float32).tiny
"""The smallest scale, which prevents division by zero for a token of zeros."""


def quantize(states: torch.Tensor, kv_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of K or V; the scale maps each token's largest absolute value to the largest code.

    Scales are float32 for any dtype of the model: float16 cannot represent the scales of small values, and bfloat16
    would save only 2 of a token's `head_dim` + 4 bytes.

    Args:
        states: `[..., head_dim]`, finite; other values become NaN or infinity when dequantised.
        kv_dtype: one of `KV_DTYPES`.

    Returns:
        Codes `[..., head_dim]`, int8: the integer itself, or the bits of a float8_e4m3fn, since few torch operations
        can move float8. Scales `[...]`, float32.
    """
    states = states.float()
    scales = (states.abs().amax(-1) / LIMITS[kv_dtype]).clamp(min=SMALLEST)
    codes = states / scales[..., None]
    if kv_dtype == "int8":
        return codes.round_().to(torch.int8), scales
    return codes.to(torch.float8_e4m3fn).view(torch.int8), scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, kv_dtype: str, dtype: torch.dtype) -> torch.Tensor:
    """Multiply codes `[..., head_dim]` by scales `[...]` in float32, and convert the result to `dtype`."""
    if kv_dtype == "fp8":
        # Exponent and mantissa shifted up by seven bits are a float16 of 1/256 of the value; the sign bit stays on top.
        # The bits that would read as 480 are NaN in float8, so no finite value has them. A CPU does this for many
        # values at a time, but converts float8 to float32 one by one, which is six times slower.
        codes, scales = (codes.to(torch.int16) << 7 & ~(1 << 14)).view(torch.float16), 256 * scales
    return codes.float().mul_(scales[..., None]).to(dtype)
