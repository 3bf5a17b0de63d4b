"""The versions of transformers that this package works with, refused here when another one is installed.

Where two of them differ, the difference is dealt with in this file and nowhere else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers

OLDEST, NEXT = (5, 18), (5, 25)
"""The first version on which the tests pass, and the first that was not tried; pyproject.toml has the same."""


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check_transformers(version: str) -> None:
    """Refuse a version outside the range.

    Raises:
        ImportError: with the version found, the range, and the remedy.
    """
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
"""The name in the version that is installed."""


def take_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of a forward's keyword arguments, under whichever name it came."""
    found = [arguments.pop(name, None) for name in CACHE_NAMES]
    return next((cache for cache in found if cache is not None), None)


def find_cache(arguments: dict[str, Any]) -> Any:
    """The cache among a forward's keyword arguments, under whichever name it came; None where there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


@torch.compiler.assume_constant_result
def in_prefill() -> bool:
    """Whether `generate` is feeding a prompt, or a chunk of one, to the forward that calls this.

    A cache sees no difference between a last chunk of one token (`prefill_chunk_size`) and the first generated token:
    the arguments of the two forwards are alike. So the call stack is read, up to the nearest frame of `generate`; by
    `torch.compile` once, when it traces the forward.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "transformers.generation.utils":
            return frame.f_code.co_name == "_prefill"
        frame = frame.f_back  # type: ignore[assignment]
    return False


def uncompiled(model: Any) -> Any:
    """The module that `torch.compile(module)` wraps, on which patches take effect; any other model itself."""
    return getattr(model, "_orig_mod", model)
