"""A decoder's step over one `SSDCache`, recorded as a CUDA graph and played back: no Python, one launch for all layers.

Addresses are recorded, so a graph serves one cache while its tensors stay where they are: for a picture, as a rule.
What is played back was counted in before (`SSDCache.counted_step`). It chooses no steps and catches no errors. It was
written without a GPU at hand and not run yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from ssd_cache._compat import CACHE
from ssd_cache.cache import SSDCache

WARM_UP = 2
"""Steps of a cache that run before one is recorded: the first compiles, the second shows that nothing is left to do."""


class RecordedStep:
    """Runs `run(**arguments)` for steps over one cache after another, from the third step of each as a graph.

    Recording executes nothing, so every token is written, and scored, once. The cache is not held on to.
    """

    def __init__(self) -> None:
        self.state: tuple[Any, ...] | None = None
        self.num_run = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.output_class: type = dict

    def __call__(self, run: Callable[..., Any], cache: SSDCache, arguments: dict[str, Any]) -> Any:
        """The outputs of `run(**arguments)`; tensors of a graph are copied, since its next run writes over them."""
        inputs = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        state = (weakref.ref(cache), cache.places, *((name, new.shape, new.dtype) for name, new in inputs.items()))
        if state != self.state:
            self.state, self.num_run, self.graph = state, 0, None
        if self.num_run < WARM_UP:
            self.num_run += 1
            return run(**arguments)
        if self.graph is None:
            self.inputs = {name: value.clone() for name, value in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = run(**{**arguments, **self.inputs})
            self.outputs = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
            self.output_class, self.graph = type(outputs), graph
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        copies = {name: value.clone() for name, value in self.outputs.items()}
        return self.output_class(**copies, **{CACHE: cache})
