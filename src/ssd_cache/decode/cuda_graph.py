"""Record a decoder's step over one `SSDCache` as a CUDA graph and replay it: no Python, one launch for all layers.

A graph contains addresses and one version of the decoder's code, so it serves while neither changes: see `StepGraph`.
The host-side work of a step comes before (`SSDCache.static_step`). This module does not choose the steps and catches no
errors. It was written without a GPU and has not been run on one yet.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ssd_cache._compat import CACHE
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.slots import normal_tensors
from ssd_cache.kernels.checks import address_of

_RECORDING = threading.Lock()

WARM_UP = 2
"""Steps of a cache before one is recorded: the first compiles, the second confirms that nothing is left to compile."""


def can_record(device: torch.device) -> bool:
    """Whether steps whose input is on this device can be recorded."""
    return device.type == "cuda"


def devices_of(cache: SSDCache, device: torch.device) -> list[str]:
    """The devices of a step: that of its input, and those of the layers."""
    return sorted({str(device), *(str(layer.device) for layer in cache.layers)})


class StepGraph:
    """The recorded step of one cache: run the first steps of an image, then replay the others.

    Every image runs one step before the first replay. This step passes the guards of `torch.compile`, so it runs other
    code if the model has changed, for example by another adapter. The graph is kept for the next image if that code,
    the addresses of the weights, the cache's tensors and the inputs' shapes are those that were recorded. Recording
    executes nothing, so every token is written and scored once. This object keeps no reference to the cache.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self._sizes: tuple[Any, ...] | None = None
        self._state: tuple[Any, ...] | None = None
        self._num_run = 0
        self._is_checked = False

    def begin_image(self) -> None:
        """Run the next step, whatever was recorded."""
        self._is_checked = False

    def is_ready(self, cache: SSDCache, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether enough steps ran with the same tensors and shapes, the last one in this image."""
        return self._is_checked and self._num_run >= WARM_UP and self._sizes == _sizes(cache, inputs)

    def has_run(
        self, cache: SSDCache, inputs: dict[str, torch.Tensor], decoder: torch.nn.Module, code: object | None
    ) -> None:
        """Count a step that ran; `code` is what ran it, compiled, or None for uncompiled steps.

        No guards are checked for uncompiled steps, so their graph serves one image.
        """
        sizes = _sizes(cache, inputs)
        state = (sizes, code, _weights(decoder))
        if state != self._state or (code is None and not self._is_checked):
            self._sizes, self._state, self._num_run, self.graph = sizes, state, 0, None
        self._num_run += 1
        self._is_checked = True

    def record(self, run: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> None:
        """Record `run(**inputs)`; an error leaves no graph, and the step not executed."""
        with normal_tensors():
            held = {name: value.clone() for name, value in inputs.items()}
        device = next(iter(held.values())).device
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # torch.cuda.graph would record on a stream of the device that was current when it was first used. If ending the
        # capture fails, it leaves its stream current; the outer block restores ours. Other threads may use the GPU
        # meanwhile, but only one capture at a time is safe, hence the lock.
        with _RECORDING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()):
            stream = torch.cuda.Stream(device)
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = run(**held)
            except BaseException:
                # an invalidated capture leaves the allocator in its state of recording, in which no memory is freed
                with suppress(Exception):
                    torch._C._cuda_endAllocateToPool(device.index, pool)
                raise
        self.inputs = held
        self.outputs = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        self.output_class, self.graph = type(outputs), graph

    def replay(self, cache: SSDCache, inputs: dict[str, torch.Tensor]) -> Any:
        """Replay the graph with these inputs; its outputs are copied, since the next replay overwrites them."""
        assert self.graph is not None
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        copies = {name: value.clone() for name, value in self.outputs.items()}
        return self.output_class(**copies, **{CACHE: cache})


def _sizes(cache: SSDCache, inputs: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """What may change between two steps: the cache's tensors, and the inputs' shapes and dtypes."""
    return (cache.version, *((name, value.shape, value.dtype) for name, value in inputs.items()))


def _weights(decoder: torch.nn.Module) -> tuple[int, ...]:
    """Addresses of the decoder's weights and buffers."""
    return tuple(map(address_of, itertools.chain(decoder.parameters(), decoder.buffers())))
