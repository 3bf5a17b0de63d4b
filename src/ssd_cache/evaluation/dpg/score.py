"""Scores a folder of sheets: queries a VQA model with every question for every image, then applies the rules.

Raw answers are stored, one prompt per line, so an interrupted run continues where it stopped. It generates nothing;
`rules.py` computes the scores from the answers.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ssd_cache.evaluation.dpg import rules
from ssd_cache.evaluation.dpg.questions import Question
from ssd_cache.evaluation.dpg.reading import DPGError, named
from ssd_cache.evaluation.dpg.result_file import Answers, ResultFile
from ssd_cache.evaluation.dpg.sheet import PICTURES, check_side, cut_sheet, find_sheets
from ssd_cache.io.writing import write_files

if TYPE_CHECKING:
    from ssd_cache.evaluation.dpg.vqa import VQAModel


@dataclass(frozen=True)
class DPGResult:
    """The result of a run.

    Attributes:
        name: "DPG rules (VQA = ...)", followed by ", official quirks" if they were applied.
        score: overall score, its standard error, prompt and category scores, and the prompts dropped by the quirks.
        answers: raw answers by item id.
        unreadable: item ids whose image could not be read, with the reason; they are excluded from all means.
        num_prompts: number of prompts to score.
        is_official: whether the quirks of the official script were applied.
    """

    name: str
    score: rules.DPGScore
    answers: dict[str, Answers]
    unreadable: dict[str, str]
    num_prompts: int
    is_official: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether the mean includes every prompt to score."""
        return len(self.score.prompts) == self.num_prompts

    def to_dict(self) -> dict[str, Any]:
        """The result without the answers, for JSON."""
        return {
            "name": self.name,
            "overall": self.score.overall,
            "standard_error": self.score.standard_error,
            "level1": self.score.level1,
            "level2": self.score.level2,
            "num_prompts": self.num_prompts,
            "num_scored": len(self.score.prompts),
            "is_complete": self.is_complete,
            "dropped": self.score.dropped,
            "unreadable": self.unreadable,
            "prompts": self.score.prompts,
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, atomically."""
        write_files({Path(path): (json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n").encode()})


def score_sheets(
    folder: str | Path,
    questions: Mapping[str, Sequence[Question]],
    vqa: VQAModel,
    side: int,
    *,
    item_ids: Iterable[str] | None = None,
    official: bool = False,
    results: str | Path | None = None,
    on_prompt: Callable[[str], object] | None = None,
) -> DPGResult:
    """Query the VQA model with every question for every image of every sheet, and score the answers.

    An incomplete or damaged sheet is listed in `unreadable`, and the run continues. Unless `official`, missing sheets
    and questions raise an error before the first question.

    Args:
        folder: folder of the sheets, one per prompt, named by item id; see `write_sheet`.
        questions: questions by item id, as `read_questions` returns them.
        vqa: the model that answers the questions.
        side: side of one image in pixels, 384 for Janus-Pro.
        item_ids: the prompts to score. Default: all prompts that have questions.
        official: reproduce the official script, see `rules.score_answers`. Prompts without a sheet and sheets without
            questions are dropped as well. Read the questions with `official=True` too.
        results: file of JSON lines to write: first the settings, then one line per prompt with its raw answers, its
            scores after the dependency rule, and its score. If the file exists, prompts with unchanged image and
            questions are taken from it, and unreadable ones are tried again.
        on_prompt: called with each item id that was tried, for a progress bar.

    Raises:
        DPGError: a sheet is missing, has no questions or has the wrong size, the results belong to other settings, or
            no prompt can be scored.
        OSError: results cannot be written.
    """
    name = f"DPG rules (VQA = {vqa.name})" + (", official quirks" if official else "")
    sheets = find_sheets(folder)
    wanted = list(dict.fromkeys(questions if item_ids is None else item_ids))
    if official and item_ids is None:
        wanted += [item_id for item_id in sheets if item_id not in questions]
    dropped = {item_id: why for item_id in wanted if (why := _why_dropped(item_id, sheets, questions))}
    if not official:
        check_complete(folder, questions, wanted)
    _check_sides([item_id for item_id in wanted if item_id not in dropped], sheets, side)

    lines = ResultFile(results, {"name": name, "side": side, "official": official})
    answers: dict[str, Answers] = {}
    unreadable: dict[str, str] = {}
    for item_id in wanted:
        if item_id in dropped:
            continue
        asked = questions[item_id]
        try:
            content = sheets[item_id].read_bytes()
            crops = _crops(content, side)
        except (OSError, _UnreadableError) as error:
            unreadable[item_id] = f"{sheets[item_id]}: {error}"
            lines.add({"item_id": item_id, "unreadable": unreadable[item_id]})
        else:
            key = _fingerprint(content, asked)
            answers[item_id] = lines.kept_answers(item_id, key, (PICTURES, len(asked))) or [
                vqa.answers(crop, [question.text for question in asked]) for crop in crops
            ]
            lines.add(_line(item_id, key, answers[item_id], asked))
        if on_prompt is not None:
            on_prompt(item_id)
    if not answers:
        why = next(iter([*unreadable.values(), *dropped.values()]), "there are no questions")
        raise DPGError(f"none of {len(wanted)} prompts of {folder} can be scored ({why}): see the pictures are whole")
    score = rules.score_answers(questions, answers, official=official)
    return DPGResult(name, replace(score, dropped=dropped), answers, unreadable, len(wanted), official)


def check_complete(
    folder: str | Path, questions: Mapping[str, Sequence[Question]], item_ids: Iterable[str] | None = None
) -> None:
    """Reject a folder that the official script would score only in part, without a warning.

    The arguments are those of `score_sheets`.

    Raises:
        DPGError: a sheet is missing or has no questions, or its questions are incomplete.
    """
    sheets = find_sheets(folder)
    wanted = list(dict.fromkeys(questions if item_ids is None else item_ids))
    missing = [item_id for item_id in wanted if item_id not in sheets]
    if missing:
        raise DPGError(
            f"{folder} has {len(wanted) - len(missing)} of {len(wanted)} sheets, not {named(missing)}: draw them, or "
            "name those to score in item_ids"
        )
    unknown = [item_id for item_id in sheets if item_id not in questions]
    if unknown:
        raise DPGError(f"{folder} has pictures without questions, {named(unknown)}: take them out")
    if reasons := [f"{item_id}: {why}" for item_id in wanted if (why := rules.drop_reason(questions, item_id))]:
        raise DPGError(f"{len(reasons)} items can not be scored, {named(reasons)}; give a complete question file")


def _why_dropped(item_id: str, sheets: Mapping[str, Path], questions: Mapping[str, Sequence[Question]]) -> str:
    return rules.drop_reason(questions, item_id) or ("" if item_id in sheets else "no picture")


def _check_sides(wanted: Sequence[str], sheets: Mapping[str, Path], side: int) -> None:
    """Check the size in every image header before the first question. `_crops` handles unreadable files later."""
    for item_id in wanted:
        try:
            with Image.open(sheets[item_id]) as sheet:
                size = sheet.size
        except Exception:  # any error type, as in _crops
            continue
        check_side(size, side, str(sheets[item_id]))


class _UnreadableError(Exception):
    """A file is not a complete image."""


def _crops(content: bytes, side: int) -> list[Image.Image]:
    try:
        with Image.open(io.BytesIO(content)) as sheet:
            sheet.load()
    except Exception as error:  # PIL's formats raise OSError, SyntaxError, ValueError, struct.error and more
        raise _UnreadableError(f"not a whole picture ({error})") from error
    return cut_sheet(sheet, side)


def _fingerprint(content: bytes, questions: Sequence[Question]) -> str:
    """Hash of an image file and its questions."""
    return hashlib.sha256(repr(tuple(questions)).encode() + b"\0" + content).hexdigest()


def _line(item_id: str, key: str, answers: Answers, questions: Sequence[Question]) -> dict[str, Any]:
    scores = [rules.apply_dependencies(crop, questions) for crop in answers]
    return {
        "item_id": item_id,
        "key": key,
        "answers": [[int(answer) for answer in crop] for crop in answers],
        "scores": [[int(score) for score in crop] for crop in scores],
        "score": rules.prompt_score(scores),
    }
