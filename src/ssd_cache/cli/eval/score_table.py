"""A table of results: print it on the terminal, and write it as Markdown and as JSON with its data.

It only formats. Numbers and text come from the commands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ssd_cache.evaluation.bootstrap import to_json
from ssd_cache.io.markdown import escape, table
from ssd_cache.io.writing import write_files


@dataclass(frozen=True)
class Report:
    """A table with a title above it, notes below it, and the data of its JSON file."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str]
    data: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the report as Markdown."""
        rows = [list(map(str, row)) for row in self.rows]
        lines = [f"## {escape(self.title)}", "", table(list(self.columns), rows, num_left=len(self.columns)), ""]
        return "\n".join([*lines, *(f"- {escape(note)}" for note in self.notes)]) + "\n"

    def show(self, console: Console) -> None:
        """Print the report on a terminal."""
        grid = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
        for index, name in enumerate(self.columns):
            grid.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        for row in self.rows:
            grid.add_row(*map(str, row))
        console.print(grid)
        for note in self.notes:
            console.print(note, soft_wrap=True)


def print_and_save(report: Report, folder: Path | None, name: str = "summary") -> None:
    """Print a report, and write it into a folder, if there is one, as `<name>.json` and `<name>.md`.

    Raises:
        OSError: the files cannot be written.
    """
    console = Console(highlight=False, markup=False)
    report.show(console)
    if folder is not None:
        data = json.dumps(to_json(dict(report.data)), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_files({folder / f"{name}.json": data.encode(), folder / f"{name}.md": report.markdown().encode()})
        console.print(f"wrote {folder}", soft_wrap=True)
