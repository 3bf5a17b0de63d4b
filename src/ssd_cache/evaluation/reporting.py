"""Reports on results folders: reads them, checks that they are comparable, and writes tables and a plot.

It uses only the result lines. All files are written, or none. `tables.py` and `plots.py` define their content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

from ssd_cache.evaluation.plots import draw_score_by_budget
from ssd_cache.evaluation.records import Problem, read_records
from ssd_cache.evaluation.results_folder import ResultsError, merge_runs, read_reported_run
from ssd_cache.evaluation.tables import Summary, summarize, to_json, to_markdown
from ssd_cache.io.writing import write_files

TABLE, NUMBERS, PLOT = "results.md", "results.json", "score-by-budget.png"


def read_summary(folders: Sequence[Path]) -> tuple[Summary, list[Problem]]:
    """The summary of one or several folders, and the lines that cannot be read.

    Raises:
        ResultsError: there are no results, or the conditions of the folders differ.
        OSError: a file cannot be opened.
    """
    run = reduce(
        lambda merged, folder: merge_runs(f"{folder} beside {folders[0]}", merged, read_reported_run(folder)),
        folders[1:],
        read_reported_run(folders[0]),
    )
    records, problems = read_records(folders)
    if not records:
        raise ResultsError(
            f"{', '.join(map(str, folders))}: no line of results{' that can be read' if problems else ''}: run "
            "`ssd-cache eval shapes` with this folder as --output"
        )
    return summarize(records, run), problems


def write_report(summary: Summary, folder: Path) -> tuple[list[Path], str]:
    """Write results.md, results.json and the plot; returns their paths, and a remedy if the plot cannot be made.

    Raises:
        OSError: they cannot be written; older files are unchanged.
    """
    contents = {
        folder / TABLE: to_markdown(summary).encode(),
        folder / NUMBERS: (json.dumps(to_json(summary), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode(),
    }
    remedy = ""
    try:
        contents[folder / PLOT] = draw_score_by_budget(summary)
    except ImportError as error:
        remedy = f"no {PLOT}: {error}"
    folder.mkdir(parents=True, exist_ok=True)
    write_files(contents)
    return list(contents), remedy
