"""Scores a folder of sheets: queries a VQA model with every question for every image, then applies the rules.

Raw answers are stored, one prompt per line, so an interrupted run continues where it stopped. It generates nothing;
`rules.py` computes the scores from the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_cache.evaluation.dpg.questions import Question, missing_parents
from ssd_cache.evaluation.dpg.rules import Answers, DPGScore, apply_dependencies, category_scores, prompt_score
from ssd_cache.evaluation.dpg.sheet import NUM_IMAGES, cut_sheet, find_sheets
from ssd_cache.evaluation.judge_models import decode_image
from ssd_cache.evaluation.result_file import append_row, check_settings, read_rows
from ssd_cache.io.showing import ReadableError, first_names
from ssd_cache.io.untrusted import checked_fields

if TYPE_CHECKING:
    from ssd_cache.evaluation.dpg.vqa import VQAModel

Questions = Mapping[str, Sequence[Question]]
"""Questions by item id, as `read_questions` returns them."""


def score_sheets(
    folder: str | Path,
    questions: Questions,
    vqa: VQAModel,
    side: int,
    *,
    item_ids: Iterable[str] | None = None,
    official: bool = False,
    results: str | Path | None = None,
    on_prompt: Callable[[str], object] | None = None,
) -> DPGScore:
    """Query the VQA model with every question for every image of every sheet, and score the answers.

    An incomplete or damaged sheet is listed in `unreadable`, and the run continues. Unless `official`, missing sheets
    and questions raise an error before the first question.

    Args:
        folder: folder of the sheets, one per prompt, named by item id; see `write_sheet`.
        questions: questions by item id, as `read_questions` returns them.
        vqa: the model that answers the questions.
        side: side of one image in pixels, 384 for Janus-Pro.
        item_ids: the prompts to score. Default: all prompts that have questions.
        official: reproduce the official script. Prompts without a sheet or without questions, and those with a question
            whose parent is absent, are dropped from every mean. Category scores use only the last crop. Read the
            questions with `official=True` too.
        results: file of JSON lines to write: first the settings, then one line per prompt with its raw answers, its
            scores after the dependency rule, and its score. If the file exists, prompts with unchanged image and
            questions are taken from it, and unreadable ones are tried again.
        on_prompt: called with each item id that was tried, for a progress bar.

    Raises:
        ValueError: a sheet is missing, has no questions or has the wrong size, the results belong to other settings, or
            no prompt can be scored.
        OSError: results cannot be written.
    """
    name = f"DPG rules (VQA = {vqa.name})" + (", official quirks" if official else "")
    sheets = find_sheets(folder)
    wanted = list(dict.fromkeys(questions if item_ids is None else item_ids))
    dropped: dict[str, str] = {}
    if official:
        if item_ids is None:
            wanted += [item_id for item_id in sheets if item_id not in questions]
        dropped = {item_id: why for item_id in wanted if (why := _why_dropped(item_id, sheets, questions))}
    else:
        check_complete(folder, questions, wanted)
    path = None if results is None else Path(results)
    earlier = read_results(path, {"name": name, "side": side, "official": official})
    answers: dict[str, Answers] = {}
    unreadable: dict[str, str] = {}
    for item_id in (item_id for item_id in wanted if item_id not in dropped):
        asked, content = questions[item_id], sheets[item_id].read_bytes()
        key = hashlib.sha256(repr(tuple(asked)).encode() + b"\0" + content).hexdigest()
        row = earlier.get(item_id, {})
        if row.get("key") != key or list(map(len, row["answers"])) != [len(asked)] * NUM_IMAGES:
            try:
                sheet = decode_image(content)
            except ValueError as error:
                row = {"item_id": item_id, "unreadable": f"{sheets[item_id]}: {error}"}
            else:
                crops = cut_sheet(sheet, side, str(sheets[item_id]))
                row = _row(item_id, key, [vqa.answers(crop, [one.text for one in asked]) for crop in crops], asked)
            append_row(path, row)
        if "unreadable" in row:
            unreadable[item_id] = row["unreadable"]
        else:
            answers[item_id] = [list(map(bool, crop)) for crop in row["answers"]]
        if on_prompt is not None:
            on_prompt(item_id)
    if not answers:
        why = next(iter([*unreadable.values(), *dropped.values()]), "there are no questions")
        raise ReadableError(f"none of {len(wanted)} prompts of {folder} can be scored ({why})")
    answered = [(questions[item_id], crops[-1:] if official else crops) for item_id, crops in answers.items()]
    return DPGScore(
        name=name,
        prompts={item_id: prompt_score(_counted(crops, questions[item_id])) for item_id, crops in answers.items()},
        level1=category_scores(answered, lambda question: question.broad),
        level2=category_scores(answered, lambda question: question.category),
        num_prompts=len(wanted),
        dropped=dropped,
        unreadable=unreadable,
        answers=answers,
        is_official=official,
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


def read_results(path: Path | None, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows with answers of an earlier run with the same settings, by item id; begins the file if there is none.

    Raises:
        WrongFileError: the file holds something else, or results of another run.
    """

    def check(number: int, row: dict[str, Any]) -> dict[str, Any]:
        if number == 1:
            check_settings(row, settings)
            return row
        answered = {"answers": list[list[int | bool]], "key": str} if "answers" in row else {}
        return checked_fields({"item_id": str, **answered}, row)

    rows = read_rows(path, check)
    if not rows:
        append_row(path, settings)
    return {row["item_id"]: row for row in rows if "answers" in row}


def _row(item_id: str, key: str, answers: Answers, questions: Sequence[Question]) -> dict[str, Any]:
    """The row of a prompt in the file of results."""
    counted = _counted(answers, questions)
    return {
        "item_id": item_id,
        "key": key,
        "answers": [list(map(int, crop)) for crop in answers],
        "scores": [list(map(int, crop)) for crop in counted],
        "score": prompt_score(counted),
    }


def _counted(answers: Answers, questions: Sequence[Question]) -> list[list[bool]]:
    return [apply_dependencies(crop, questions) for crop in answers]


def _why_dropped(item_id: str, sheets: Mapping[str, Path], questions: Questions) -> str:
    """The reason why the official script drops an item; empty if it does not."""
    if item_id not in questions:
        return "no questions"
    if missing := missing_parents(questions[item_id]):
        return f"no question {', '.join(missing)}, on which others depend"
    return "" if item_id in sheets else "no image"
