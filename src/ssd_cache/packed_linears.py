"""Linear layers on weights laid out anew by oneDNN, which multiplies few rows by them much faster than torch's own do.

For CPUs, where a step's time is the reading of weights. The layers of a model are of another class inside the block,
and of their own after it. Results are equal to rounding. `fast_decode` uses it; it knows no caches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

MAX_ROWS = 256
"""Products of more rows, as of a prompt, are not limited by reading weights, and take torch's way."""

_packed: dict[int, torch.Tensor] = {}  # address of a weight -> the same, laid out anew


@contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Let the linear layers of a model run on packed weights inside the block: float32 on the CPU, where oneDNN is.

    A weight is packed when it is first used in a small product, so the copy is of what steps use: the decoder's layers
    and the head, and not the other towers. It is let go at the end of the block.
    """
    linears = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and torch.backends.mkldnn.is_available()
    ]
    for linear in linears:
        linear.__class__ = _PackedLinear
    try:
        yield
    finally:
        for linear in linears:
            linear.__class__ = torch.nn.Linear
            _packed.pop(linear.weight.data_ptr(), None)


class _PackedLinear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.ssd_cache.packed_linear(input, self.weight, self.bias)


def _multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows = states.numel() // weight.shape[1]
    if num_rows > MAX_ROWS:
        return F.linear(states, weight, bias)
    packed = _packed.get(weight.data_ptr())
    if packed is None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
        _packed[weight.data_ptr()] = packed
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


def _shape(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return states.new_empty(*states.shape[:-1], weight.shape[0])


# An operator of its own, since a packed weight has no place in a compiled graph: the graph has the plain one. Defined
# at the lowest level, since the wrapper of torch.library.custom_op costs more than the product of a narrow layer.
_library = torch.library.Library("ssd_cache", "DEF")
_library.define("packed_linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("packed_linear", _multiply, "CPU")
torch.library.register_fake("ssd_cache::packed_linear", _shape, lib=_library)
