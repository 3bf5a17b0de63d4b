"""A report on folders of results: they are read, held against each other, and tables and plot are written.

All from the lines alone, whole or not at all. What the files say is `tables.py`'s and `plots.py`'s.
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
    """What the lines of one or several folders come to, and the lines that could not be read.

    Raises:
        ResultsError: no results, or folders whose conditions differ.
        OSError: a file can not be opened.
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
    """Write results.md, results.json and the plot; returns their paths, and what to install where the plot can not be.

    Raises:
        OSError: they can not be written; older files are as they were.
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
