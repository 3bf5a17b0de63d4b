"""The results of a run as plain numbers; tables, plots and JSON use only these.

Seconds become tokens per second with the spread of the rounds, and the step time along the image.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ssd_cache.bench.roofline import Machine, StepWork
from ssd_cache.bench.running import Measurement, timed_positions

FORMAT = "ssd-cache bench 3"


@dataclass(frozen=True)
class Row:
    """One cache at one batch size.

    Attributes:
        cache: name of the case.
        batch_size: images at once.
        failure: the reason if there are no times, or None.
        seconds: seconds of each counted round, for the generated tokens.
        tokens_per_second: visual tokens of all images per second, in the median round.
        slowest, fastest: tokens per second of the slowest and the fastest round.
        images_per_second: `tokens_per_second` in whole images.
        step_ms: the mean step.
        quarters_ms: the median step of each quarter of the image.
        curve: [visual token, milliseconds] of every timed step, median of the rounds.
        key_value, bookkeeping: bytes that the cache holds at the end of an image.
        peak: torch's peak of allocated memory on a GPU, weights included; None on a CPU.
        work: bytes that a step must read and operations that it must make.
        least_ms: lower bound of a step on this machine.
    """

    cache: str
    batch_size: int
    failure: str | None = None
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    slowest: float = 0.0
    fastest: float = 0.0
    images_per_second: float = 0.0
    step_ms: float = 0.0
    quarters_ms: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    key_value: int = 0
    bookkeeping: int = 0
    peak: int | None = None
    work: StepWork | None = None
    least_ms: float = 0.0


@dataclass(frozen=True)
class Report:
    """A run: the command that repeats it, its conditions and its results."""

    command: str
    conditions: dict[str, Any]
    machine: Machine
    rows: list[Row]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, default=str)


def summarize(
    measured: Measurement,
    windows: Sequence[range],
    num_cells: int,
    *,
    machine: Machine,
    work: StepWork,
) -> Row:
    """Compute the row of one measurement of `windows` in an image of `num_cells`."""
    generated = measured.batch_size * sum(map(len, windows))
    speed = generated / statistics.median(measured.seconds)
    medians = [1000 * statistics.median(step) for step in zip(*measured.steps, strict=True)]
    curve = list(zip(timed_positions(windows), medians, strict=True))
    return Row(
        cache=measured.case.name,
        batch_size=measured.batch_size,
        seconds=measured.seconds,
        tokens_per_second=speed,
        slowest=generated / max(measured.seconds),
        fastest=generated / min(measured.seconds),
        images_per_second=speed / num_cells,
        step_ms=statistics.mean(medians),
        quarters_ms=[
            statistics.median(ms for position, ms in curve if 4 * position // num_cells == quarter)
            for quarter in range(4)
        ],
        curve=[(position, round(ms, 4)) for position, ms in curve],
        key_value=measured.key_value,
        bookkeeping=measured.bookkeeping,
        peak=measured.peak,
        work=work,
        least_ms=1000 * work.least_seconds(machine),
    )
