"""The arguments of a call of `generate`, by name however they were given, and with what generation configs add.

It reads calls and refuses some; what is made of them is up to `enable`.
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
    """All arguments of a call of `generate`, the model's own or what stands in its place, by name.

    Raises:
        TypeError: arguments that its signature does not take, as the call itself would raise.
    """
    if not args:
        return dict(kwargs)
    signature = inspect.signature(generate)
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        signature = inspect.signature(MethodType(type(model).generate, model))  # a wrapper that passes all on
    call = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            call |= call.pop(parameter.name, {})
    return call


def call_setting(model: PreTrainedModel, call: Mapping[str, Any], name: str) -> Any:
    """A generation setting as transformers resolves it: the call's, its generation config's, the model's."""
    if name in call:
        return call[name]
    for config in (call.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def check_call_keeps_cache(model: PreTrainedModel, call: dict[str, Any]) -> None:
    """Let the cache of a call stand against its settings: generation configs give way, arguments are refused.

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
