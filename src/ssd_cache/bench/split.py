"""Shares of the step time: attention, storing K and V, eviction, everything else; measured in a separate pass.

Timers around the calls cost time themselves, so this pass does not count for speed. Inside a compiled step nothing can
be timed; only evictions can, because they run outside of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, Cache

from ssd_cache.bench.cases import Case
from ssd_cache.bench.roofline import synchronize
from ssd_cache.bench.running import draw_stretches
from ssd_cache.bench.stretches import Stretch
from ssd_cache.bench.subject import Subject
from ssd_cache.cache.attention import NAME
from ssd_cache.cache.slots import SlotStore

EVICTING = ("score_held", "_evict")
"""Methods of `SlotStore` that score and evict."""


@dataclass(frozen=True)
class TimeSplit:
    """Shares of the time between the first and the last step; they sum to 1.

    Attributes:
        attention: share of the attention function; None for compiled steps.
        storing: share of the cache's `update` without evictions; a DynamicCache concatenates here. None for compiled
            steps.
        evicting: share of scoring held queries, choosing victims and moving survivors.
        elsewhere: the rest: matrix products, norms, sampling and Python; for compiled steps also attention and storing.
    """

    attention: float | None
    storing: float | None
    evicting: float
    elsewhere: float


class Stopwatch:
    """Adds up the time of calls, on a GPU with CUDA events; nested calls count once."""

    def __init__(self, device: torch.device):
        self.device, self.depth = device, 0
        self.spans: list[tuple[Any, Any]] = []

    def around(self, call: Callable) -> Callable:
        """Wrap a call so that its time is added."""

        def timed(*args, **kwargs):
            self.depth += 1
            begin = self._mark()
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.spans.append((begin, self._mark()))

        return timed

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in self.spans)
        synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in self.spans) / 1000


def split_time(subject: Subject, case: Case, batch_size: int, stretches: Sequence[Stretch]) -> TimeSplit:
    """Generate once more with timers around the attention, the cache's `update` and the evictions."""
    cache = case.make_cache(subject)
    device = subject.model.device
    attention, update, evicting, inside = (Stopwatch(device) for _ in range(4))
    total = 0.0
    with case.running(subject):
        for stretch in stretches:
            if stretch.start:
                subject.fill(cache, batch_size, subject.num_prompt + stretch.start)
            with ExitStack() as stack:
                if not case.is_compiled:
                    stack.enter_context(_timed_attention(attention, NAME if not case.is_full else "sdpa"))
                    stack.enter_context(_timed_update(update, cache))
                stack.enter_context(_timed_evictions(evicting, inside, update))
                seconds, _ = draw_stretches(subject, cache, batch_size, [Stretch(0, stretch.num_tokens)])
                total += seconds
    lost = evicting.seconds
    if case.is_compiled:
        return TimeSplit(None, None, lost / total, 1 - lost / total)
    storing = update.seconds - inside.seconds
    rest = total - attention.seconds - storing - lost
    return TimeSplit(attention.seconds / total, storing / total, lost / total, rest / total)


@contextmanager
def _timed_attention(watch: Stopwatch, name: str) -> Iterator[None]:
    plain = AttentionInterface()[name]
    AttentionInterface.register(name, watch.around(plain))
    try:
        yield
    finally:
        AttentionInterface.register(name, plain)


@contextmanager
def _timed_update(watch: Stopwatch, cache: Cache) -> Iterator[None]:
    cache.update = watch.around(cache.update)
    try:
        yield
    finally:
        del cache.update


@contextmanager
def _timed_evictions(watch: Stopwatch, inside: Stopwatch, update: Stopwatch) -> Iterator[None]:
    """Time the `EVICTING` methods of every store; calls during an `update` also count in `inside`."""
    plain = {name: getattr(SlotStore, name) for name in EVICTING}

    def timed(call):
        counted, within = watch.around(call), inside.around(watch.around(call))

        def either(*args, **kwargs):
            return (within if update.depth else counted)(*args, **kwargs)

        return either

    for name, call in plain.items():
        setattr(SlotStore, name, timed(call))
    try:
        yield
    finally:
        for name, call in plain.items():
            setattr(SlotStore, name, call)
