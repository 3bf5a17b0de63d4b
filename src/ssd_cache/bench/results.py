"""The results of a run as dataclasses, as JSON, and as tables for the terminal and for Markdown.

Nothing is measured here; `bench/running.py` measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from tqdm import tqdm

from ssd_cache.bench.roofline import Machine, StepWork
from ssd_cache.io.markdown import code_block, escape, table

FORMAT = "ssd-cache bench 4"

SPEED_HEADS = ["tokens/s", "min to max", "to best", "to Dynamic"]
STEP_HEADS = ["mean", "median of each quarter", "max", "sum", "sum / mean"]
MEMORY_HEADS = ["K and V", "overhead", "peak", "served by"]

Table = tuple[str, list[str], list[list[str]]]
"""A title, the column heads, and rows whose first cell is a name."""


@dataclass(frozen=True)
class Row:
    """One cache at one batch size.

    Attributes:
        cache: name of the case.
        batch_size: images at once.
        is_rival: whether it is a full cache, with which policies are compared.
        failure: the reason if there are no times, or None.
        served_by: what ran the steps: attention, linear layers, and eager or compiled steps.
        fell_back: whether that is less than the name of the case says.
        seconds: seconds of each counted round, for the generated tokens.
        tokens_per_second: visual tokens of all images per second, in the median round.
        slowest, fastest: tokens per second of the slowest and the fastest round.
        step_ms: the mean step.
        quarters_ms: the median step of each quarter of the image.
        key_value, bookkeeping: bytes that the cache holds at the end of an image.
        peak: torch's peak of allocated memory on a GPU, weights included; None on a CPU.
        work: bytes that a step must read, and floating-point operations that it must execute.
        max_ms: the larger of the times that these bytes and operations take on this machine, a lower bound of a step.
        sum_ms: the sum of these times.
    """

    cache: str
    batch_size: int
    is_rival: bool = False
    failure: str | None = None
    served_by: str = ""
    fell_back: bool = False
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    slowest: float = 0.0
    fastest: float = 0.0
    step_ms: float = 0.0
    quarters_ms: list[float] = field(default_factory=list)
    key_value: int = 0
    bookkeeping: int = 0
    peak: int | None = None
    work: StepWork | None = None
    max_ms: float = 0.0
    sum_ms: float = 0.0


@dataclass(frozen=True)
class Report:
    """A run: the command that repeats it, its conditions as text, the machine's speeds and the results."""

    command: str
    conditions: dict[str, str]
    machine: Machine
    rows: list[Row]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    def to_markdown(self) -> str:
        """Return the report as a Markdown page."""
        conditions = "\n".join(f"- {escape(line)}" for line in self.condition_lines())
        parts = [f"# {escape(self.conditions['model'])}", conditions, code_block(self.command, "bash")]
        for title, heads, rows in self.tables():
            parts += [f"## {escape(title)}", table(heads, rows)]
        return "\n\n".join(parts) + "\n"

    def condition_lines(self) -> list[str]:
        """The conditions, a line each."""
        return [f"{name}: {value}" for name, value in self.conditions.items()]

    def tables(self) -> list[Table]:
        """Speed, steps and memory for each batch size. A star marks rows that fell back."""
        found = []
        for batch_size in dict.fromkeys(row.batch_size for row in self.rows):
            rows = [row for row in self.rows if row.batch_size == batch_size]
            speeds = {row.cache: row.tokens_per_second for row in rows}
            best = max(
                (row.cache for row in rows if row.is_rival and not row.failure), key=speeds.__getitem__, default=""
            )
            bases = speeds.get(best, 0.0), speeds.get("DynamicCache", 0.0)
            star = " (*: without something that the name says)" if any(row.fell_back for row in rows) else ""
            for title, heads, cells in (
                (f"Speed, batch {batch_size}" + (best and f"; best full cache: {best}"), SPEED_HEADS, _speed),
                (f"Steps in ms, batch {batch_size}; max and sum of the roofline's two times", STEP_HEADS, _steps),
                (f"Memory, and what ran the steps, batch {batch_size}{star}", MEMORY_HEADS, _memory),
            ):
                lines = [
                    [
                        row.cache + " *" * row.fell_back,
                        *([row.failure, *["-"] * (len(heads) - 1)] if row.failure else cells(row, bases)),
                    ]
                    for row in rows
                ]
                found.append((title, ["cache", *heads], lines))
        return found


def _speed(row: Row, bases: Sequence[float]) -> list[str]:
    ratios = [f"{row.tokens_per_second / base:.2f}x" if base else "-" for base in bases]
    return [number(row.tokens_per_second), f"{number(row.slowest)} to {number(row.fastest)}", *ratios]


def _steps(row: Row, bases: Sequence[float]) -> list[str]:
    share = f"{100 * row.sum_ms / row.step_ms:.3g}%" if row.step_ms else "-"
    quarters = ", ".join(map(number, row.quarters_ms))
    return [number(row.step_ms), quarters, number(row.max_ms), number(row.sum_ms), share]


def _memory(row: Row, bases: Sequence[float]) -> list[str]:
    peak = "-" if row.peak is None else size(row.peak)
    return [size(row.key_value), size(row.bookkeeping), peak, row.served_by]


def number(value: float) -> str:
    """Format with three digits, or with all digits before the point: 0.123, 12.3, 1234."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Format bytes with three digits, in powers of 1000."""
    return tqdm.format_sizeof(num_bytes, "B") if num_bytes >= 1000 else f"{num_bytes:.0f}B"
