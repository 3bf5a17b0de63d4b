"""Slots in 8 bits: visual tokens stored as codes, with a scale for each row, KV head and token of K and of V.

Attention and scoring use code times scale; the prompt stays in the model's dtype. Eviction is the same as without
quantisation, and moves codes and scales together. Nothing is learned or calibrated, and nothing is packed below a byte.
"""

from __future__ import annotations

import torch

from ssd_cache.cache.slots import Slot, SlotStore, put

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


def slot_nbytes(head_dim: int, itemsize: int, kv_dtype: str | None) -> int:
    """Bytes of K and V of one visual token in one head; `itemsize` is the size of the model's dtype in bytes."""
    return 2 * (head_dim * itemsize if kv_dtype is None else head_dim + torch.float32.itemsize)


class QuantizedStore(SlotStore):
    """A `SlotStore` whose slots hold 8-bit codes.

    Args:
        kv_dtype: one of `KV_DTYPES`; all other arguments as for `SlotStore`.

    Attributes:
        keys, values: the prompt only, `[batch, heads, num_prompt, head_dim]`.
        key_codes, value_codes: `[batch, heads, num_slots, head_dim]`, int8; slots from `num_stored` on are free.
        key_scales, value_scales: `[batch, heads, num_slots]`, float32.
    """

    STATES = (*SlotStore.STATES, "key_codes", "key_scales", "value_codes", "value_scales")

    def __init__(self, *args, kv_dtype: str, **kwargs):
        self.kv_dtype = kv_dtype
        super().__init__(*args, **kwargs)

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        shape = len(keys), len(self.plan.heads), self.plan.num_slots
        self.keys, self.values = (states.new_empty(*shape[:2], *states.shape[2:]) for states in (keys, values))
        self.key_codes, self.value_codes = (
            states.new_zeros(*shape, states.shape[3], dtype=torch.int8) for states in (keys, values)
        )
        self.key_scales, self.value_scales = (keys.new_zeros(shape, dtype=torch.float32) for _ in range(2))

    def write(self, slot: Slot, keys: torch.Tensor, values: torch.Tensor) -> None:
        new = (*quantize(keys, self.kv_dtype), *quantize(values, self.kv_dtype))
        for held, states in zip(self._slot_tensors(), new, strict=True):
            put(held, slot, states)

    def states(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        slots = slice(slot + 1 if isinstance(slot, int) else None)
        codes, scales, value_codes, value_scales = (held[:, :, slots] for held in self._slot_tensors())
        return self._join(self.keys, codes, scales), self._join(self.values, value_codes, value_scales)

    def _scored_keys(self) -> torch.Tensor:
        heads, slots = slice(self.plan.num_semantic), slice(self.num_stored)
        return self._join(self.keys[:, heads], self.key_codes[:, heads, slots], self.key_scales[:, heads, slots])

    def _join(self, prompt: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Prompt and dequantised slots, `[batch, heads, num_prompt + slots, head_dim]`, as a new tensor."""
        return torch.cat([prompt, dequantize(codes, scales, self.kv_dtype, prompt.dtype)], dim=2)

    def _slot_tensors(self) -> list[torch.Tensor]:
        return [self.key_codes, self.key_scales, self.value_codes, self.value_scales]
