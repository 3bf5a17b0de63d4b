"""`ssd-cache eval report`: recreate tables and plot from the lines of results.

Options only. Reading and writing are in `ssd_cache.evaluation.tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, refusing
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import output_option
from ssd_cache.evaluation.tables import accuracy_table, difference_table, read_summary, write_report


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of results with the same conditions.",
            metavar="DIR",
            show_default=False,
            exists=True,
            file_okay=False,
        ),
    ],
    output: Annotated[
        Path | None,
        output_option("Output folder of the report.", "FOLDER", default="the first DIR"),
    ] = None,
) -> None:
    """Make tables and a plot from the lines of one or several runs.

    Writes results.md, results.json and score-by-budget.png, and prints the
    tables.
    """
    place = output or folders[0]
    check_place("--output", place, is_folder=True)
    finish(folders, place)


def finish(folders: Sequence[Path], output: Path) -> None:
    """Write a report and print its tables; lines that cannot be used are named, and the exit code is then 1."""
    with refusing():
        summary, problems = read_summary(folders)
    for problem in problems:
        typer.echo(f"ssd-cache: {problem}", err=True)
    paths, remedy = write_report(summary, output)
    console = Console(highlight=False, markup=False)
    tables = [accuracy_table(summary), *([difference_table(summary)] if summary.comparisons else [])]
    console.print("\n\n".join(tables), soft_wrap=True)
    console.print(f"\nwrote {', '.join(path.name for path in paths)} in {output}", soft_wrap=True)
    if remedy:
        typer.echo(f"ssd-cache: {remedy}", err=True)
    if problems:
        raise Failure(f"{len(problems)} line(s) of results could not be used and are left out: they are named above")
