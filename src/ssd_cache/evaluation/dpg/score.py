"""Scores a folder of sheets: queries a VQA model with every question for every image, then applies DPG-Bench's rules.

The rules are the official script's (ELLA, `compute_dpg_bench.py`), reimplemented. Answers have the form
`[crops][questions]`, with questions in the order of the file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.dpg.folder import NUM_IMAGES, cut_sheet, find_sheets
from ssd_cache.evaluation.dpg.questions import Question, missing_parents
from ssd_cache.evaluation.scoring import judge_files, wrong_line
from ssd_cache.io.showing import ReadableError, first_names

if TYPE_CHECKING:
    from ssd_cache.evaluation.vqa import VQAModel

Questions = Mapping[str, Sequence[Question]]
"""Questions by item id, as `read_questions` returns them."""

Answers = list[list[bool]]
"""Raw answers about one sheet, `[crops][questions]`."""


@dataclass(frozen=True)
class DPGScore:
    """The score of a folder.

    Attributes:
        overall: the DPG score, 0 to 100: the mean over prompts, not over questions.
        standard_error: of `overall`, see `bootstrap.standard_error`; NaN for a single prompt.
        level1: scores of the five broad categories, 0 to 100, sorted by name; computed from raw answers.
        level2: scores of the finer categories, in the same form.
        prompts: scores by item id, 0 to 100.
        dropped: item ids excluded from all means, with the reason; only with the official quirks.
        answers: raw answers by item id, `[crops][questions]`.
        judge: the scorer and its settings.
    """

    overall: float
    standard_error: float
    level1: dict[str, float]
    level2: dict[str, float]
    prompts: dict[str, float]
    dropped: dict[str, str]
    answers: dict[str, Answers]
    judge: dict[str, Any]


def score_sheets(
    folder: str | Path,
    questions: Questions,
    vqa: VQAModel,
    *,
    item_ids: Iterable[str] | None = None,
    official: bool = False,
    results_file: str | Path | None = None,
    on_sheet: Callable[[], object] | None = None,
) -> DPGScore:
    """Query the VQA model with every question for every image of every sheet, and score the answers.

    Args:
        folder: folder of the sheets, one per prompt, named by item id; see `write_sheet`.
        questions: questions by item id, as `read_questions` returns them.
        vqa: the model that answers the questions.
        item_ids: the prompts to score. Default: all prompts that have questions.
        official: reproduce the official script. A prompt is dropped from every mean if it has no sheet or no questions,
            or if one of its questions names a parent question that the file lacks. Category scores use only the last
            image of each sheet. Read the questions with `official=True` too.
        results_file: file of JSON lines, one per sheet, with its raw answers and its score. If it exists, sheets whose
            images and questions are unchanged are not scored again.
        on_sheet: called after every sheet, for a progress bar.

    Raises:
        ValueError: a sheet is missing, cannot be read, has no questions or is not square, the results belong to other
            settings or are damaged, or no prompt can be scored.
        OSError: results cannot be written.
    """
    sheets = find_sheets(folder)
    wanted = list(dict.fromkeys(questions if item_ids is None else item_ids))
    dropped: dict[str, str] = {}
    if official:
        if item_ids is None:
            wanted += [item_id for item_id in sheets if item_id not in questions]
        dropped = {item_id: why for item_id in wanted if (why := _why_dropped(item_id, sheets, questions))}
    else:
        check_complete(folder, questions, wanted)
    wanted = [item_id for item_id in wanted if item_id not in dropped]
    if not wanted:
        raise ReadableError(f"{folder}: no prompt can be scored ({next(iter(dropped.values()), 'no questions')})")
    files = []
    for item_id in wanted:
        asked = json.dumps({"item_id": item_id, "questions": [asdict(one) for one in questions[item_id]]})
        files.append((sheets[item_id], {"filename": sheets[item_id].name, "tag": "prompts", "metadata": asked}))

    def ask(number: int, sheet: Image.Image) -> dict[str, Any]:
        asked = questions[wanted[number]]
        crops = cut_sheet(sheet, str(files[number][0]))
        answers = [vqa.answers(crop, [one.text for one in asked]) for crop in crops]
        return {
            "answers": [list(map(int, crop)) for crop in answers],
            "result": 100 * prompt_score([apply_dependencies(crop, asked) for crop in answers]),
        }

    scorer = f"DPG rules (VQA = {vqa.name})" + (", official quirks" if official else "")
    judge = {"benchmark": "DPG-Bench", "scorer": scorer, "official": official}
    judged = judge_files(files, ask, judge, results_file, on_sheet, {"answers": list[list[int]]})
    lines = dict(zip(wanted, judged, strict=True))
    for item_id, line in lines.items():
        number = len(questions[item_id])
        if list(map(len, line["answers"])) != [number] * NUM_IMAGES:
            raise wrong_line(results_file, line, f"has no answers to {number} questions about {NUM_IMAGES} images")
    answers = {item_id: [list(map(bool, crop)) for crop in line["answers"]] for item_id, line in lines.items()}
    answered = [(questions[item_id], crops[-1:] if official else crops) for item_id, crops in answers.items()]
    prompts = {item_id: line["result"] for item_id, line in lines.items()}
    return DPGScore(
        overall=statistics.fmean(prompts.values()),
        standard_error=bootstrap.standard_error({"prompts": prompts}),
        level1=category_scores(answered, lambda question: question.broad),
        level2=category_scores(answered, lambda question: question.category),
        prompts=prompts,
        dropped=dropped,
        answers=answers,
        judge=judge,
    )


def check_complete(folder: str | Path, questions: Questions, item_ids: Iterable[str] | None = None) -> None:
    """Reject a folder that the official script would score only in part, without a warning.

    The arguments are those of `score_sheets`.

    Raises:
        ValueError: a sheet is missing or has no questions, or its questions are incomplete.
    """
    sheets = find_sheets(folder)
    wanted = list(dict.fromkeys(questions if item_ids is None else item_ids))
    if missing := [item_id for item_id in wanted if item_id not in sheets]:
        raise ReadableError(
            f"{folder} has {len(wanted) - len(missing)} of {len(wanted)} sheets; missing: {first_names(missing)}; "
            "generate them, or name those to score in item_ids"
        )
    if unknown := [item_id for item_id in sheets if item_id not in questions]:
        raise ReadableError(f"{folder} has images without questions: {first_names(unknown)}; remove them")
    if reasons := [f"{item_id}: {why}" for item_id in wanted if (why := _why_dropped(item_id, sheets, questions))]:
        raise ReadableError(
            f"{len(reasons)} items cannot be scored ({first_names(reasons)}); give a complete question file"
        )


def _why_dropped(item_id: str, sheets: Mapping[str, Path], questions: Questions) -> str:
    """The reason why the official script drops an item; empty if it does not."""
    if item_id not in questions:
        return "no questions"
    if missing := missing_parents(questions[item_id]):
        return f"no question {', '.join(missing)}, on which others depend"
    return "" if item_id in sheets else "no image"


def apply_dependencies(answers: Sequence[bool], questions: Sequence[Question]) -> list[bool]:
    """Which questions about one crop count: those answered with yes whose parents count.

    The rule is applied in file order and in place, with the current values of the parents. So a "no" cascades down a
    chain whose parents are listed first. It does not reach a child that is listed before its parent is zeroed. Example
    for the chain 1 <- 2 <- 3: "no yes yes" gives 0 0 0; listed as 1, 3, 2 the same answers give 0 1 0.
    """
    counts = {question.proposition_id: bool(answer) for question, answer in zip(questions, answers, strict=True)}
    for question in questions:
        if not all(counts[parent] for parent in question.parents):
            counts[question.proposition_id] = False
    return [counts[question.proposition_id] for question in questions]


def prompt_score(counted: Sequence[Sequence[bool]]) -> float:
    """Mean over the crops of a prompt of the share of questions that count, from `apply_dependencies` of each crop."""
    return sum(sum(crop) / len(crop) for crop in counted) / len(counted)


def category_scores(
    answered: Iterable[tuple[Sequence[Question], Answers]], category_of: Callable[[Question], str]
) -> dict[str, float]:
    """Percentage of raw yes over all questions of each category, sorted by name, from every prompt's raw answers."""
    by_category: dict[str, list[bool]] = {}
    for questions, crops in answered:
        for crop in crops:
            for question, answer in zip(questions, crop, strict=True):
                by_category.setdefault(category_of(question), []).append(answer)
    return {name: 100 * statistics.fmean(by_category[name]) for name in sorted(by_category)}
