"""Compares results of GenEval or DPG-Bench: every file against the first, with a test of each difference.

It refuses files that are not comparable. It does not know which policy generated which images; the user who names the
files does. `prompt_results.py` reads the files, `bootstrap.py` has the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES, Difference, to_json
from ssd_cache.evaluation.prompt_results import PromptResults, read_prompt_results
from ssd_cache.io.showing import differences, shown

OVERALL = "overall"


@dataclass(frozen=True)
class Row:
    """One result of one file.

    Attributes:
        task: `OVERALL`, or one of GenEval's tags.
        results: short name of the file: the parts of its path that differ from the other paths. For example `full` and
            `ssd-20` for `full/results/results.jsonl` and `ssd-20/results/results.jsonl`.
        score: for GenEval the share of correct images, and overall the mean of the tags; for DPG-Bench 0 to 100.
        standard_error: of the score, from the spread between prompts; NaN if a tag has a single prompt.
        difference: score minus that of the first file; None for the first file.
    """

    task: str
    results: str
    score: float
    standard_error: float
    difference: Difference | None


@dataclass(frozen=True)
class Comparison:
    """All rows, overall first, and the compared files, in the order given."""

    files: tuple[PromptResults, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison without the results of single prompts, for a JSON file."""
        first = self.files[0]
        return {
            "benchmark": first.benchmark,
            "judge": first.judge,
            "files": [str(file.path) for file in self.files],
            "num_prompts": len(first.prompts),
            "num_pictures": first.num_images,
            "num_resamples": NUM_RESAMPLES,
            "rows": [to_json(row) for row in self.rows],
        }


def compare_results(paths: Sequence[str | Path]) -> Comparison:
    """Scores of two or more files, and the paired differences of all against the first.

    Prompts are resampled 10,000 times with replacement, with all their images, and within each tag of GenEval. A
    resample holds the same prompts of both files, so the difficulty of a prompt does not affect a difference.

    Raises:
        ValueError: fewer than two files, a file that cannot be read (see `read_prompt_results`), or files with
            different benchmarks, judges, prompts or numbers of images.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} file(s) of results: give two or more; the others are compared with the first")
    first, *others = files = [read_prompt_results(path) for path in paths]
    for other in others:
        _check_alike(first, other)
    names = _short_names([file.path for file in files])
    tasks = {OVERALL: list(first.strata)}
    if len(first.strata) > 1:
        tasks |= {stratum: [stratum] for stratum in first.strata}
    rows = []
    for task, strata in tasks.items():
        results = [{stratum: file.strata[stratum] for stratum in strata} for file in files]
        for name, found in zip(names, results, strict=True):
            difference = None if found is results[0] else bootstrap.compare(found, results[0])
            rows.append(Row(task, name, bootstrap.mean(found), bootstrap.standard_error(found), difference))
    return Comparison(tuple(files), tuple(rows))


def _check_alike(first: PromptResults, other: PromptResults) -> None:
    """Refuse a file that is not comparable to the first."""
    wanted, found = (
        {"benchmark": file.benchmark, **file.judge, "images of a prompt": file.num_images} for file in (first, other)
    )
    if differing := differences(wanted, found, ("there", "here")):
        raise ValueError(f"{other.path}: not comparable with {first.path} ({differing}); score both in the same way")
    if changed := sorted(first.prompts ^ other.prompts):
        raise ValueError(
            f"{other.path}: other prompts or questions than {first.path}: {len(changed)} are in one of them only, "
            f"such as {shown(changed[0][1])}; score the same prompts, both to the end"
        )


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Paths without the leading and trailing parts that all share; at least one part of each path remains."""
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({names[end] for names in parts}) == 1:
            for names in parts:
                del names[end]
    return [str(Path(*names)) for names in parts]
