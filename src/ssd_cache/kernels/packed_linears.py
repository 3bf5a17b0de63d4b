"""Linear layers on weights laid out anew, which `cpu_kernels` multiplies by few rows much faster than torch does.

For CPUs, where a step's time is the reading of weights. The layers of a model are of another class inside the block,
and of their own after it. Results are equal to rounding, also when weights change inside the block. `fast_decode` uses
it; it knows no caches.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ssd_cache.kernels import cpu_loops as cpu_kernels
from ssd_cache.kernels import huge_pages
from ssd_cache.kernels.checks import PLAIN

MAX_ROWS = 512
"""Products of more rows, as of a long prompt, are not limited by reading weights, and take torch's way."""

COPY = "_ssd_packed"
"""Attribute of a weight inside the block: its `PackedWeight`."""

_lock = threading.RLock()  # while layers enter and leave blocks; a block may be collected, and so end, meanwhile


@contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Run the linear layers of a model on packed weights inside the block: float32 on the CPU.

    A weight is packed when it is first used in a small product, so the copy is of what steps use: the decoder's layers
    and the head, and not the other towers. It is freed at the end of the block; blocks on one model may nest and
    overlap, and the last one that ends frees it.

    A weight that changes inside the block is packed again at its next use. Changes that torch counts (`mul_`,
    `load_state_dict`, `.data =`) are always seen. Writes that it does not count (`.data.mul_(2)`, as some libraries
    merge adapters) are seen at the next product if they change one of 32 numbers spread over the weight, else at the
    first step after the next prompt.

    torch's own product runs for weights of a tensor subclass, parametrized ones, those of inference mode (torch does
    not count their changes), layers with hooks or with a `forward` of their own, outputs that are no multiple of
    `cpu_kernels.PANEL`, prompts, gradients, autocast, and everything where the loops cannot be built.
    """
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and _can_be_packed(module)]
    if linears and cpu_kernels.library() is None:
        linears = []
    with _lock:
        entered = _enter(linears)
    try:
        yield
    finally:
        with _lock:
            _leave(entered)


def _can_be_packed(module: torch.nn.Linear) -> bool:
    if type(module) not in (torch.nn.Linear, _PackedLinear) or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(weight) is torch.nn.Parameter
        and (bias is None or type(bias) is torch.nn.Parameter)
        and not weight.is_inference()
        and cpu_kernels.takes_weight(weight)
    )


def _enter(linears: list[torch.nn.Linear]) -> list[tuple[torch.nn.Linear, torch.Tensor, PackedWeight]]:
    """Give each weight its `PackedWeight` and each layer its class; returns these three for each layer."""
    weights = [linear.weight for linear in linears]
    new = {id(weight): weight for weight in weights if getattr(weight, COPY, None) is None}
    sizes = [weight.numel() for weight in new.values()]
    room = huge_pages.zeros((sum(sizes),), torch.float32, torch.device("cpu"))  # none of it is held before it is used
    prompts = _Prompts()
    for weight, place in zip(new.values(), room.split(sizes), strict=True):
        setattr(weight, COPY, PackedWeight(place, prompts))
    entered = [(linear, weight, getattr(weight, COPY)) for linear, weight in zip(linears, weights, strict=True)]
    for linear, _, packed in entered:
        packed.users[linear] += 1
        linear.__class__ = _PackedLinear
    return entered


def _leave(entered: list[tuple[torch.nn.Linear, torch.Tensor, PackedWeight]]) -> None:
    """Give layers and weights that are in no other block back as they were."""
    for linear, weight, packed in entered:
        packed.users[linear] -= 1
        if not packed.users[linear]:
            del packed.users[linear]
            if type(linear) is _PackedLinear:
                linear.__class__ = torch.nn.Linear  # type: ignore[assignment]
        if not packed.users and getattr(weight, COPY, None) is packed:
            delattr(weight, COPY)


class _Prompts:
    """How many products with several tokens a row there were: each may begin an image."""

    num_seen = 0


class PackedWeight:
    """A weight's copy in the layout of `cpu_kernels.linear`, and what it was made of.

    Args:
        place: as many numbers as the weight has, for the copy.
        prompts: shared by the weights of a block.

    Attributes:
        users: layers with this weight, and how many blocks each is in.
    """

    def __init__(self, place: torch.Tensor, prompts: _Prompts):
        self.place, self.prompts = place, prompts
        self.users: Counter[torch.nn.Module] = Counter()
        self.made_of: tuple | None = None
        self.storage: torch.UntypedStorage | None = None  # held, so that no other tensor gets its address
        self.lock = threading.Lock()

    def __reduce__(self):
        """A copy or pickle of the weight, made inside the block, is a plain weight."""
        return (type(None), ())

    def multiply(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """`F.linear`, or None where that has to run itself."""
        shape = states.shape
        if len(shape) == 3 and shape[1] > 1:
            self.prompts.num_seen += 1
            return None
        try:
            if states.numel() > MAX_ROWS * weight.shape[1]:
                return None
            if self.made_of != self._state_of(weight):
                self._renew(weight)
            product = cpu_kernels.linear(states, weight, self.place, bias)
            if product is None:
                self._renew(weight)
                product = cpu_kernels.linear(states, weight, self.place, bias)
        except (ValueError, IndexError):  # torch has other products for these, or an error of its own
            return None
        return product

    def _state_of(self, weight: torch.Tensor) -> tuple:
        return weight.data_ptr(), weight._version, weight.shape, self.prompts.num_seen

    def _renew(self, weight: torch.Tensor) -> None:
        """Compare all of the copy with the weight, and make it again where they differ."""
        with self.lock:
            state, is_new = self._state_of(weight), self.made_of is None
            self.made_of = self.storage = None
            if weight.is_inference():
                raise ValueError("torch does not count the changes of a weight that was made in inference mode")
            if is_new or not cpu_kernels.is_packed(weight, self.place):
                cpu_kernels.pack(weight, self.place)
            self.made_of, self.storage = state, weight.untyped_storage()


class _PackedLinear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        # a subclass decides about its products itself, which it can for `F.linear` alone
        is_plain = type(input) in PLAIN and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)
        if torch.is_grad_enabled() or not is_plain:
            return super().forward(input)
        return torch.ops.ssd_cache.packed_linear(input, weight, bias)


def _multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    packed: PackedWeight | None = getattr(weight, COPY, None)
    product = None if packed is None else packed.multiply(states, weight, bias)
    # torch's own product, or its own error; contiguous, as `_shape` says
    return F.linear(states, weight, bias).contiguous() if product is None else product


def _shape(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = F.linear(states, weight, bias)
    return product.new_empty(product.shape)


# An operator of its own, since a packed weight is made once, and outside of a compiled graph. Defined at the lowest
# level, since the wrapper of torch.library.custom_op costs more than the product of a narrow layer. It finds the copy
# at the weight, which arrives in compiled graphs as the same object.
_library = torch.library.Library("ssd_cache", "FRAGMENT")
_library.define("packed_linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("packed_linear", _multiply, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("packed_linear", F.linear, _key)  # which casts
torch.library.register_fake("ssd_cache::packed_linear", _shape, lib=_library)
