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
from ssd_cache.bench.sizes import CacheBytes, held_bytes
from ssd_cache.bench.stretches import Stretch
from ssd_cache.bench.subject import Subject

OUT_OF_MEMORY = "out of memory"


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
        case: the measured case.
        batch_size: images at once.
        seconds: seconds of each counted round, for the generated tokens.
        steps: seconds of each step in each counted round; as many steps as the stretches have `positions`.
        held: bytes that the cache held at the end.
        peak: on a GPU, torch's peak of allocated memory, weights included.
        failure: the reason if there are no results.
    """

    case: Case
    batch_size: int
    seconds: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    held: CacheBytes = field(default_factory=lambda: CacheBytes(0, 0))
    peak: int | None = None
    failure: str | None = None


def measure(
    subject: Subject,
    cases: Sequence[Case],
    stretches: Sequence[Stretch],
    *,
    batch_size: int,
    rounds: int,
    progress: bool = False,
) -> list[Measurement]:
    """Generate with every case once per round, after one uncounted round.

    A case that runs out of GPU memory, or cannot be compiled, is skipped in later rounds; `failure` states the reason.

    Args:
        subject: the model; its attention is set for every case and restored at the end.
        cases: the cases to measure.
        stretches: the steps of an image to generate.
        batch_size: images at once; guidance doubles the rows.
        rounds: counted rounds.
        progress: show a progress bar.
    """
    results = [Measurement(case, batch_size) for case in cases]
    kept: dict[str, Cache] = {}
    torch.compiler.reset()  # compile for this batch size alone; else torch compiles for dynamic sizes
    with tqdm(total=(rounds + 1) * len(cases), unit="drawing", disable=not progress) as bar:
        for turn in range(rounds + 1):
            for result in results:
                bar.set_description(f"batch {batch_size}, {result.case.name}")
                if result.failure is None:
                    _measure_once(subject, result, stretches, kept, is_counted=turn > 0)
                bar.update()
    return results


def _measure_once(
    subject: Subject, result: Measurement, stretches: Sequence[Stretch], kept: dict[str, Cache], *, is_counted: bool
) -> None:
    try:
        cache = _cache_for(subject, result.case, kept)
        others = sum(held_bytes(other).total for other in kept.values() if other is not cache)
        if subject.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(subject.model.device)
        with result.case.running(subject):
            seconds, steps = draw_stretches(subject, cache, result.batch_size, stretches)
    except torch.OutOfMemoryError:
        kept.pop(result.case.cache, None)
        result.failure = OUT_OF_MEMORY
        return
    except Exception as error:  # the compiler's errors have no common class
        if not result.case.is_compiled:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        result.failure = f"can not be compiled here: {reason}"
        return
    if subject.model.device.type == "cuda":
        result.peak = max(result.peak or 0, torch.cuda.max_memory_allocated(subject.model.device) - others)
    result.held = held_bytes(cache)
    if is_counted:
        result.seconds.append(seconds)
        result.steps.append(steps)


def _cache_for(subject: Subject, case: Case, kept: dict[str, Cache]) -> Cache:
    """A new cache; a StaticCache is reset and reused, because compiled steps are tied to one StaticCache."""
    if case.cache != "StaticCache":
        return case.make_cache(subject)
    if case.cache not in kept:
        kept[case.cache] = case.make_cache(subject)
    kept[case.cache].reset()
    return kept[case.cache]


def draw_stretches(
    subject: Subject, cache: Cache, batch_size: int, stretches: Sequence[Stretch]
) -> tuple[float, list[float]]:
    """Generate the stretches with one cache, filled up to the start of each; returns total seconds and step seconds.

    For a whole image, the total is wall time, including the prompt and the start of the call. For stretches, it is the
    mean step time multiplied by the number of steps.
    """
    device, steps, wall = subject.model.device, [], 0.0
    for stretch in stretches:
        if stretch.start:
            subject.fill(cache, batch_size, subject.num_prompt + stretch.start)
        clock = StepClock(device)
        torch.manual_seed(0)
        synchronize(device)
        begin = time.perf_counter()
        subject.draw(cache, batch_size, stretch.num_tokens, clock.tick)
        synchronize(device)
        wall += time.perf_counter() - begin
        steps += clock.intervals()
    if len(stretches) > 1:
        wall = sum(steps) / len(steps) * sum(stretch.num_tokens for stretch in stretches)
    return wall, steps
