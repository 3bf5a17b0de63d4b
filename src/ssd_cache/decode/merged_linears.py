"""Merged linear layers: compiled steps run one matrix product for Q, K and V, and one for gate and up.

The weights of layers with the same input become slices of one tensor. So there is no second copy in memory, and changes
in place take effect at once. In compiled steps of `fast_decode`, each layer multiplies by the whole tensor and returns
its slice of the product; equal products are removed from the graph. Eager layers multiply by their slices.
`fast_decode` uses this module. It was written without a GPU and has not been measured on one yet.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ssd_cache.cache.slots import normal_tensors
from ssd_cache.kernels.checks import address_of
from ssd_cache.kernels.packed_linears import is_plain_linear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one module that have the same input."""

MERGED = "_ssd_merged"
"""Name of the attribute of a merged layer: the whole weight and bias, and the first row of the layer and the end."""

_step = threading.local()


def with_merged_linears(run: Callable[..., Any]) -> Callable[..., Any]:
    """Let merged layers multiply by the whole weight while `run` runs, which is compiled code."""

    def call(*args, **kwargs):
        before, _step.is_merged = getattr(_step, "is_merged", False), True
        try:
            return run(*args, **kwargs)
        finally:
            _step.is_merged = before

    return call


def remove_equal_products(graph: torch.fx.Graph) -> None:
    """Keep one of several linear products of the same tensors, unless something is written in place in between.

    Inductor itself does not remove equal products from a graph without a backward pass.
    """
    found: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is F.linear:
            first = found.setdefault((node.args, *node.kwargs.items()), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
        elif node.op.startswith("call") and _may_write(node):
            found.clear()


def _may_write(node: torch.fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", None) == "_operator":
        return name.startswith(("i", "setitem"))  # iadd, for example
    return name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


class MergedLinears:
    """The merged layers of a decoder.

    These layers stay separate: layers with hooks or an overridden `forward`, layers of a subclass, packed layers,
    adapters, parametrized weights, and weights that two layers share, of a tensor subclass, or made in inference mode.
    """

    def __init__(self, decoder: torch.nn.Module):
        self.decoder = decoder
        self.groups: list[_Group] = []
        self._lock = threading.RLock()  # reentrant: garbage collection may end a block at any point

    def merge(self) -> None:
        """Merge the layers that are not merged yet. The weights of one group at a time are in memory twice."""
        with self._lock:
            uses = Counter(address_of(part) for _, part in self.decoder.named_parameters(remove_duplicate=False))
            for module in self.decoder.modules():
                for names in GROUPS:
                    linears: list[Any] = [module._modules.get(name) for name in names]
                    forms = {_form(linear, uses) for linear in linears}
                    if len(forms) == 1 and None not in forms:
                        self.groups.append(_Group(linears))

    def is_current(self) -> bool:
        """Whether the whole tensors contain all weights: no weight of a merged layer was replaced."""
        return all(group.is_current() for group in list(self.groups))

    def refresh(self) -> None:
        """Merge the groups again in which a weight was replaced, where that is still possible."""
        with self._lock:
            for group in [group for group in self.groups if not group.is_current()]:
                self.groups.remove(group)
                group.release()
            self.merge()

    def release(self) -> None:
        """Restore the layers and give each weight memory of its own."""
        with self._lock:
            while self.groups:
                self.groups.pop().release()


class _Slice(NamedTuple):
    """A parameter of a layer, and the slice of the whole tensor that is its data, with its place in memory.

    Parameter and slice are None for a missing bias.
    """

    linear: torch.nn.Linear
    name: str
    parameter: Any
    data: Any
    place: tuple[Any, ...]

    def is_current(self) -> bool:
        if self.parameter is None:
            return self.linear._parameters.get(self.name) is None
        return self.linear._parameters.get(self.name) is self.parameter and self.is_in_place()

    def is_in_place(self) -> bool:
        """Whether the data is still the slice; also asked for parameters that their layer no longer has."""
        return type(self.parameter) is torch.nn.Parameter and _place(self.parameter) == self.place


class _Group:
    """Merged layers that have the same input."""

    def __init__(self, linears: list[torch.nn.Linear]):
        self.slices: list[_Slice] = []
        sizes, wholes = [len(linear.weight) for linear in linears], []
        with normal_tensors():
            for name in ("weight", "bias"):
                parameters: list[Any] = [linear._parameters[name] for linear in linears]
                whole = None if parameters[0] is None else torch.cat([part.detach() for part in parameters])
                slices = [None] * len(sizes) if whole is None else whole.split(sizes)
                wholes.append(whole)
                for linear, parameter, own in zip(linears, parameters, slices, strict=True):
                    self.slices.append(_Slice(linear, name, parameter, own, () if own is None else _place(own)))
            for part in self.slices:  # nothing was changed while memory could still run out
                if part.parameter is not None:
                    part.parameter.data = part.data
        for linear, size, end in zip(linears, sizes, accumulate(sizes), strict=True):
            setattr(linear, MERGED, (*wholes, end - size, end))
            linear.__class__ = _MergedLinear

    def is_current(self) -> bool:
        return all(part.is_current() for part in self.slices)

    def release(self) -> None:
        for linear in {part.linear for part in self.slices}:
            vars(linear).pop(MERGED, None)
            if type(linear) is _MergedLinear:
                linear.__class__ = torch.nn.Linear  # type: ignore[assignment]
        for part in self.slices:
            with suppress(torch.OutOfMemoryError), normal_tensors():  # without memory, the weight stays a slice
                if part.is_in_place():
                    part.parameter.data = part.data.clone()


class _MergedLinear(torch.nn.Linear):
    _ssd_merged: tuple[Any, ...] | None = None  # the attribute MERGED

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._ssd_merged is None or not getattr(_step, "is_merged", False):
            return super().forward(input)
        weight, bias, start, end = self._ssd_merged
        # The decode kernels need V contiguous. A copy in the compiled graph joins the kernel of the rotary embedding.
        return F.linear(input, weight, bias)[..., start:end].contiguous()

    def __reduce_ex__(self, protocol):
        """Copies and pickles are plain linear layers: an empty one, and the state, which replaces all attributes."""
        return torch.nn.Linear, (1, 1, False, "meta"), {k: v for k, v in vars(self).items() if k != MERGED}


def _form(linear: Any, uses: Counter[int]) -> tuple[Any, ...] | None:
    """What layers must have in common to be merged; None if the layer cannot be merged."""
    if not is_plain_linear(linear, _MergedLinear) or MERGED in vars(linear):
        return None
    weight, bias = (linear._parameters.get(name) for name in ("weight", "bias"))
    held = [weight] if bias is None else [weight, bias]
    if not all(_can_merge(part, uses) for part in held):
        return None
    return weight.shape[1:], *((part.dtype, part.device) for part in held)


def _can_merge(part: Any, uses: Counter[int]) -> bool:
    is_plain = type(part) is torch.nn.Parameter and part.layout is torch.strided and not part.is_meta
    return is_plain and part.is_contiguous() and not part.is_inference() and uses[address_of(part)] == 1


def _place(part: Any) -> tuple[Any, ...]:
    return part.data_ptr(), part.dtype, part.shape, part.stride()
