"""The arguments of a `generate` call by name, whether given by position or by name, and settings from its configs.

This module reads calls and refuses some. It does not run them; `enable` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from transformers import PreTrainedModel


def bind_call(
    model: PreTrainedModel, generate: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All arguments of a `generate` call by name; `generate` is the model's own or its replacement.

    Raises:
        TypeError: the signature does not take the arguments; the call itself would raise the same error.
    """
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


def call_setting(model: PreTrainedModel, call: Mapping[str, Any], name: str) -> Any:
    """A generation setting as transformers resolves it: from the call, its generation config, then the model."""
    if name in call:
        return call[name]
    for config in (call.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def check_call_keeps_cache(model: PreTrainedModel, call: dict[str, Any]) -> None:
    """Make a call use the given cache: override its generation configs, and refuse conflicting arguments.

    Raises:
        ValueError: `cache_implementation`, or `use_cache=False`, among the arguments.
    """
    for name, kept in (("cache_implementation", None), ("use_cache", True)):
        if call.get(name, kept) not in (None, kept):
            raise ValueError(
                f"{name}={call[name]!r} inside `enable`, which gives the call an SSDCache: leave {name} out, or call "
                "generate outside of the block"
            )
        call.pop(name, None)
        if call_setting(model, call, name) not in (None, kept):
            call[name] = kept
