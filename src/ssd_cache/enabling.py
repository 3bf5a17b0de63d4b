"""`enable`: give every `generate` call that generates images a fresh `SSDCache`, for code that calls generate itself.

A context manager: everything it puts on the model (a patched `generate`, the attention "ssd" in the decoder) is removed
at the end, also after an exception. It does not touch classes or other models.
"""

from __future__ import annotations

import inspect
import os
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

from transformers import PreTrainedModel

from ssd_cache._compat import CACHE, find_cache, uncompiled
from ssd_cache.cache.cache import MemoryStats, ServedBy, SSDCache, decoder_shape
from ssd_cache.cache.sharding import check_agreement, shard_of
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.decode.fast_decode import fast_decode
from ssd_cache.decode.guidance import batched_guidance
from ssd_cache.decode.patching import Block, Patch, current_flow, innermost, patched
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.layout import ImageLayout
from ssd_cache.models.checkpoint import find_head_map
from ssd_cache.models.find import family_of


class enable(ContextDecorator):
    """Give every `model.generate(...)` call that generates images inside the block its own `SSDCache`.

    A call that generates text, or that passes its own cache, is not changed. If a call gives the size of the images
    (GLM-Image), the map's labels are used for a grid of that size. A call with `guidance_scale` to a model that leaves
    guidance to transformers (Emu3) runs both kinds of rows in one batch; see `batched_guidance`.

    Blocks on one model may nest and overlap, also across threads. A call uses the settings of the innermost block that
    its own thread entered, or else of the only open block. One object may be entered repeatedly.

    Args:
        model: a transformers model with `generate`, such as a pipeline's `pipe.model` or
            `pipe.vision_language_encoder`; may be a `torch.compile(model)`.
        head_map: the model's head map, or its name: a folder, a Hub repository, or "shapes-janus".
        fast: run the decoder's steps through `fast_decode`, which pays off when many images are generated. The last
            call's cache is then kept and reset for the next call, because a CUDA graph is tied to its tensors; its
            memory is freed at the end of the block.
        settings: as for `SSDCache`: budget, buffer, num_recent, num_sinks, kv_dtype and so on.

    `with` returns the model.

    Raises:
        TypeError: `model` is not a transformers model with `generate` (a whole pipeline, for example), or it has an
            encoder.
        HeadMapError: there is no map of that name, the map does not fit the model's configuration, or the processes of
            a tensor parallel model were given different maps or settings.
        ValueError: a setting is out of range, the model has layers with sliding window attention, or it has attention
            code of its own and the map needs queries; raised before anything is generated. Inside the block: a call
            sets `cache_implementation` or `use_cache=False`.
        RuntimeError: inside the block, several blocks are open and the calling thread entered none of them.

    Example:
        block = enable(model, head_map, budget=0.2)
        with block:
            tokens = model.generate(**inputs, generation_mode="image")
        block.memory_stats()    # bytes of the last call's cache, and those of a full one
        block.served_by()       # what ran its steps: kernels, compiled code, CUDA graph
    """

    def __init__(
        self, model: PreTrainedModel, head_map: HeadMap | str | os.PathLike[str], *, fast: bool = False, **settings
    ):
        self.model, self.fast = model, fast
        own = uncompiled(model)
        _check_generates(own)
        if isinstance(head_map, str | os.PathLike):
            head_map = find_head_map(os.fspath(head_map))
        check_agreement(own, head_map, settings)
        settings = {"shard": shard_of(own), **settings}
        trial = SSDCache(head_map, **settings)  # refuses bad settings now, not in the middle of a pipeline
        self._needs_queries = any(layer.plan.needs_ssd_attention for layer in trial.layers)
        head_map.check_fits(type(own).__name__, *decoder_shape(own.config.get_text_config(decoder=True)))
        head_map.check_made_for(own.name_or_path)
        self._last: deque[tuple[MemoryStats, ServedBy]] = deque(maxlen=1)
        self._open = partial(
            _EnableBlock, model=own, head_map=head_map, settings=settings, last=self._last, keeps_cache=fast
        )
        self._entered: list[tuple[object, ExitStack]] = []

    def __enter__(self) -> PreTrainedModel:
        block = self._open()
        with ExitStack() as stack:
            stack.enter_context(ssd_attention(block.model, needs_queries=self._needs_queries))
            if self.fast:
                stack.enter_context(fast_decode(block.model))
            stack.enter_context(patched(block.model, "generate", _GenerateWithCache, block))
            self._entered.append((block.flow, stack.pop_all()))
        return self.model

    def __exit__(self, *error: object) -> None:
        flow = current_flow()
        entry = next((entry for entry in reversed(self._entered) if entry[0] is flow), self._entered[-1])
        self._entered.remove(entry)
        entry[1].close()

    def memory_stats(self) -> MemoryStats:
        """Bytes of the cache of the last finished image call inside the block, and of a full cache in its place.

        Raises:
            RuntimeError: no call that generates images has finished yet.
        """
        return self._last_call()[0]

    def served_by(self) -> ServedBy:
        """What ran the steps of that call: the attention, and how many steps were eager, compiled and replayed.

        Raises:
            RuntimeError: as for `memory_stats`.
        """
        return self._last_call()[1]

    def _last_call(self) -> tuple[MemoryStats, ServedBy]:
        if not self._last:
            raise RuntimeError("no generate call inside this block has generated images yet")
        return self._last[0]


@dataclass(eq=False, kw_only=True)
class _EnableBlock(Block):
    """What the calls inside a block need. It holds no reference to `enable`, so an abandoned block can be collected."""

    model: PreTrainedModel
    head_map: HeadMap
    settings: dict[str, Any]
    last: deque[tuple[MemoryStats, ServedBy]]
    keeps_cache: bool
    kept: deque[SSDCache] = field(default_factory=lambda: deque(maxlen=1))

    def take_cache(self, layout: ImageLayout) -> SSDCache:
        """The kept cache if it is of this layout and no other call uses it, else a new one."""
        try:
            cache = self.kept.pop()
        except IndexError:
            cache = None
        if cache is None or cache.head_map.layout != layout:
            cache = SSDCache(self.head_map.with_layout(layout), **self.settings)
        return cache

    def give_back(self, cache: SSDCache, output: Any) -> None:
        """Keep a call's cache for the next call, unless the caller has it in the call's output."""
        self.last.append((cache.memory_stats(), cache.served_by))
        if self.keeps_cache and not (isinstance(output, dict) and any(value is cache for value in output.values())):
            cache.reset()
            self.kept.append(cache)


class _GenerateWithCache(Patch):
    """Replacement for a model's `generate` that gives image calls a fresh cache."""

    def __call__(self, *args, **kwargs):
        block = innermost(self.owners, "enable")
        if block is None:
            return self.inner(*args, **kwargs)
        call, family = _bind(self.target, self.inner, args, kwargs), family_of(block.model.config)
        ids = call.get("inputs") if call.get("input_ids") is None else call["input_ids"]
        seen = {**call, "input_ids": ids}  # the prompt may come as `inputs` or `input_ids`
        if find_cache(call) is not None or not family.generates_images(seen):
            return self.inner(*args, **kwargs)
        for name, kept in (("cache_implementation", None), ("use_cache", True)):
            if (value := call.pop(name, kept)) not in (None, kept):
                raise ValueError(
                    f"{name}={value!r} inside `enable`, which gives the call an SSDCache: leave {name} out, or "
                    "call generate outside of the block"
                )
            if _setting(block.model, call, name) not in (None, kept):  # in a generation config, which gives way
                call[name] = kept
        layout = family.layout_of_call(seen) or block.head_map.layout
        cache = call[CACHE] = block.take_cache(layout)
        with nullcontext() if family.has_own_guidance else _take_guidance(block.model, call, cache):
            output = self.inner(**call)
        block.give_back(cache, output)
        return output


def _bind(model: PreTrainedModel, generate: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a `generate` call by name; `generate` is the model's method or its replacement."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(generate)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        signature = inspect.signature(MethodType(type(model).generate, model))  # a wrapper that passes all arguments on
    call = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            call |= call.pop(parameter.name, {})
    return call


def _setting(model: PreTrainedModel, call: Mapping[str, Any], name: str) -> Any:
    """A generation setting as transformers resolves it: from the call, its generation config, then the model."""
    if name in call:
        return call[name]
    for config in (call.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _take_guidance(model: PreTrainedModel, call: dict[str, Any], cache: SSDCache) -> AbstractContextManager:
    """Remove guidance from a call's arguments; return the context that applies the same guidance in one batch."""
    scale = _setting(model, call, "guidance_scale")
    if scale is None or scale == 1:
        return nullcontext()
    beams = _setting(model, call, "num_beams") or 1
    if beams > 1:
        raise ValueError(f"num_beams={beams} with guidance_scale={scale}: generate guided images with num_beams=1")
    negative = [call.pop(name, None) for name in ("negative_prompt_ids", "negative_prompt_attention_mask")]
    call["guidance_scale"] = 1.0  # set, since the model's generation config would apply guidance again
    return batched_guidance(model, scale, *negative, cache=cache)


def _check_generates(model: Any) -> None:
    """Refuse a model without `generate` or with an encoder; for a pipeline, name the parts that have `generate`."""
    if not (isinstance(model, PreTrainedModel) and callable(getattr(model, "generate", None))):
        parts = getattr(model, "components", None)
        parts = parts if isinstance(parts, Mapping) else {"model": getattr(model, "model", None)}
        able = [name for name, part in parts.items() if isinstance(part, PreTrainedModel) and part.can_generate()]
        hint = (
            f"; give its autoregressive model, {' or '.join(f'.{name}' for name in able)}"
            if able
            else ", which has no autoregressive part: it needs a transformers model with generate(); a script with its "
            "own loop over the decoder needs an SSDCache instead"
        )
        raise TypeError(f"enable got a {type(model).__name__}{hint}")
    if model.config.is_encoder_decoder:
        raise TypeError(
            f"enable got a {type(model).__name__}, whose prompts go through an encoder: SSDCache holds prompt and "
            "image in one cache, which needs a model that is only a decoder"
        )
