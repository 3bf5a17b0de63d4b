"""`StaticSlots`: the slots of a static step as tensors at fixed addresses, so that no Python number changes.

An eager step takes its slots from `SlotStore.reserve`; both are the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssd_cache.cache.eviction import slot_of
from ssd_cache.cache.layer import SSDLayer
from ssd_cache.cache.slots import normal_tensors


class StaticSlots:
    """One 0-d int64 tensor for each size of store on one device; all stores of this size share it.

    Args:
        layers: the layers on this device, with stores.
    """

    def __init__(self, layers: Sequence[SSDLayer]):
        sizes = sorted({(store.plan.num_slots, store.plan.buffer) for layer in layers for store in layer.stores})
        with normal_tensors():
            self._num_slots, self._buffer = torch.tensor(sizes, device=layers[0].device).unbind(1)
            self._slots = torch.zeros_like(self._num_slots)
        self._of_size = dict(zip(sizes, self._slots.unbind(), strict=True))

    def fill(self, number: int) -> None:
        """Compute the slots of visual token `number`, without waiting for the device."""
        self._slots.copy_(slot_of(number, self._num_slots, self._buffer))

    def of(self, layer: SSDLayer) -> list[torch.Tensor]:
        """The slot of each of a layer's stores."""
        return [self._of_size[store.plan.num_slots, store.plan.buffer] for store in layer.stores]
