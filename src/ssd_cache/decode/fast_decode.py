"""`fast_decode`: compile a model's one-token steps over an `SSDCache` inside the block, and record them on a GPU.

The standard `generate` is not changed. Work that changes Python state (counting, scoring, evicting) is done before
the compiled call, so one compiled graph serves every step of an image. The prompt, other caches, and steps that request
hidden states run uncompiled. Measured only on the CPU, not on a GPU.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ssd_cache._compat import CACHE, CACHE_NAMES, find_cache, uncompiled
from ssd_cache.cache.attention import NAME
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.slots import normal_tensors
from ssd_cache.decode.cuda_graph import StepGraph, can_record, devices_of
from ssd_cache.decode.merged_linears import MergedLinears, remove_equal_products, with_merged_linears
from ssd_cache.decode.patching import Block, Patch, patched
from ssd_cache.kernels.packed_linears import packed_linears

INPUTS = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache", "guidance_scale", *CACHE_NAMES}
"""Arguments of a step that may be compiled; it always uses the cache, and Janus's decoder ignores the guidance."""


@contextmanager
def fast_decode(model: PreTrainedModel, *, merge_linears: bool = False) -> Iterator[PreTrainedModel]:
    """Compile the steps of a model's decoder over an `SSDCache` inside the block.

    The first visual token of an image runs uncompiled. The second waits for the compiler (17 s for eight layers on two
    cores, less if it has compiled this before). Another batch size or prompt length compiles once more; after that,
    sizes are dynamic. On a GPU, if all layers are on one device, the fourth token of a cache is recorded as a CUDA
    graph, which runs the rest. It also runs the next images after `SSDCache.reset`, from their third token on, as long
    as batch size, prompt length, weights and adapters stay the same. On a CPU, images whose prompt runs
    inside the block use the loops of `kernels/cpu_loops.py`; in float32, linear layers use packed weights, which are a
    second copy in memory.

    Blocks on one model may nest and overlap, also across threads, and share one compiled step.

    Args:
        model: a transformers model with `generate` and the attention "ssd"; may be a `torch.compile(model)`.
        merge_linears: run one matrix product for Q, K and V and one for gate and up, instead of five. This is meant for
            a GPU, where it was not measured yet; on a CPU it takes the place of packed weights. Inside the block the
            merged weights are slices of one tensor, so memory does not grow. A change in place takes effect at once, a
            replaced weight (`weight.data = ...`) at the latest with the next image. Tensors that shared memory with a
            merged weight before the block, such as those of `state_dict()`, do not share it afterwards. No other thread
            may run the model while the first block that merges is entered or the last block is left.

    Yields:
        The model. Its decoder's `forward` is restored after the block, also after an exception.

    Warns:
        UserWarning: once, if `torch.compile` (for example without a C++ compiler) or a CUDA graph (memory runs out
            while it is recorded, or layers are on several GPUs) cannot be used; generation continues without it, with
            the same tokens. `SSDCache.served_by` shows what ran.

    Example:
        with fast_decode(model):
            model.generate(**inputs, generation_mode="image", **SSDCache(head_map, budget=0.2).as_kwargs())
    """
    own = uncompiled(model)
    decoder = own.get_decoder()
    linears = nullcontext() if merge_linears else packed_linears(own)
    with linears, patched(decoder, "forward", _FastForward, _FastBlock(merges=merge_linears)):
        yield model


@dataclass(eq=False, kw_only=True)
class _FastBlock(Block):
    """A block of `fast_decode`, and whether it merges linear layers; they stay merged until all blocks have ended."""

    merges: bool


_RAN = threading.local()
"""`code`: the compiled code that ran last in this thread. It is the same object while dynamo's guards choose it."""


def _inductor(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """Compile a graph as `torch.compile` does by default; its code notes in `_RAN` that it runs."""
    from torch._dynamo import lookup_backend  # private: if a torch lacks it, only compiled steps fail, with a warning

    remove_equal_products(graph.graph)
    graph.recompile()
    run, code = lookup_backend("inductor")(graph, inputs), object()

    def noted(*arguments):
        _RAN.code = code
        return run(*arguments)

    return noted


class _FastForward(Patch):
    """Replacement for a decoder's `forward` that runs the steps it can in a compiled copy."""

    def __init__(self, decoder: PreTrainedModel, name: str):
        super().__init__(decoder, name)
        self.config = decoder.config
        self.compiled = with_merged_linears(torch.compile(self.inner, fullgraph=True, backend=_inductor))
        self.is_usable = self.is_recorded = True
        self.graphs: WeakKeyDictionary[SSDCache, StepGraph] = WeakKeyDictionary()
        self.masks: dict[torch.device, torch.Tensor] = {}
        self.merged: MergedLinears | None = None

    def entered(self, owner: _FastBlock) -> None:
        if owner.merges and self.merged is None:
            self.merged = MergedLinears(self.target)
            self._move_weights(self.merged.merge)

    def left(self) -> None:
        if self.merged is not None and not self.owners:
            self._move_weights(self.merged.release)
            self.merged = None

    def _move_weights(self, move: Callable[[], None]) -> None:
        """Merge or restore linear layers; no graph is replayed before a step has compared the weights' addresses."""
        try:
            move()
        except torch.OutOfMemoryError as error:
            _warn("with separate linear layers", error)
        for graph in list(self.graphs.values()):
            graph.begin_image()

    def __call__(self, *args, **kwargs):
        cache = find_cache(kwargs)
        # if the caller compiled the model, its own graph contains the whole step
        if not isinstance(cache, SSDCache) or not self.owners or torch.compiler.is_compiling():
            return self.inner(*args, **kwargs)
        call = {"input_ids": args[0], **kwargs} if args else kwargs
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        new = embeds if ids is None else ids
        if new is None or len(args) > 1 or not self._is_step(new, cache, call):
            cache.allow_cpu_kernel()
            if (graph := self.graphs.get(cache)) is not None:
                graph.begin_image()
            return self.inner(*args, **kwargs)
        position_ids = call.get("position_ids")
        if position_ids is None:
            position_ids = torch.full((1, 1), cache.get_seq_length(), device=new.device)
        named = {"input_ids": ids, "inputs_embeds": embeds, "position_ids": position_ids}
        inputs = {name: value for name, value in named.items() if value is not None}
        with cache.static_step():
            graph = self._graph_of(cache, new.device)
            if graph is not None and torch.is_inference_mode_enabled():
                # a graph holds normal tensors, and steps over others would be compiled anew while it is recorded
                with normal_tensors():
                    inputs = {name: value.clone() for name, value in inputs.items()}
            if graph is not None and graph.is_ready(cache, inputs) and self._has_graph(graph, cache, inputs):
                cache.num_replayed += 1
                return graph.replay(cache, inputs)
            outputs, code = self._run(cache, inputs)
            if graph is not None:
                graph.has_run(cache, inputs, self.target, code)
            return outputs

    def _graph_of(self, cache: SSDCache, device: torch.device) -> StepGraph | None:
        """The graph of a cache; None if steps over it are not recorded."""
        if not (self.is_recorded and can_record(device)):
            return None
        if cache not in self.graphs:
            self.graphs[cache] = StepGraph()
        return self.graphs[cache]

    def _has_graph(self, graph: StepGraph, cache: SSDCache, inputs: dict[str, torch.Tensor]) -> bool:
        """Record the step if it is not yet; a failure has executed nothing, and ends all recording in this block."""
        if graph.graph is None:
            run = self.compiled if self.is_usable else self.inner
            if len(devices := devices_of(cache, inputs["position_ids"].device)) > 1:
                self._record_no_more(f"the layers are on {', '.join(devices)}, and a graph records one device")
                return False
            try:
                graph.record(partial(run, **self._constants(cache, inputs)), inputs)
            except Exception as error:  # drivers raise many unrelated classes; memory may be too small for a graph
                self._record_no_more(error.__context__ or error)  # the first of two: the end of a capture fails, too
        return graph.graph is not None

    def _record_no_more(self, reason: str | BaseException) -> None:
        self.is_recorded = False
        self.graphs.clear()
        if self.is_usable:  # otherwise a warning says that steps run uncompiled
            _warn("without CUDA graphs", reason)

    def _run(self, cache: SSDCache, inputs: dict[str, torch.Tensor]) -> tuple[Any, object | None]:
        """The outputs of a step, and the compiled code that ran it, or None."""
        arguments = {**inputs, **self._constants(cache, inputs)}
        if self.merged is not None and not self.merged.is_current():
            self._move_weights(self.merged.refresh)
        if self.is_usable:
            try:
                outputs = self.compiled(**arguments)
            except torch.OutOfMemoryError:
                raise  # it may occur in mid-step, and is not a failure of the compiler
            except Exception as error:
                self.is_usable = False
                _warn("uncompiled", error)
            else:
                cache.num_compiled += 1
                return outputs, _RAN.code
        return self.inner(**arguments), None  # the compiler failed before anything ran

    def _constants(self, cache: SSDCache, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The arguments of a step that are the same at every step."""
        device = inputs["position_ids"].device
        if device not in self.masks:
            with normal_tensors():
                # transformers uses a 4-d mask unchanged and makes no other; after the prompt, "ssd" reads no mask
                self.masks[device] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        missing = dict.fromkeys({"input_ids", "inputs_embeds"} - {*inputs})
        return {**missing, "attention_mask": self.masks[device], CACHE: cache, "use_cache": True}

    def _is_step(self, new: torch.Tensor, cache: SSDCache, call: dict[str, Any]) -> bool:
        return (
            self.config._attn_implementation == NAME
            and new.shape[1] == 1
            and cache.can_step_statically
            and cache.layers[0].num_rows == new.shape[0]  # otherwise the eager forward raises the error
            and not torch.is_grad_enabled()
            # a compiled step keeps in float32 what autocast rounds, so its tokens would differ from eager ones
            and not (new.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
            and all(value is None or value is False or name in INPUTS for name, value in call.items())
        )


def _warn(how: str, reason: str | BaseException) -> None:
    """Warn with the first two lines of an error, which have origin and reason; compiler and driver share no class."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    warnings.warn(f"fast_decode continues {how}: {' '.join(lines[:2]) or type(reason).__name__}", stacklevel=4)
