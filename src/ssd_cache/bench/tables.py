"""A report as tables, for the terminal and as Markdown, with the same cells in both.

All numbers come from `bench/results.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from tqdm import tqdm

from ssd_cache.bench.cases import RIVALS
from ssd_cache.bench.results import Report, Row
from ssd_cache.io.markdown import code_block, escape, table

MISSING = "-"


@dataclass(frozen=True)
class Cells:
    """A table as text: a title, the column heads, and rows whose first cell is a name."""

    title: str
    heads: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        return f"{escape(self.title)}\n\n{table(self.heads, self.rows)}"

    def to_rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in self.heads:
            table.add_column(head, justify="left" if head == self.heads[0] else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def all_tables(report: Report) -> list[Cells]:
    """Tables of speed, steps, and memory and time for each batch size, then images that fit; about 80 columns wide."""
    found = []
    for batch_size in dict.fromkeys(row.batch_size for row in report.rows):
        rows = [row for row in report.rows if row.batch_size == batch_size]
        found += [speed_table(rows), step_table(rows), cost_table(rows)]
    return [*found, capacity_table(report)] if report.capacities else found


def speed_table(rows: Sequence[Row]) -> Cells:
    """Table of speed, its spread over the rounds, and its ratio to the baselines."""
    speeds = {row.cache: row.tokens_per_second for row in rows}

    def against(rival: str) -> Callable[[Row], str]:
        base = speeds.get(rival)
        return lambda row: f"{row.tokens_per_second / base:.2f}x" if base else MISSING

    columns: dict[str, Callable[[Row], str]] = {
        "tokens/s": lambda row: number(row.tokens_per_second),
        "rounds": lambda row: f"{number(row.slowest)} to {number(row.fastest)}",
        "pictures/s": lambda row: number(row.pictures_per_second),
        **{f"to {rival.removesuffix('Cache')}": against(rival) for rival in RIVALS},
    }
    return _cells(f"Speed, batch {rows[0].batch_size}", columns, rows)


def step_table(rows: Sequence[Row]) -> Cells:
    """Table of step times along the image, and their ratio to the roofline."""
    columns: dict[str, Callable[[Row], str]] = {
        "ms a step": lambda row: number(row.step_ms),
        "median of each quarter": lambda row: ", ".join(map(number, row.quarters_ms)),
        "growth": lambda row: f"{row.growth_ms:+.2f}",
        "roofline": lambda row: MISSING if row.least_ms is None else number(row.least_ms),
        "of it": lambda row: share(row.roofline_share),
    }
    return _cells(f"Steps in ms, growth per 100 tokens, batch {rows[0].batch_size}", columns, rows)


def cost_table(rows: Sequence[Row]) -> Cells:
    """Table of bytes and of shares of the step time."""

    def part(name: str) -> Callable[[Row], str]:
        return lambda row: share(None if row.split is None else getattr(row.split, name))

    columns: dict[str, Callable[[Row], str]] = {
        "K and V": lambda row: size(row.key_value),
        "beside": lambda row: size(row.bookkeeping),
        "peak": lambda row: MISSING if row.peak is None else size(row.peak),
        **{name: part(name) for name in ("attention", "storing", "evicting", "elsewhere")},
    }
    return _cells(f"Memory and time, batch {rows[0].batch_size}", columns, rows)


def capacity_table(report: Report) -> Cells:
    """Table of the number of images at once in a given memory."""
    rows = [
        [
            entry.cache,
            size(entry.picture_bytes),
            str(entry.by_formula),
            MISSING if entry.by_trying is None else str(entry.by_trying),
        ]
        for entry in report.capacities
    ]
    title = f"Pictures at once in {report.conditions['memory']}, beside {size(report.conditions['weights'])} of weights"
    return Cells(title, ["cache", "cache of a picture", "by formula", "drawn"], rows)


def _cells(title: str, columns: dict[str, Callable[[Row], str]], rows: Sequence[Row]) -> Cells:
    lines = []
    for row in rows:
        failed = [row.failure or "", *[MISSING] * (len(columns) - 1)]
        lines.append([row.cache, *(failed if row.failure else [cell(row) for cell in columns.values()])])
    return Cells(title, ["cache", *columns], lines)


def condition_lines(report: Report) -> list[str]:
    """The conditions as lines, several per line."""
    told = {name: size(value) if name == "weights" else value for name, value in report.conditions.items()}
    machine = report.machine
    return [
        "{model} ({class}): {layers} layers, hidden {hidden_size}, heads {heads}, {weights} of weights".format(**told),
        "{grid}, prompt {prompt}, drawn: {drawn}, guidance {guidance}, head map: {head map}".format(**told),
        "{dtype} on {device}, {threads} threads, {system}, rounds: {rounds}".format(**told),
        "ssd-cache {ssd_cache}, torch {torch}, transformers {transformers}, Python {python}".format(**told),
        f"roofline: {size(machine.copy_speed)}/s copied, {machine.matrix_speed / 1e12:.3g} TFLOP/s in matrix products",
        *(f"left out: {line}" for line in report.left_out),
        f"to repeat it: {report.command}",
    ]


def to_markdown(report: Report) -> str:
    """Return the whole report as a Markdown page."""
    conditions = "\n".join(f"- {escape(line)}" for line in condition_lines(report)[:-1])
    tables = "\n\n".join(f"## {cells.to_markdown()}" for cells in all_tables(report))
    command = code_block(report.command, "bash")
    return f"# {escape(report.conditions['model'])}\n\n{conditions}\n\n{command}\n\n{tables}\n"


def number(value: float) -> str:
    """Format with three digits, or with all digits before the point: 0.123, 12.3, 1234."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """Format as per cent, with one decimal below 10%."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f}%" if value < 0.1 else f"{100 * value:.0f}%"


def size(num_bytes: float) -> str:
    """Format bytes with three digits, in powers of 1000."""
    return tqdm.format_sizeof(num_bytes, "B") if num_bytes >= 1000 else f"{num_bytes:.0f}B"
