"""Linear layers on packed weights, which a few rows are multiplied by much faster than by torch's `F.linear`.

This is for CPUs, where reading weights dominates the time of a step: a loop of `cpu_loops.py` multiplies in float32,
oneDNN in bfloat16. Inside the block, the class of the model's linear layers is replaced; at the end it is restored.
Results agree with torch's up to rounding, also when weights change inside the block. `fast_decode` uses this module; it
does not depend on caches.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from ssd_cache.kernels import cpu_loops, onednn
from ssd_cache.kernels.checks import PLAIN

MAX_ROWS = 512
"""Matrix products with more rows, as for a long prompt, use torch: reading weights does not limit their speed."""

COPY = "_ssd_packed"
"""Name of the attribute that holds a weight's `PackedWeight` inside the block."""

_lock = threading.RLock()  # reentrant: garbage collection may end a block while another is entered or left


@contextmanager
def packed_linears(model: torch.nn.Module) -> Iterator[None]:
    """Run the linear layers of a model on packed weights inside the block: float32 and bfloat16 on the CPU.

    A weight is packed when it is first multiplied by few rows. So only weights that decode steps use are copied: those
    of the decoder's layers and of the head, not those of the other towers. The copy is freed at the end of the block.
    Blocks on one model may nest and overlap; the last one that ends frees the copy.

    Each weight is packed again after each prompt, and at its next use after a change that torch counts (`mul_`,
    `load_state_dict`, `.data =`). A change that torch does not count (`.data.mul_(2)`, as some libraries merge
    adapters) therefore takes effect from the next prompt on; a prompt of one token does not count as one.

    torch's `F.linear` runs for weights of a tensor subclass, parametrized weights, weights created in inference mode
    (torch does not count their changes), layers with hooks or an overridden `forward`, prompts, gradients and autocast.
    So it does in float32 for output sizes that are not a multiple of `cpu_loops.PANEL` and where the loops cannot be
    built, and in bfloat16 on a processor without such products.
    """
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and _can_be_packed(module)]
    prompts, entered = _Prompts(), []
    with _lock:
        for linear in linears:
            weight = linear.weight
            packed: PackedWeight | None = getattr(weight, COPY, None)
            if packed is None:
                packed = PackedWeight(weight, prompts)
                setattr(weight, COPY, packed)
            packed.users[linear] += 1
            linear.__class__ = _PackedLinear
            entered.append((linear, weight, packed))
    try:
        yield
    finally:
        with _lock:
            for linear, weight, packed in entered:
                packed.users[linear] -= 1
                if not packed.users[linear]:  # in no other block
                    del packed.users[linear]
                    if type(linear) is _PackedLinear:
                        linear.__class__ = torch.nn.Linear  # type: ignore[assignment]
                if not packed.users and getattr(weight, COPY, None) is packed:
                    delattr(weight, COPY)


def is_plain_linear(module: Any, own: type[torch.nn.Linear]) -> bool:
    """Whether a module is torch's linear layer, or of the class `own`, with its class's forward and no hooks."""
    return (
        type(module) in (torch.nn.Linear, own)
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


def _can_be_packed(module: torch.nn.Linear) -> bool:
    if not is_plain_linear(module, _PackedLinear):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(weight) is torch.nn.Parameter
        and (bias is None or type(bias) is torch.nn.Parameter)
        and not weight.is_inference()
        and _kernel_for(weight) is not None
    )


def _kernel_for(weight: torch.Tensor):
    """The module with `takes_weight`, `pack` and `linear` for copies of this weight; None if torch must multiply."""
    if onednn.takes_weight(weight):
        return onednn
    return cpu_loops if cpu_loops.takes_weight(weight) and cpu_loops.library() is not None else None


class _Prompts:
    """Number of matrix products with several tokens per row, which occur only in a prompt.

    A higher number may mean a new image, whose weights may have changed: each weight is then packed again.
    """

    num_seen = 0


class PackedWeight:
    """A weight's copy in the layout of its kernel, and the state of the weight when it was copied.

    Attributes:
        place: the copy, from the first use on.
        prompts: the prompt count, shared by the weights of a block.
        users: layers with this weight, and the number of blocks that each is in.
    """

    def __init__(self, weight: torch.Tensor, prompts: _Prompts):
        self.kernel, self.numel, self.prompts = _kernel_for(weight), weight.numel(), prompts
        self.place: torch.Tensor | None = None
        self.users: Counter[torch.nn.Module] = Counter()
        self.made_of: tuple | None = None
        self.storage: torch.UntypedStorage | None = None  # kept alive, so that no other tensor reuses its address
        self.lock = threading.Lock()

    def __reduce__(self):
        """Copies and pickles made inside the block hold None instead, so they contain a plain weight."""
        return (type(None), ())

    def multiply(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The result of `F.linear`, or None where the caller must run `F.linear` itself."""
        if states.dim() == 3 and states.shape[1] > 1:
            self.prompts.num_seen += 1
            return None
        is_packable = self.kernel.takes_weight(weight) and weight.numel() == self.numel
        if not is_packable or weight.is_inference() or states.numel() > MAX_ROWS * weight.shape[1]:
            return None  # torch does not count the changes of a weight that was made in inference mode
        state = weight.data_ptr(), weight._version, weight.shape, self.prompts.num_seen
        if self.made_of != state:
            with self.lock:
                if self.made_of != state:  # no other thread has packed it meanwhile
                    self.made_of = None
                    num_rows = states.numel() // weight.shape[1]
                    with torch.inference_mode(False):  # else only inference mode could write to the copy again
                        self.place = self.kernel.pack(weight, self.place, num_rows)
                    self.made_of, self.storage = state, weight.untyped_storage()
        return self.kernel.linear(states, weight, self.place, bias)


class _PackedLinear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        # a tensor subclass may override `F.linear`, but not the operator below
        is_plain = type(input) in PLAIN and type(weight) in PLAIN and (bias is None or type(bias) in PLAIN)
        if torch.is_grad_enabled() or not is_plain:
            return super().forward(input)
        return torch.ops.ssd_cache.packed_linear(input, weight, bias)


def _multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    packed: PackedWeight | None = getattr(weight, COPY, None)
    product = None if packed is None else packed.multiply(states, weight, bias)
    # `F.linear` also raises torch's errors; contiguous, to match `_shape`
    return F.linear(states, weight, bias).contiguous() if product is None else product


def _shape(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = F.linear(states, weight, bias)
    return product.new_empty(product.shape)


# This is a torch operator, because a weight is packed once, outside of a compiled graph. It is defined with
# torch.library.Library, since the wrapper of torch.library.custom_op costs more than multiplying a narrow layer. The
# copy is an attribute of the weight; compiled graphs pass the same weight object.
_library = torch.library.Library("ssd_cache", "FRAGMENT")
_library.define("packed_linear(Tensor states, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("packed_linear", _multiply, "CompositeExplicitAutograd")
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("packed_linear", F.linear, _key)  # F.linear casts under autocast
torch.library.register_fake("ssd_cache::packed_linear", _shape, lib=_library)
