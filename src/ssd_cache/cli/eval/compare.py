"""`ssd-cache eval compare`: differences between scored folders of GenEval or DPG-Bench, with an interval and p.

Options and the table. `ssd_cache.evaluation.comparing` holds the statistics and checks that files are comparable.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, refusing
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES
from ssd_cache.evaluation.comparing import Comparison, Row, compare_results
from ssd_cache.evaluation.prompt_scores import GENEVAL
from ssd_cache.evaluation.tables import TOO_FEW, interval_text, p_text


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more results.jsonl, or their folders; the others are compared with the first.",
            metavar="RESULTS",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write comparison.md and .json into this folder.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Test differences between scored folders of GenEval or DPG-Bench.

    Reads the results of `eval geneval score` or `eval dpg score`. Prints every
    score with its standard error, and its difference from the first score with a
    95% interval and p, by a paired bootstrap over prompts.
    """
    with refusing():
        if output is not None:
            check_place("--output", output, is_folder=True)
        comparison = compare_results(results)
    report, console = _report(comparison), Console(highlight=False, markup=False)
    if output is None:
        report.show(console)
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        print_and_save(report, output, console, "comparison")
    except OSError as error:
        raise Failure(
            f"{output} can not be written ({error.strerror}): make room, and run the command again"
        ) from error


def _report(comparison: Comparison) -> Report:
    first = comparison.files[0]
    digits, within = (3, " within each tag") if first.benchmark == GENEVAL else (2, "")
    judge = "; ".join(f"{name} {value}" for name, value in first.judge.items())
    return Report(
        title=f"{first.benchmark}: differences from {comparison.rows[0].results}",
        columns=("results", "of", "score", "s.e.", "difference", "95% interval", "p"),
        rows=[_cells(row, digits) for row in comparison.rows],
        notes=(
            f"{len(first.prompts)} prompts, {first.num_pictures} pictures each",
            f"paired bootstrap over prompts{within}, {NUM_RESAMPLES} resamples: standard errors, 95% percentile "
            f"intervals, and two-sided p, not corrected for how many there are; {TOO_FEW}",
            f"judged by: {judge}",
            f"files: {', '.join(str(file.path) for file in comparison.files)}",
        ),
        data=comparison.to_dict(),
    )


def _cells(row: Row, digits: int) -> tuple[str, ...]:
    score = (row.results, row.task, f"{row.score:.{digits}f}", f"{row.standard_error:.{digits}f}")
    if row.difference is None:
        return (*score, "", "", "")
    found = row.difference
    return (*score, f"{found.difference:+.{digits}f}", interval_text(found, digits), p_text(found.p))
