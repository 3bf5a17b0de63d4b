"""The number of images that can be generated at once in a given memory: by formula, and on a GPU by trial.

The formula counts weights and caches. It does not count temporary memory of a step (logits, a copy while a cache
grows), so a trial finds the same number or fewer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from ssd_cache.bench.cases import Case
from ssd_cache.bench.running import draw_stretches
from ssd_cache.bench.sizes import expected_bytes, weight_bytes
from ssd_cache.bench.stretches import last_steps
from ssd_cache.bench.subject import Subject

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Capacity:
    """Images that fit into memory beside the weights.

    Attributes:
        cache: name of the case.
        picture_bytes: bytes of one image's cache, with all its rows: K, V and bookkeeping.
        by_formula: number of images by formula.
        by_trying: number of images by trial on a GPU; None without a trial.
    """

    cache: str
    picture_bytes: int
    by_formula: int
    by_trying: int | None = None


def parse_memory(text: str) -> int:
    """Parse an amount of memory such as "24GB" (powers of 1000) or "24GiB" (powers of 1024) into bytes.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory: give a number and one of {', '.join(UNITS)}, as in 24GB")
    return int(float(match[1]) * units[match[2].lower()])


def find_capacity(subject: Subject, case: Case, memory: int) -> Capacity | None:
    """The capacity by formula; None for a case without a formula."""
    of_picture = expected_bytes(subject, case)
    if of_picture is None:
        return None
    room = max(0, memory - weight_bytes(subject))
    return Capacity(case.name, of_picture.total, room // of_picture.total)


def try_capacity(subject: Subject, case: Case, memory: int, at_most: int) -> int:
    """The largest number of images, up to `at_most`, whose last steps a GPU can generate in `memory` bytes of torch.

    The cache is first filled up to the end of the image. CUDA's own memory is not counted in `memory`.
    """
    device = subject.model.device
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)

    def fits(batch_size: int) -> bool:
        with suppress(torch.OutOfMemoryError):
            last = last_steps(subject.head_map.num_visual_tokens)
            with case.running(subject):
                draw_stretches(subject, case.make_cache(subject), batch_size, last)
            return True
        torch.cuda.empty_cache()
        return False

    try:
        return most(fits, at_most)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def most(fits: Callable[[int], bool], at_most: int) -> int:
    """The largest number up to `at_most` that fits, 0 if none does, with few calls of `fits`.

    The limit itself is tried first, because the result is most likely close to it. Bisection follows.
    """
    if at_most < 1 or fits(at_most):
        return max(0, at_most)
    low, high = 0, at_most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
