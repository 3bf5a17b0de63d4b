"""Record a decoder's step over one `SSDCache` as a CUDA graph and replay it: no Python, one launch for all layers.

A graph contains addresses, so it serves one cache while its tensors stay in place (`SSDCache.version`), also for the
next images after `reset`. The host-side work of a step comes before (`SSDCache.static_step`). This module does not
choose the steps and catches no errors. It was written without a GPU and has not been run yet.
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
"""Steps of a cache before one is recorded: the first compiles, the second confirms that nothing is left to compile."""


def can_record(cache: SSDCache, device: torch.device) -> bool:
    """Whether a CUDA graph can record the steps of a cache: the input and all layers must be on one GPU."""
    return device.type == "cuda" and all(layer.device == device for layer in cache.layers)


class RecordedStep:
    """The steps of one cache: count the first ones, then record a step as a graph and replay it.

    Recording executes nothing, so every token is written and scored once. This object keeps no reference to the cache.
    """

    def __init__(self) -> None:
        self.state: tuple[Any, ...] | None = None
        self.num_run = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.output_class: type = dict

    def is_ready(self, cache: SSDCache, arguments: dict[str, Any]) -> bool:
        """Count a step; return whether `WARM_UP` steps ran before it with the same tensors and shapes."""
        state = (cache.version, *((name, new.shape, new.dtype) for name, new in _tensors(arguments).items()))
        if state != self.state:
            self.state, self.num_run, self.graph = state, 0, None
        self.num_run += 1
        return self.num_run > WARM_UP

    def __call__(self, run: Callable[..., Any], cache: SSDCache, arguments: dict[str, Any]) -> Any:
        """The outputs of `run(**arguments)`; copied, since the next replay overwrites the graph's outputs."""
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
        # If ending the capture fails, torch.cuda.graph leaves its own stream current; the outer block restores ours.
        # Other threads may use the GPU meanwhile, but there is only one stream to record on, hence the lock.
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
