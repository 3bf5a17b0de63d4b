"""A decoder's step over one `SSDCache`, recorded as a CUDA graph and replayed: no Python, one launch for all layers.

Addresses are recorded, so a graph serves one cache while its tensors stay where they are: for an image, as a rule. The
host-side work of a step is done before (`SSDCache.counted_step`). It chooses no steps and catches no errors. It was
written without a GPU at hand and not run yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ssd_cache._compat import CACHE
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.slots import normal_tensors

_RECORDING = threading.Lock()

WARM_UP = 2
"""Steps of a cache that run before one is recorded: the first compiles, the second shows that nothing is left to do."""


def can_record(cache: SSDCache, device: torch.device) -> bool:
    """Whether a CUDA graph can hold the steps of a cache: the input and all layers on one GPU."""
    return device.type == "cuda" and all(layer.device == device for layer in cache.layers)


class RecordedStep:
    """The steps of one cache: counts the first ones, then records a step as a graph and replays it.

    Recording executes nothing, so every token is written, and scored, once. The cache is not held on to.
    """

    def __init__(self) -> None:
        self.state: tuple[Any, ...] | None = None
        self.num_run = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.output_class: type = dict

    def is_ready(self, cache: SSDCache, arguments: dict[str, Any]) -> bool:
        """Count a step; whether `WARM_UP` steps ran before it with the same addresses and shapes."""
        state = (cache.places, *((name, new.shape, new.dtype) for name, new in _tensors(arguments).items()))
        if state != self.state:
            self.state, self.num_run, self.graph = state, 0, None
        self.num_run += 1
        return self.num_run > WARM_UP

    def __call__(self, run: Callable[..., Any], cache: SSDCache, arguments: dict[str, Any]) -> Any:
        """The outputs of `run(**arguments)`; tensors of a graph are copied, since its next run writes over them."""
        inputs = _tensors(arguments)
        if self.graph is None:
            self._record(run, arguments, inputs)
        assert self.graph is not None
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        copies = {name: value.clone() for name, value in self.outputs.items()}
        return self.output_class(**copies, **{CACHE: cache})

    def _record(self, run: Callable[..., Any], arguments: dict[str, Any], inputs: dict[str, torch.Tensor]) -> None:
        with normal_tensors():
            self.inputs = {name: value.clone() for name, value in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its own stream current when ending the capture fails, so the outer block restores it.
        # Other threads may use the GPU meanwhile, but there is one stream to record on.
        with (
            _RECORDING,
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
        ):
            outputs = run(**{**arguments, **self.inputs})
        self.outputs = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        self.output_class, self.graph = type(outputs), graph


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
