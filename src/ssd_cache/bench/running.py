"""Generate the same images with several caches in turn and time every step.

Rounds are interleaved, so that a slowdown of the machine affects all caches alike. The first round warms up and
compiles; it is not counted. `bench/results.py` evaluates the times.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import Cache

from ssd_cache.bench.cases import Case
from ssd_cache.bench.roofline import synchronize
from ssd_cache.bench.subject import Subject
from ssd_cache.cache.cache import SSDCache
from ssd_cache.io.showing import first_line

NUM_WINDOWS = 4


def choose_windows(num_cells: int, num_tokens: int | None) -> list[range]:
    """The visual tokens to generate: the whole image, or a window around the middle of each quarter.

    Steps of a full cache become slower along the image, so early steps alone would favour it.

    Args:
        num_cells: visual tokens of the image.
        num_tokens: steps in all windows together; None for the whole image. A multiple of 4 grid rows has evictions in
            their true proportion.

    Raises:
        ValueError: fewer than 8 tokens, or as many as the image has.
    """
    if num_tokens is None:
        return [range(num_cells)]
    if not 2 * NUM_WINDOWS <= num_tokens < num_cells:
        raise ValueError(
            f"{num_tokens} tokens to generate: give {2 * NUM_WINDOWS} to {num_cells - 1}, or none for the whole image"
        )
    length = num_tokens // NUM_WINDOWS
    middles = [(2 * quarter + 1) * num_cells // (2 * NUM_WINDOWS) for quarter in range(NUM_WINDOWS)]
    starts = [max(1, middle - length // 2) for middle in middles]
    return [range(start, start + length) for start in starts]


def timed_positions(windows: Sequence[range]) -> list[int]:
    """The visual tokens that the timed steps feed. The first step is not timed: it contains the start of the call.

    The first step of a whole image feeds the prompt, so the first timed step feeds visual token 0.
    """
    return [position for window in windows for position in (window[1:] if window.start else window[:-1])]


class StepClock:
    """Times steps without GPU synchronisation: `tick` sets a mark, `intervals` returns the seconds between marks."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list = []

    def tick(self) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds from each mark to the next; on a GPU after `synchronize`."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) / 1000 if self.on_gpu else b - a for a, b in pairs]


@dataclass
class Measurement:
    """Measured times and bytes of a case.

    Attributes:
        case, batch_size: what was measured; `batch_size` counts images.
        seconds: seconds of each counted round, for the generated tokens.
        steps: seconds of each step in each counted round, one for each of `timed_positions`.
        key_value, bookkeeping: bytes that the cache holds at the end of an image.
        peak: on a GPU, torch's peak of allocated memory, weights included.
        failure: the reason if there are no results.
    """

    case: Case
    batch_size: int
    seconds: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    key_value: int = 0
    bookkeeping: int = 0
    peak: int | None = None
    failure: str | None = None


def measure(
    subject: Subject,
    cases: Sequence[Case],
    windows: Sequence[range],
    *,
    batch_size: int,
    rounds: int,
    progress: bool = False,
) -> list[Measurement]:
    """Generate the windows with every case once per round, after one uncounted round; arguments as for `run`.

    A case that runs out of GPU memory, or cannot be compiled, is skipped in later rounds; `failure` states the reason.
    """
    results = [Measurement(case, batch_size) for case in cases]
    static: list[Cache] = []
    torch.compiler.reset()  # compile for this batch size alone; else torch compiles for dynamic sizes
    with tqdm(total=(rounds + 1) * len(cases), disable=not progress) as bar:
        for number in range(rounds + 1):
            for result in results:
                bar.set_description(f"batch {batch_size}, {result.case.name}")
                if result.failure is None:
                    try:
                        _measure_once(subject, result, windows, static, is_counted=number > 0)
                    except torch.OutOfMemoryError:
                        static.clear()
                        result.failure = "out of memory"
                    except Exception as error:  # the compiler's errors have no common class
                        if not result.case.is_compiled:
                            raise
                        result.failure = f"cannot be compiled here: {first_line(error)}"
                bar.update()
    return results


def _measure_once(
    subject: Subject, result: Measurement, windows: Sequence[range], static: list[Cache], *, is_counted: bool
) -> None:
    """One case in one round. The StaticCache in `static` is reused, because compiled steps are tied to one."""
    case, device = result.case, subject.model.device
    if case.cache == "StaticCache":
        static[:] = static or [case.make_cache(subject)]
        cache = static[0]
        cache.reset()
    else:
        cache = case.make_cache(subject)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with case.running(subject):
        seconds, steps = generate_windows(subject, cache, result.batch_size, windows)
        if device.type == "cuda":
            others = sum(sum(held_bytes(other)) for other in static if other is not cache)
            result.peak = max(result.peak or 0, torch.cuda.max_memory_allocated(device) - others)
        if not is_counted:
            subject.fill(cache, result.batch_size, subject.length - 1)  # the last generated token is never fed
            result.key_value, result.bookkeeping = held_bytes(cache)
            return
    result.seconds.append(seconds)
    result.steps.append(steps)


def generate_windows(
    subject: Subject, cache: Cache, batch_size: int, windows: Sequence[range]
) -> tuple[float, list[float]]:
    """Generate the windows with one cache, filled up to the start of each; returns total seconds and step seconds.

    For a whole image, the total is wall time, including the prompt and the start of the call. For windows, it is the
    mean step time multiplied by the number of steps.
    """
    device, steps, wall = subject.model.device, [], 0.0
    for window in windows:
        if window.start:
            subject.fill(cache, batch_size, subject.num_prompt + window.start)
        clock = StepClock(device)
        torch.manual_seed(0)
        synchronize(device)
        begin = time.perf_counter()
        subject.generate(cache, batch_size, len(window), clock.tick)
        synchronize(device)
        wall += time.perf_counter() - begin
        steps += clock.intervals()
    if len(windows) > 1:
        wall = sum(steps) / len(steps) * sum(map(len, windows))
    return wall, steps


def held_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes that a cache holds now: K and V, and other tensors beside them."""
    if isinstance(cache, SSDCache):
        stats = cache.memory_stats()
        return stats.key_value, stats.bookkeeping
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), 0
