"""Generation settings that all generators share: prompts, guidance, temperature, seed, device, dtype.

The checks run before any model is loaded. The generators apply the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import is_unicode

DTYPES = ("float32", "bfloat16", "float16")


class GeneratorError(ReadableError):
    """A model that cannot be found or used, or a generation setting out of range."""


def check_texts(prompts: Sequence[str]) -> None:
    """Raise GeneratorError unless `prompts` is a list of texts that are not empty."""
    if isinstance(prompts, str):
        raise GeneratorError(f"prompts={prompts!r:.80} is one text: give a list with one text for each image")
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise GeneratorError(f"prompts={list(prompts)!r:.80}: give at least one prompt, and none that is empty")
    if broken := [prompt for prompt in prompts if not is_unicode(prompt)]:
        raise GeneratorError(f"prompt {shown(broken[0])} holds half of a surrogate pair: give text that UTF-8 can hold")


@dataclass(frozen=True)
class ResolvedSampling:
    """How visual tokens are sampled, as `Checkpoint.sampling` resolves and checks it.

    Attributes:
        guidance_scale: above 1; 1 for a model without guidance.
        temperature: 0 always takes the likeliest token.
        seed: seed of a batch.
    """

    guidance_scale: float
    temperature: float
    seed: int = 0

    def check_random(self) -> None:
        """Raise GeneratorError for temperature 0, whose one certain token has no distribution to compare."""
        if self.temperature == 0:
            raise GeneratorError(
                "temperature=0 leaves one token that is certain, and no distribution to compare or to train on: give "
                "a number above 0; 1 is usual"
            )


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device that this machine has, or raise GeneratorError; "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)  # fails if the device is absent
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise GeneratorError(
            f"device {str(device)!r} cannot be used on this machine: give 'auto', 'cpu', or a GPU that is there"
        ) from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype = "auto", device: torch.device | None = None) -> torch.dtype:
    """Return a type, or raise GeneratorError for an unknown name; "auto" is float32 on the CPU, else bfloat16."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device is None or device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise GeneratorError(f"unknown dtype {dtype!r}; give 'auto' or one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)
