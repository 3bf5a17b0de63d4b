"""Slots in 8 bits: visual tokens stored as codes, with a scale for each row, KV head and token of K and of V.

Attention and scoring use code times scale; the prompt stays in the model's dtype. Eviction is the same as without
quantisation, and moves codes and scales together. Nothing is learned or calibrated, and nothing is packed below a byte.
"""

from __future__ import annotations

import torch

from ssd_cache.cache.fused_eviction import Slots
from ssd_cache.cache.slots import Slot, SlotStore, put
from ssd_cache.kernels.eight_bits import dequantize, quantize


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

    kv_dtype: str
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
        for held, states in zip(self.codes, new, strict=True):
            put(held, slot, states)

    def states(self, slot: Slot) -> tuple[torch.Tensor, torch.Tensor]:
        slots = slice(slot + 1 if isinstance(slot, int) else None)
        codes, scales, value_codes, value_scales = (held[:, :, slots] for held in self.codes)
        return self._join(self.keys, codes, scales), self._join(self.values, value_codes, value_scales)

    def _scored_keys(self) -> torch.Tensor:
        heads, slots = slice(self.plan.num_semantic), slice(self.num_stored)
        return self._join(self.keys[:, heads], self.key_codes[:, heads, slots], self.key_scales[:, heads, slots])

    def _ranked_states(self, slots: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ranked = (held[:, : self.plan.num_semantic, slots] for held in self.codes)
        key_codes, key_scales, value_codes, value_scales = ranked
        keys = dequantize(key_codes, key_scales, self.kv_dtype, self.keys.dtype)
        return keys, dequantize(value_codes, value_scales, self.kv_dtype, self.keys.dtype)

    def _join(self, prompt: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Prompt and dequantised slots, `[batch, heads, num_prompt + slots, head_dim]`, as a new tensor."""
        return torch.cat([prompt, dequantize(codes, scales, self.kv_dtype, prompt.dtype)], dim=2)

    @property
    def codes(self) -> list[torch.Tensor]:
        return [self.key_codes, self.key_scales, self.value_codes, self.value_scales]

    def _slots(self) -> Slots:
        states, scales = [self.key_codes, self.value_codes], [self.key_scales, self.value_scales]
        return Slots(self.positions, self._ranked_by, states, scales)
