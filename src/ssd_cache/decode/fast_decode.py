"""`fast_decode`: compile a model's one-token steps over an `SSDCache` inside the block, and record them on a GPU.

The standard `generate` is not changed. Work that changes Python state (counting, scoring, evicting) is done before
the compiled call, so one compiled graph serves every step of an image. The prompt, other caches, and steps that request
hidden states run uncompiled. Measured only on the CPU, not on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from ssd_cache._compat import CACHE, CACHE_NAMES, find_cache, uncompiled
from ssd_cache.cache.attention import NAME
from ssd_cache.cache.cache import SSDCache
from ssd_cache.decode.cuda_graph import RecordedStep, can_record
from ssd_cache.decode.patching import Block, Patch, patched
from ssd_cache.kernels.packed_linears import packed_linears

INPUTS = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache", "guidance_scale", *CACHE_NAMES}
"""Arguments of a step that may be compiled; it always uses the cache, and Janus's decoder ignores the guidance."""


@contextmanager
def fast_decode(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Compile the steps of a model's decoder over an `SSDCache` inside the block.

    The first visual token of an image runs uncompiled. The second waits for the compiler (17 s for eight layers on two
    cores, less if it has compiled this before). Another batch size or prompt length compiles once more; after that,
    sizes are dynamic. On a GPU, if all layers are on one device, the fourth token of a cache is recorded as a CUDA
    graph, which runs the rest, also of the next images after `SSDCache.reset`. On a CPU, images whose prompt runs
    inside the block use the loops of `kernels/cpu_loops.py`; in float32, linear layers use packed weights, which are a
    second copy in memory.

    Blocks on one model may nest and overlap, also across threads, and share one compiled step.

    Args:
        model: a transformers model with `generate` and the attention "ssd"; may be a `torch.compile(model)`.

    Yields:
        The model. Its decoder's `forward` is restored after the block, also after an exception.

    Warns:
        UserWarning: once, if `torch.compile` (for example without a C++ compiler) or a CUDA graph cannot be used;
            generation continues without it.

    Example:
        with fast_decode(model):
            model.generate(**inputs, generation_mode="image", **SSDCache(head_map, budget=0.2).as_kwargs())
    """
    own = uncompiled(model)
    with packed_linears(own), patched(own.get_decoder(), "forward", _FastForward, Block()):
        yield model


class _FastForward(Patch):
    """Replacement for a decoder's `forward` that runs the steps it can in a compiled copy."""

    def __init__(self, decoder: PreTrainedModel, name: str):
        super().__init__(decoder, name)
        self.config = decoder.config
        self.compiled = torch.compile(self.inner, fullgraph=True)
        self.is_usable = self.is_recorded = True
        self.recorded: WeakKeyDictionary[SSDCache, RecordedStep] = WeakKeyDictionary()

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
            return self.inner(*args, **kwargs)
        position_ids = call.get("position_ids")
        if position_ids is None:
            position_ids = torch.full((1, 1), cache.get_seq_length(), device=new.device)
        arguments = {
            "input_ids": ids,
            "inputs_embeds": embeds,
            # transformers uses a 4-d mask unchanged and makes no other; after the prompt, "ssd" reads no mask.
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=new.device),
            "position_ids": position_ids,
            CACHE: cache,
            "use_cache": True,
        }
        with cache.static_step():
            if self.is_recorded and can_record(cache, new.device):
                recorded = self.recorded.get(cache)
                if recorded is None:
                    recorded = self.recorded[cache] = RecordedStep()
                if recorded.is_ready(cache, arguments):
                    try:
                        return recorded(self.compiled if self.is_usable else self.inner, cache, arguments)
                    except torch.OutOfMemoryError:
                        raise
                    except Exception as error:  # a failed capture has executed nothing
                        self.is_recorded = False
                        _warn("without CUDA graphs", error)
            return self._run(arguments)

    def _run(self, arguments: dict[str, Any]) -> Any:
        if self.is_usable:
            try:
                return self.compiled(**arguments)
            except torch.OutOfMemoryError:
                raise  # it may occur in mid-step, and is not a failure of the compiler
            except Exception as error:
                self.is_usable = False
                _warn("uncompiled", error)
        return self.inner(**arguments)  # the compiler failed before anything ran

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


def _warn(how: str, error: Exception) -> None:
    """Warn with the error's first two lines, which have origin and reason; compiler and driver share no error class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__
    warnings.warn(f"fast_decode continues {how}: {reason}", stacklevel=4)
