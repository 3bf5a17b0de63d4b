"""How many pictures can be drawn at once in so much memory: by formula, and on a GPU by trying.

The formula knows weights and caches. What a step needs for itself (logits, a copy while a cache grows) it does not, so
trying finds as many or fewer.
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
    """Pictures that fit beside the weights.

    Attributes:
        cache: name of the case.
        picture_bytes: of one picture's cache, all its rows, K and V and what is beside them.
        by_formula: pictures.
        by_trying: pictures that were drawn, on a GPU; None where nothing was tried.
    """

    cache: str
    picture_bytes: int
    by_formula: int
    by_trying: int | None = None


def parse_memory(text: str) -> int:
    """Bytes of "24GB" (powers of 1000) or "24GiB" (of 1024).

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory: give a number and one of {', '.join(UNITS)}, as in 24GB")
    return int(float(match[1]) * units[match[2].lower()])


def find_capacity(subject: Subject, case: Case, memory: int) -> Capacity | None:
    """The formula's answer; None where a case has no formula."""
    of_picture = expected_bytes(subject, case)
    if of_picture is None:
        return None
    room = max(0, memory - weight_bytes(subject))
    return Capacity(case.name, of_picture.total, room // of_picture.total)


def try_capacity(subject: Subject, case: Case, memory: int, at_most: int) -> int:
    """The most pictures whose last steps a GPU draws with torch held to `memory` bytes, `at_most` or fewer.

    The cache is filled up to the end of the picture first. What CUDA itself takes comes on top of the memory.
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
    """The largest number up to `at_most` that fits, 0 when none does; asks no more often than needed.

    Most likely is a number a little below the limit, so the limit is asked first, then halves.
    """
    if at_most < 1 or fits(at_most):
        return max(0, at_most)
    low, high = 0, at_most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
