"""Linear layers on weights laid out anew, which `cpu_kernels` multiplies by few rows much faster than torch does.

For CPUs, where a step's time is the reading of weights. The layers of a model are of another class inside the block,
and of their own after it. Results are equal to rounding. `fast_decode` uses it; it knows no caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ssd_cache import cpu_kernels, huge_pages

MAX_ROWS = 512
"""Products of more rows, as of a long prompt, are not limited by reading weights, and take torch's way."""

_packed: dict[int, torch.Tensor] = {}  # address of a weight -> the same, laid out anew
_room: dict[int, torch.Tensor] = {}  # address of a weight that was not used yet -> where it will be packed


@contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Let the linear layers of a model run on packed weights inside the block: float32 on the CPU.

    A weight is packed when it is first used in a small product, so the copy is of what steps use: the decoder's layers
    and the head, and not the other towers. It is let go at the end of the block. Layers whose outputs are no multiple
    of `cpu_kernels.PANEL` stay as they are; all do where the loops can not be built.
    """
    linears = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and module.out_features % cpu_kernels.PANEL == 0
    ]
    if linears and cpu_kernels.library() is None:
        linears = []
    sizes = [linear.weight.numel() for linear in linears]
    room = huge_pages.zeros((sum(sizes),), torch.float32, torch.device("cpu"))  # none of it is held before it is used
    for linear, place in zip(linears, room.split(sizes), strict=True):
        linear.__class__ = _PackedLinear
        _room[linear.weight.data_ptr()] = place
    del room
    try:
        yield
    finally:
        for linear in linears:
            linear.__class__ = torch.nn.Linear
            for places in (_packed, _room):
                places.pop(linear.weight.data_ptr(), None)


class _PackedLinear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.ssd_cache.packed_linear(input, self.weight, self.bias)


def _multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if states.numel() > MAX_ROWS * weight.shape[1]:
        return F.linear(states, weight, bias)
    packed = _packed.get(weight.data_ptr())
    if packed is None:
        packed = _packed[weight.data_ptr()] = cpu_kernels.pack(weight, _room.pop(weight.data_ptr()))
    return cpu_kernels.linear(states, packed, bias)


def _shape(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])


# An operator of its own, since a packed weight is made once, and outside of a compiled graph. Defined at the lowest
# level, since the wrapper of torch.library.custom_op costs more than the product of a narrow layer.
_library = torch.library.Library("ssd_cache", "FRAGMENT")
_library.define("packed_linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("packed_linear", _multiply, "CPU")
torch.library.register_fake("ssd_cache::packed_linear", _shape, lib=_library)
