"""Reports on results folders: reads them, checks that they are comparable, and writes tables and a plot.

It uses only the result lines. All files are written, or none. `tables.py` and `plots.py` define their content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ssd_cache.evaluation.plots import plot_result_by_budget
from ssd_cache.evaluation.records import read_records
from ssd_cache.evaluation.results_folder import ResultsError, merge_runs, read_run
from ssd_cache.evaluation.tables import Summary, summarize, to_json, to_markdown
from ssd_cache.io.writing import write_files

TABLE, NUMBERS, PLOT = "results.md", "results.json", "score-by-budget.png"


def read_summary(folders: Sequence[Path]) -> tuple[Summary, list[str]]:
    """The summary of one or several folders, and a message for each line that cannot be read.

    Raises:
        ResultsError: there are no results, or the conditions of the folders differ.
    """
    first, *others = folders
    run = read_run(first)
    for folder in others:
        run = merge_runs(f"{folder} beside {first}", run, read_run(folder))
    records, problems = read_records(folders)
    if not records:
        raise ResultsError(
            f"{', '.join(map(str, folders))}: no readable line of results: run `ssd-cache eval shapes` with this "
            "folder as --output"
        )
    return summarize(records, run), problems


def write_report(summary: Summary, folder: Path) -> tuple[list[Path], str]:
    """Write results.md, results.json and the plot; returns their paths, and a remedy if the plot cannot be made."""
    numbers = json.dumps(to_json(summary), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {folder / TABLE: to_markdown(summary).encode(), folder / NUMBERS: numbers.encode()}
    remedy = ""
    try:
        contents[folder / PLOT] = plot_result_by_budget(summary)
    except ImportError as error:
        remedy = f"no {PLOT}: {error}"
    folder.mkdir(parents=True, exist_ok=True)
    write_files(contents)
    return list(contents), remedy
