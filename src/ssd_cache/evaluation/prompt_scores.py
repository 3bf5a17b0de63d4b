"""Reads the score of every prompt from the files of `eval geneval score` and `eval dpg score`.

A file is read completely or refused with the line at fault, since a difference is meaningful only over complete sets.
Nothing is judged again; `comparing.py` compares the files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_cache.evaluation.geneval.names import TAGS
from ssd_cache.io.showing import ReadableError, differences, printable, shown
from ssd_cache.io.untrusted import parse_json

RESULTS_FILE = "results.jsonl"

GENEVAL, DPG = "GenEval", "DPG-Bench"

REMEDY = f"give the {RESULTS_FILE} that `ssd-cache eval geneval score` or `ssd-cache eval dpg score` wrote"


@dataclass(frozen=True)
class PromptScores:
    """Scores of one results file.

    Attributes:
        path: the file.
        benchmark: `GENEVAL` or `DPG`.
        judge: the judge and its settings, by field; scores of different judges cannot be compared.
        strata: scores by prompt, by stratum: for GenEval its tags in their order, 0 to 1; for DPG-Bench "prompts", 0 to
            100. The key of a prompt contains everything that its images are judged on.
        num_pictures: images of each prompt.
    """

    path: Path
    benchmark: str
    judge: dict[str, Any]
    strata: dict[str, dict[str, float]]
    num_pictures: int

    @property
    def prompts(self) -> dict[tuple[str, str], float]:
        """Scores by stratum and prompt."""
        return {(name, prompt): score for name, scores in self.strata.items() for prompt, score in scores.items()}


def read_prompt_scores(path: str | Path) -> PromptScores:
    """Read the scores of a file, or of the `results.jsonl` in a folder.

    Raises:
        ValueError: no such file, a file that no scorer wrote, a damaged or incomplete line, an image that the scorer
            could not read, or prompts with unequal numbers of images.
    """
    path = Path(path)
    if path.is_dir():
        path /= RESULTS_FILE
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ReadableError(f"{path}: can not be read ({error.strerror}); {REMEDY}") from error
    except UnicodeDecodeError as error:
        raise ReadableError(f"{path}: not UTF-8 text (byte {error.start}); {REMEDY}") from error
    rows = [_object(path, number, line) for number, line in enumerate(text.removesuffix("\n").split("\n"), 1) if text]
    if rows and "scorer" in rows[0]:
        return _geneval(path, rows)
    if rows and "official" in rows[0]:
        return _dpg(path, rows[0], rows[1:])
    raise ReadableError(f"{path}: no results of single prompts of GenEval or DPG-Bench in it; {REMEDY}")


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Text that lists the fields in which two judges differ, with both values."""
    return differences(first, second, ("there", "here"))


def _geneval(path: Path, rows: list[dict[str, Any]]) -> PromptScores:
    """Read one line per image, see `geneval.ImageResult`."""
    correct: dict[str, dict[str, list[bool]]] = {tag: {} for tag in TAGS}
    lines: dict[str, int] = {}
    judge = _geneval_judge(path, 1, rows[0])
    for number, row in enumerate(rows, 1):
        tag, prompt, filename = (_field(path, number, row, name, str) for name in ("tag", "metadata", "filename"))
        if tag not in correct:
            raise ReadableError(f"{path}, line {number}: tag={shown(tag)}; GenEval's are {', '.join(TAGS)}")
        if not _field(path, number, row, "readable", bool):
            raise _unreadable(path, number, printable(filename, 200))
        if (other := _geneval_judge(path, number, row)) != judge:
            raise ReadableError(
                f"{path}, line {number}: judged by others than line 1 ({differing(judge, other)}); score its pictures "
                "anew"
            )
        if (first := lines.setdefault(filename, number)) != number:
            raise ReadableError(
                f"{path}, line {number}: {printable(filename, 200)} again, after line {first}; run the score command "
                "once more, which ends what was interrupted"
            )
        correct[tag].setdefault(prompt, []).append(_field(path, number, row, "correct", bool))
    counts = {prompt: len(of_prompt) for prompts in correct.values() for prompt, of_prompt in prompts.items()}
    strata = {
        tag: {prompt: sum(of_prompt) / len(of_prompt) for prompt, of_prompt in prompts.items()}
        for tag, prompts in correct.items()
        if prompts
    }
    return PromptScores(path, GENEVAL, judge, strata, _num_pictures(path, counts))


def _geneval_judge(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    settings = _field(path, number, row, "settings", dict)
    return {"scorer": _field(path, number, row, "scorer", str), **settings}


def _dpg(path: Path, judge: dict[str, Any], rows: list[dict[str, Any]]) -> PromptScores:
    """Read one line per prompt, see `dpg.score_sheets`; of two lines about one prompt the later one counts."""
    _field(path, 1, judge, "name", str)
    last = {_field(path, number, row, "item_id", str): (number, row) for number, row in enumerate(rows, 2)}
    if not last:
        raise ReadableError(f"{path}: only settings, no prompt's score; run the score command to its end")
    scores, counts = {}, {}
    for item_id, (number, row) in last.items():
        if "unreadable" in row:
            raise _unreadable(path, number, f"the sheet of {printable(item_id, 200)}")
        answers = _field(path, number, row, "answers", list)
        asked = {len(crop) if isinstance(crop, list) else 0 for crop in answers}
        score = _field(path, number, row, "score", int, float)
        if len(asked) != 1 or 0 in asked:
            raise ReadableError(
                f"{path}, line {number}: answers={shown(answers, 60)}, expected as many to every picture"
            )
        if not 0 <= score <= 1:
            raise ReadableError(f"{path}, line {number}: score={score}, expected 0 to 1")
        # the key includes the number of questions: a re-packed prompt file may have lost one
        prompt = f"{item_id} ({asked.pop()} questions)"
        scores[prompt], counts[prompt] = 100 * score, len(answers)
    return PromptScores(path, DPG, judge, {"prompts": scores}, _num_pictures(path, counts))


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ReadableError(f"{path}, line {number}: not JSON, or cut short ({error}); {REMEDY}, whole") from error
    if not isinstance(row, dict):
        raise ReadableError(f"{path}, line {number}: a {type(row).__name__}, expected an object; {REMEDY}")
    return row


def _field(path: Path, number: int, row: Mapping[str, Any], name: str, *types: type) -> Any:
    value = row.get(name)
    if type(value) not in types:
        found = f"{name}={shown(value)}" if name in row else f"{name!r} is missing"
        expected = " or ".join(kind.__name__ for kind in types)
        raise ReadableError(f"{path}, line {number}: {found}, expected {expected}; {REMEDY}")
    return value


def _unreadable(path: Path, number: int, what: str) -> ReadableError:
    return ReadableError(
        f"{path}, line {number}: {what} could not be read when it was scored; draw it again and run the score command "
        "once more"
    )


def _num_pictures(path: Path, counts: Mapping[str, int]) -> int:
    """Number of images of every prompt; if it varies, the mean over prompts is not the mean over images."""
    (usual, _), *others = Counter(counts.values()).most_common()
    if others:
        prompt, number = next((prompt, number) for prompt, number in counts.items() if number != usual)
        raise ReadableError(
            f"{path}: {usual} pictures of most prompts, but {number} of {printable(prompt, 200)}; run the score "
            "command to its end"
        )
    return usual
