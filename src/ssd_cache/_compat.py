"""The supported versions of transformers; importing this module with another version installed raises ImportError.

Code that depends on the version of transformers is in this file and nowhere else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

OLDEST, NEXT = (5, 18), (5, 25)
"""The first version on which the tests pass, and the first untested one; pyproject.toml has the same limits."""


def release(version: str) -> tuple[int, ...]:
    """The major and minor version, as integers."""
    return tuple(map(int, version.split(".")[:2]))


def check_transformers(version: str) -> None:
    """Raise ImportError for a version outside the range."""
    if not OLDEST <= release(version) < NEXT:
        oldest, following = (".".join(map(str, end)) for end in (OLDEST, NEXT))
        raise ImportError(
            f"ssd-cache works with transformers from {oldest} up to, and without, {following}; {version} is installed: "
            f"pip install 'transformers>={oldest},<{following}'"
        )


check_transformers(transformers.__version__)

CACHE_NAMES = ("past_key_values", "cache")
"""The name of the cache in forward, generate and outputs: before 5.24, and since 5.24.

5.24 also accepts the old name, with a warning, except in Janus's `generate` for images.
"""

CACHE = CACHE_NAMES[release(transformers.__version__) >= (5, 24)]
"""The name in the installed version."""


def take_cache(arguments: dict[str, Any]) -> Any:
    """Remove the cache from a forward's keyword arguments, under either name, and return it; None if there is none."""
    cache = find_cache(arguments)
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    return cache


def find_cache(arguments: dict[str, Any]) -> Any:
    """The cache among a forward's keyword arguments, under either name; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


@torch.compiler.assume_constant_result
def in_prefill() -> bool:
    """Whether the current forward is `generate`'s forward over a prompt, or over a chunk of one.

    The arguments of a forward do not show this: they are the same for a last chunk of one token (`prefill_chunk_size`)
    and for the first generated token. This function therefore reads the call stack, up to the nearest frame of
    `generate`. `torch.compile` calls it once, when it traces the forward.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_code.co_name == "_prefill"
        frame = frame.f_back  # type: ignore[assignment]
    return False


def uncompiled(model: Any) -> Any:
    """The module inside a `torch.compile(module)`, on which patches take effect; any other model itself."""
    return getattr(model, "_orig_mod", model)
