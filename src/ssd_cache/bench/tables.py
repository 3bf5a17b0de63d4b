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

Columns = dict[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Cells:
    """A table as text: a title, the column heads, and rows whose first cell is a name."""

    title: str
    heads: list[str]
    rows: list[list[str]]

    def to_rich(self) -> Table:
        """The table for the terminal."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in self.heads:
            table.add_column(head, justify="left" if head == self.heads[0] else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table


def all_tables(report: Report) -> list[Cells]:
    """Tables of speed, steps, and memory for each batch size; about 80 columns wide."""
    found = []
    for batch_size in dict.fromkeys(row.batch_size for row in report.rows):
        rows = [row for row in report.rows if row.batch_size == batch_size]
        tables = {
            "Speed": _speed_columns(rows),
            "Steps in ms": STEP_COLUMNS,
            "Memory": MEMORY_COLUMNS,
        }
        for title, columns in tables.items():
            lines = [[row.cache, *_cells(columns, row)] for row in rows]
            found.append(Cells(f"{title}, batch {batch_size}", ["cache", *columns], lines))
    return found


def _cells(columns: Columns, row: Row) -> list[str]:
    if row.failure is not None:
        return [row.failure, *["-"] * (len(columns) - 1)]
    return [cell(row) for cell in columns.values()]


def _speed_columns(rows: Sequence[Row]) -> Columns:
    """Speed, its spread over the rounds, and its ratio to the baselines."""
    speeds = {row.cache: row.tokens_per_second for row in rows}

    def against(rival: str) -> Callable[[Row], str]:
        base = speeds.get(rival)
        return lambda row: f"{row.tokens_per_second / base:.2f}x" if base else "-"

    return {
        "tokens/s": lambda row: number(row.tokens_per_second),
        "rounds": lambda row: f"{number(row.slowest)} to {number(row.fastest)}",
        "images/s": lambda row: number(row.images_per_second),
        **{f"to {rival.removesuffix('Cache')}": against(rival) for rival in RIVALS},
    }


STEP_COLUMNS: Columns = {
    "mean": lambda row: number(row.step_ms),
    "median of each quarter": lambda row: ", ".join(map(number, row.quarters_ms)),
    "roofline": lambda row: number(row.least_ms),
    "of it": lambda row: f"{100 * row.least_ms / row.step_ms:.3g}%" if row.step_ms else "-",
}

MEMORY_COLUMNS: Columns = {
    "K and V": lambda row: size(row.key_value),
    "beside": lambda row: size(row.bookkeeping),
    "peak": lambda row: "-" if row.peak is None else size(row.peak),
}


def condition_lines(report: Report) -> list[str]:
    """The conditions and the machine's speeds, a line each."""
    facts = report.conditions | {
        "weights": size(report.conditions["weights"]),
        "roofline": f"{size(report.machine.copy_speed)}/s copied, {report.machine.matrix_speed / 1e12:.3g} TFLOP/s in "
        "matrix products",
    }
    return [f"{name}: {value}" for name, value in facts.items() if value is not None]


def to_markdown(report: Report) -> str:
    """Return the whole report as a Markdown page."""
    conditions = "\n".join(f"- {escape(line)}" for line in condition_lines(report))
    parts = [f"# {escape(report.conditions['model'])}", conditions, code_block(report.command, "bash")]
    for cells in all_tables(report):
        parts += [f"## {escape(cells.title)}", table(cells.heads, cells.rows)]
    return "\n\n".join(parts) + "\n"


def number(value: float) -> str:
    """Format with three digits, or with all digits before the point: 0.123, 12.3, 1234."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Format bytes with three digits, in powers of 1000."""
    return tqdm.format_sizeof(num_bytes, "B") if num_bytes >= 1000 else f"{num_bytes:.0f}B"
