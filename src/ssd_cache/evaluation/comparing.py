"""Compares results of one benchmark: every results.jsonl against the first, with a test of each difference.

A file is read completely or refused with the line at fault, since a difference is meaningful only over complete sets.
Which policy generated which images is not known here; the user who names the files knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES, Difference, to_json
from ssd_cache.evaluation.scoring import RESULTS_FILE, check_line
from ssd_cache.io.showing import ReadableError, differences, shown
from ssd_cache.io.untrusted import read_json_lines

OVERALL = "overall"


@dataclass(frozen=True)
class PromptResults:
    """The content of one file: the judge with its settings, and the number of results of every prompt.

    `strata` has the mean result of each prompt, by tag. The key of a prompt contains everything that its images are
    judged on.
    """

    path: Path
    judge: dict[str, Any]
    strata: dict[str, dict[str, float]]
    num_results: int

    @property
    def prompts(self) -> set[tuple[str, str]]:
        """Tag and key of all prompts."""
        return {(tag, prompt) for tag, results in self.strata.items() for prompt in results}


@dataclass(frozen=True)
class Row:
    """One result of one file.

    Attributes:
        task: `OVERALL`, or one of GenEval's tags.
        results: short name of the file: the parts of its path that differ from the other paths. For example `full` and
            `ssd-20` for `full/results/results.jsonl` and `ssd-20/results/results.jsonl`.
        score: for GenEval the share of correct images, and overall the mean of the tags; else 0 to 100.
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
            "judge": first.judge,
            "files": [str(file.path) for file in self.files],
            "num_prompts": len(first.prompts),
            "num_results": first.num_results,
            "num_resamples": NUM_RESAMPLES,
            "rows": [to_json(row) for row in self.rows],
        }


def compare_results(paths: Sequence[str | Path]) -> Comparison:
    """Compute the scores of two or more files, and the paired difference of each from the first.

    Prompts are resampled 10,000 times with replacement, with all their images, and within each tag of GenEval. A
    resample holds the same prompts of both files, so the difficulty of a prompt does not affect a difference.

    Raises:
        ValueError: fewer than two files, a file that cannot be read (see `read_results`), or files with different
            judges, prompts or numbers of images.
    """
    if len(paths) < 2:
        raise ValueError(f"{len(paths)} file(s) of results: give two or more; the others are compared with the first")
    first, *others = files = [read_results(path) for path in paths]
    for other in others:
        _check_alike(first, other)
    names = _short_names([file.path for file in files])
    tasks = {OVERALL: list(first.strata)}
    if len(first.strata) > 1:
        tasks |= {tag: [tag] for tag in first.strata}
    rows = []
    for task, tags in tasks.items():
        results = [{tag: file.strata[tag] for tag in tags} for file in files]
        for name, found in zip(names, results, strict=True):
            difference = None if found is results[0] else bootstrap.compare(found, results[0])
            rows.append(Row(task, name, bootstrap.mean(found), bootstrap.standard_error(found), difference))
    return Comparison(tuple(files), tuple(rows))


def read_results(path: str | Path) -> PromptResults:
    """Read the results of a file, or of the `results.jsonl` in a folder. Of two lines about a file the later counts.

    Raises:
        ValueError: no such file, a file that no scorer wrote, a damaged or incomplete line, lines of several judges,
            or prompts with unequal numbers of results.
    """
    path = Path(path)
    if path.is_dir():
        path /= RESULTS_FILE
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        problem = f"{path}: cannot be read ({error.strerror})" if isinstance(error, OSError) else error
        raise ReadableError(f"{problem}; give a complete {RESULTS_FILE} of an `ssd-cache eval ... score`") from error


def _read(path: Path) -> PromptResults:
    files: dict[str, dict[str, Any]] = {}
    for place, line in read_json_lines(path):
        try:
            files[check_line(line)["filename"]] = line
            judge = next(iter(files.values()))["judge"]
            if differing := differences(judge, line["judge"], ("before", "here")):
                raise ReadableError(f"another judge than in the lines before ({differing})")
        except ValueError as error:
            raise ReadableError(f"{place}: {error}") from error
    results: dict[str, dict[str, list[float]]] = {}
    for line in files.values():
        results.setdefault(line["tag"], {}).setdefault(line["metadata"], []).append(line["result"])
    numbers = sorted({len(found) for prompts in results.values() for found in prompts.values()})
    if len(numbers) != 1:  # else the mean over prompts would not be the mean over images
        what = f"{numbers[0]} to {numbers[-1]} results of a prompt" if numbers else "no result of a prompt"
        raise ReadableError(f"{path}: {what}; run the score command to its end")
    means = {
        tag: {prompt: sum(found) / len(found) for prompt, found in prompts.items()} for tag, prompts in results.items()
    }
    return PromptResults(path, judge, means, numbers[0])


def _check_alike(first: PromptResults, other: PromptResults) -> None:
    """Refuse a file that is not comparable to the first."""
    wanted, found = ({**file.judge, "results of a prompt": file.num_results} for file in (first, other))
    if differing := differences(wanted, found, ("there", "here")):
        raise ReadableError(f"{other.path}: not comparable with {first.path} ({differing}); score both in the same way")
    if changed := sorted(first.prompts ^ other.prompts):
        raise ReadableError(
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
