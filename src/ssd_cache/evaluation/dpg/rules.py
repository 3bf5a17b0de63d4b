"""Computes DPG scores from yes/no answers, with pure functions: no image and no model.

The rules are the official script's (ELLA, `compute_dpg_bench.py`), reimplemented; its quirks apply only with
`official=True`. Answers have the form `[crops][questions]`, with questions in the order of the file.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ssd_cache.evaluation.dpg.questions import Question
from ssd_cache.evaluation.dpg.reading import DPGError


class MissingParentError(DPGError, KeyError):
    """A question depends on one that its item does not have."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


def missing_parents(questions: Sequence[Question]) -> list[str]:
    """Parents named by an item's questions that are none of them, each once."""
    known = {question.proposition_id for question in questions}
    return list(dict.fromkeys(p for question in questions for p in question.parents if p not in known))


def apply_dependencies(answers: Sequence[bool], questions: Sequence[Question]) -> list[bool]:
    """Scores of one crop: a question counts only where its parents do.

    In row order and in place: the parents' current scores are looked at, so a "no" cascades down a chain whose
    parents are listed first, and not to a child that is listed before its parent was zeroed. Chain 1 <- 2 <- 3:
    "no yes yes" gives 0 0 0; listed 1, 3, 2 the same answers give 0 1 0.

    Args:
        answers: raw answers of the crop, one a question.
        questions: of the item, in the order of the file.

    Raises:
        MissingParentError: a parent is no question of the item.
        DPGError: not one answer a question.
    """
    if len(answers) != len(questions):
        raise DPGError(f"{len(answers)} answers to {len(questions)} questions: give one a question, in their order")
    missing = missing_parents(questions)
    if missing:
        raise MissingParentError(
            f"questions depend on {', '.join(missing)}, which the item does not have; mend the question file, or "
            "score with official=True, which drops the prompt"
        )
    scores = {q.proposition_id: bool(answer) for q, answer in zip(questions, answers, strict=True)}
    for question in questions:
        if not all(scores[parent] for parent in question.parents):
            scores[question.proposition_id] = False
    return [scores[question.proposition_id] for question in questions]


def crop_score(scores: Sequence[bool]) -> float:
    """Share of a crop's questions that count; zeroed ones stay in the denominator."""
    if not scores:
        raise DPGError("a crop without questions has no score: give each item at least one question")
    return sum(scores) / len(scores)


def prompt_score(crops: Sequence[Sequence[bool]]) -> float:
    """Mean of the crop scores of one prompt; `crops[crop][question]` after `apply_dependencies`."""
    if not crops:
        raise DPGError("a prompt without crops has no score: give the answers of at least one crop")
    return sum(map(crop_score, crops)) / len(crops)


@dataclass(frozen=True)
class DPGScore:
    """Scores of a run.

    Attributes:
        prompts: by item id, 0 to 1.
        level1: of the five broad categories, 0 to 100, names in order; from raw answers.
        level2: of the finer categories, likewise.
        dropped: item ids left out of everything, and why; only with `official=True`.
    """

    prompts: dict[str, float]
    level1: dict[str, float]
    level2: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """The DPG score, 0 to 100: mean over prompts, not over questions."""
        return 100 * statistics.fmean(self.prompts.values())

    @property
    def standard_error(self) -> float | None:
        """Of `overall`, prompts taken as independent; None for a single prompt."""
        if len(self.prompts) < 2:
            return None
        return 100 * statistics.stdev(self.prompts.values()) / math.sqrt(len(self.prompts))


def score_answers(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Sequence[bool]]],
    *,
    official: bool = False,
) -> DPGScore:
    """Score the raw answers of a run.

    Args:
        questions: by item id, as `read_questions` reads them.
        answers: by item id, `[crops][questions]`, raw; exactly these items are scored.
        official: as the official script: an item without questions, or with a question whose parent is absent, is
            dropped from every mean, and categories are taken from the last crop only. The first question that the
            script loses is lost in reading: `read_questions(path, official=True)`.

    Raises:
        DPGError: no prompt is left to score; unless `official`, an item without questions or a parent's.
    """
    prompts: dict[str, float] = {}
    dropped: dict[str, str] = {}
    kept: list[tuple[Sequence[Question], Sequence[Sequence[bool]]]] = []
    for item_id, crops in answers.items():
        why = drop_reason(questions, item_id)
        if why and official:
            dropped[item_id] = why
            continue
        if item_id not in questions:
            raise DPGError(f"item {item_id!r} has no questions; give its questions, or take its answers out")
        prompts[item_id] = prompt_score([apply_dependencies(crop, questions[item_id]) for crop in crops])
        kept.append((questions[item_id], crops[-1:] if official else crops))
    if not prompts:
        raise DPGError(f"none of {len(answers)} prompts can be scored; give answers to at least one")
    return DPGScore(prompts, *_category_scores(kept), dropped)


def drop_reason(questions: Mapping[str, Sequence[Question]], item_id: str) -> str:
    """Why the official script would drop an item, whatever its picture; empty when it would not."""
    if item_id not in questions:
        return "no questions"
    missing = missing_parents(questions[item_id])
    return f"no question {', '.join(missing)}, on which others depend" if missing else ""


def _category_scores(
    kept: Sequence[tuple[Sequence[Question], Sequence[Sequence[bool]]]],
) -> tuple[dict[str, float], dict[str, float]]:
    """100 times the share of raw yes, over all questions of a category in all prompts and crops given: broad, finer."""
    broad, finer = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for questions, crops in kept:
        for crop in crops:
            for question, answer in zip(questions, crop, strict=True):
                broad[question.broad].append(bool(answer))
                finer[question.category].append(bool(answer))
    level1, level2 = ({n: 100 * statistics.fmean(level[n]) for n in sorted(level)} for level in (broad, finer))
    return level1, level2
