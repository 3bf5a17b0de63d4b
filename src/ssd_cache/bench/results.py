"""The results of a run as plain numbers, to JSON and back; tables and plots use only these.

Seconds become tokens per second with the spread of the rounds, the mean step, and the growth of steps along the image.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ssd_cache.bench.capacity import Capacity
from ssd_cache.bench.peak import ProcessPeak
from ssd_cache.bench.roofline import Machine, StepWork
from ssd_cache.bench.running import Measurement
from ssd_cache.bench.split import TimeSplit
from ssd_cache.bench.stretches import Stretch
from ssd_cache.io.showing import ReadableError
from ssd_cache.io.untrusted import checked, parse_json

FORMAT = "ssd-cache bench 1"


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
        pictures_per_second: `tokens_per_second` in whole images.
        step_ms: the mean step.
        quarters_ms: the median step of each quarter of the image.
        growth_ms: extra time of a step after 100 further tokens: the slope of the regression line through these four
            medians, which a few slow steps (evictions, another program) do not affect.
        curve: [visual token, milliseconds] of every timed step, median of the rounds.
        key_value, bookkeeping: bytes that the cache held at the end.
        peak: peak memory: of torch on the GPU, else of a separate process.
        peak_before: memory of that process with the model loaded, before generation.
        split: shares of the step time, or None.
        work: bytes that a step must read and operations that it must make, or None for a quantized cache.
        least_ms: lower bound of a step on this machine.
    """

    cache: str
    batch_size: int
    failure: str | None = None
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    slowest: float = 0.0
    fastest: float = 0.0
    pictures_per_second: float = 0.0
    step_ms: float = 0.0
    quarters_ms: list[float] = field(default_factory=list)
    growth_ms: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    key_value: int = 0
    bookkeeping: int = 0
    peak: int | None = None
    peak_before: int | None = None
    split: TimeSplit | None = None
    work: StepWork | None = None
    least_ms: float | None = None

    @property
    def roofline_share(self) -> float | None:
        """Lower bound of the step time divided by the mean step time."""
        return None if self.least_ms is None or not self.step_ms else self.least_ms / self.step_ms


@dataclass(frozen=True)
class Report:
    """A run: the command that repeats it, its conditions and its results."""

    command: str
    conditions: dict[str, Any]
    machine: Machine
    rows: list[Row]
    capacities: list[Capacity] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return the report as JSON text; `from_json` reads it."""
        return json.dumps({"format": FORMAT, **asdict(self)}, default=str)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report that `to_json` wrote.

        Raises:
            ValueError: another format, or a value of another type.
        """
        found = parse_json(text)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ReadableError(f"this is no result of a bench; the format is {FORMAT!r}")
        return checked(cls, found)


def summarize(
    measured: Measurement,
    stretches: Sequence[Stretch],
    num_cells: int,
    *,
    machine: Machine,
    work: StepWork | None = None,
    split: TimeSplit | None = None,
    process: ProcessPeak | None = None,
) -> Row:
    """Compute the row of one measurement.

    Args:
        measured: times and bytes.
        stretches: the steps that were generated.
        num_cells: visual tokens of an image.
        machine, work: for the roofline.
        split: shares of the step time.
        process: the peak memory on a CPU.
    """
    name, batch_size = measured.case.name, measured.batch_size
    if measured.failure is not None:
        return Row(name, batch_size, failure=measured.failure)
    drawn = batch_size * sum(stretch.num_tokens for stretch in stretches)
    speed = drawn / statistics.median(measured.seconds)
    positions = [position for stretch in stretches for position in stretch.positions]
    medians = [1000 * statistics.median(step) for step in zip(*measured.steps, strict=True)]
    curve = list(zip(positions, medians, strict=True))
    quarters = [[point for point in curve if 4 * point[0] // num_cells == quarter] for quarter in range(4)]
    middles = [statistics.mean(position for position, _ in quarter) for quarter in quarters]
    quarters_ms = [statistics.median(ms for _, ms in quarter) for quarter in quarters]
    return Row(
        cache=name,
        batch_size=batch_size,
        seconds=measured.seconds,
        tokens_per_second=speed,
        slowest=drawn / max(measured.seconds),
        fastest=drawn / min(measured.seconds),
        pictures_per_second=speed / num_cells,
        step_ms=statistics.mean(medians),
        quarters_ms=quarters_ms,
        growth_ms=100 * statistics.linear_regression(middles, quarters_ms).slope,
        curve=[(position, round(ms, 4)) for position, ms in curve],
        key_value=measured.held.key_value,
        bookkeeping=measured.held.bookkeeping,
        peak=measured.peak if process is None else process.peak,
        peak_before=None if process is None else process.before,
        split=split,
        work=work,
        least_ms=None if work is None else 1000 * work.least_seconds(machine),
    )
