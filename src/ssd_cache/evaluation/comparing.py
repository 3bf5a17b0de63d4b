"""Compares results of GenEval or DPG-Bench: every file against the first, with a test of each difference.

It refuses files that are not comparable. It does not know which policy generated which images; the user who names the
files does. `prompt_scores.py` reads the files, `bootstrap.py` has the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssd_cache.evaluation.bootstrap import (
    NUM_RESAMPLES,
    Difference,
    bootstrap_difference,
    bootstrap_error,
    stratified_mean,
)
from ssd_cache.evaluation.prompt_scores import PromptScores, differing, read_prompt_scores

OVERALL = "overall"


@dataclass(frozen=True)
class Row:
    """One score of one file.

    Attributes:
        task: `OVERALL`, or one of GenEval's tags.
        results: short name of the file: the parts of its path that differ from the other paths. For example `full` and
            `ssd-20` for `full/results/results.jsonl` and `ssd-20/results/results.jsonl`.
        score: for GenEval the share of correct images, and overall the mean of the tags; for DPG-Bench 0 to 100.
        standard_error: of the score, by bootstrap over prompts.
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

    files: tuple[PromptScores, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison without the scores of single prompts, for a JSON file."""
        first = self.files[0]
        return {
            "benchmark": first.benchmark,
            "judge": first.judge,
            "files": [str(file.path) for file in self.files],
            "num_prompts": len(first.prompts),
            "num_pictures": first.num_pictures,
            "num_resamples": NUM_RESAMPLES,
            "rows": [_finite(asdict(row)) for row in self.rows],
        }


def compare_results(paths: Sequence[str | Path]) -> Comparison:
    """Scores of two or more files, and the paired differences of all against the first.

    Prompts are resampled 10,000 times with replacement, with all their images, and within each tag of GenEval. A
    resample holds the same prompts of both files, so the difficulty of a prompt does not affect a difference.

    Raises:
        ValueError: fewer than two files, a file that cannot be read (see `read_prompt_scores`) or is given twice, files
            with different benchmarks, judges, prompts or numbers of images, or a tag with a single prompt.
    """
    if len(paths) < 2:
        raise ValueError(
            f"{len(paths)} file(s) of results: give two or more; the first is what the others are held against"
        )
    files: list[PromptScores] = []
    for path in paths:
        file = read_prompt_scores(path)
        if any(file.path.samefile(other.path) for other in files):
            raise ValueError(f"{file.path}: given twice; give the results of another folder of pictures")
        if files:
            _check_alike(files[0], file)
        files.append(file)
    first = files[0]
    for stratum, of_prompts in first.strata.items():
        if len(of_prompts) < 2:
            raise ValueError(
                f"{first.path}: 1 prompt of {stratum}, and chance is told from how prompts differ; score two or more"
            )
    names = _short_names([file.path for file in files])
    tasks = {OVERALL: list(first.strata)}
    if len(first.strata) > 1:
        tasks |= {stratum: [stratum] for stratum in first.strata}
    return Comparison(
        files=tuple(files),
        rows=tuple(
            _row(task, name, strata, file, first)
            for task, strata in tasks.items()
            for name, file in zip(names, files, strict=True)
        ),
    )


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _row(task: str, name: str, strata: Sequence[str], file: PromptScores, first: PromptScores) -> Row:
    scores = [list(file.strata[stratum].values()) for stratum in strata]
    difference = None
    if file is not first:
        difference = bootstrap_difference(
            [
                [file.strata[stratum][prompt] - score for prompt, score in first.strata[stratum].items()]
                for stratum in strata
            ],
            num_pictures=sum(map(len, scores)) * file.num_pictures,
        )
    return Row(task, name, stratified_mean(scores), bootstrap_error(scores), difference)


def _check_alike(first: PromptScores, other: PromptScores) -> None:
    """Refuse a file that is not comparable to the first."""
    if first.benchmark != other.benchmark:
        raise ValueError(
            f"{other.path}: results of {other.benchmark}, but {first.path} is of {first.benchmark}; compare like"
            " with like"
        )
    if first.judge != other.judge:
        raise ValueError(
            f"{other.path}: judged otherwise than {first.path} ({differing(first.judge, other.judge)}); score both "
            "with the same judge and settings"
        )
    missing = [prompt for prompt in first.prompts if prompt not in other.prompts]
    more = [prompt for prompt in other.prompts if prompt not in first.prompts]
    if missing or more:
        raise ValueError(
            f"{other.path}: other prompts than {first.path}: {len(missing)} of its {len(first.prompts)} are missing, "
            f"{len(more)} are more, as {(missing or more)[0][1]}; "
            "score the same prompts and questions, both to the end"
        )
    if first.num_pictures != other.num_pictures:
        raise ValueError(
            f"{other.path}: {other.num_pictures} pictures of each prompt, but {first.path} has {first.num_pictures}; "
            "score as many of both"
        )


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Paths without the leading and trailing parts that all share; at least one part of each path remains."""
    parts = [list(path.parts) for path in paths]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({names[end] for names in parts}) == 1:
            for names in parts:
                del names[end]
    return [str(Path(*names)) for names in parts]
