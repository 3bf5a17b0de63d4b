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
    """A question depends on a question that its item lacks."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


def missing_parents(questions: Sequence[Question]) -> list[str]:
    """Ids of the parents that are not questions of the item, without duplicates."""
    known = {question.proposition_id for question in questions}
    return list(dict.fromkeys(p for question in questions for p in question.parents if p not in known))


def apply_dependencies(answers: Sequence[bool], questions: Sequence[Question]) -> list[bool]:
    """Compute the scores of one crop: a question counts only if its parents count.

    The rule is applied in file order and in place, with the current scores of the parents. So a "no" cascades down a
    chain whose parents are listed first. It does not reach a child that is listed before its parent is zeroed. Example
    for the chain 1 <- 2 <- 3: "no yes yes" gives 0 0 0; listed as 1, 3, 2 the same answers give 0 1 0.

    Args:
        answers: raw answers of the crop, one per question.
        questions: questions of the item, in the order of the file.

    Raises:
        MissingParentError: a parent is not a question of the item.
        DPGError: the numbers of answers and questions differ.
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
    """Share of the questions of a crop that count; zeroed questions stay in the denominator."""
    if not scores:
        raise DPGError("a crop without questions has no score: give each item at least one question")
    return sum(scores) / len(scores)


def prompt_score(crops: Sequence[Sequence[bool]]) -> float:
    """Mean of the crop scores of one prompt, from `crops[crop][question]` after `apply_dependencies`."""
    if not crops:
        raise DPGError("a prompt without crops has no score: give the answers of at least one crop")
    return sum(map(crop_score, crops)) / len(crops)


@dataclass(frozen=True)
class DPGScore:
    """Scores of a run.

    Attributes:
        prompts: prompt scores by item id, 0 to 1.
        level1: scores of the five broad categories, 0 to 100, sorted by name; computed from raw answers.
        level2: scores of the finer categories, in the same form.
        dropped: item ids excluded from all means, with the reason; only with `official=True`.
    """

    prompts: dict[str, float]
    level1: dict[str, float]
    level2: dict[str, float]
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """The DPG score, 0 to 100: the mean over prompts, not over questions."""
        return 100 * statistics.fmean(self.prompts.values())

    @property
    def standard_error(self) -> float | None:
        """Standard error of `overall`, assuming independent prompts; None for a single prompt."""
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
        questions: questions by item id, as `read_questions` returns them.
        answers: raw answers by item id, `[crops][questions]`; exactly these items are scored.
        official: reproduce the official script. An item without questions, or with a question whose parent is absent,
            is dropped from every mean. Category scores use only the last crop. The script also loses the first
            question; `read_questions(path, official=True)` reproduces that.

    Raises:
        DPGError: no prompt is left to score; or, unless `official`, an item has no questions or lacks a parent.
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
    """The reason why the official script drops an item because of its questions; empty if it does not."""
    if item_id not in questions:
        return "no questions"
    missing = missing_parents(questions[item_id])
    return f"no question {', '.join(missing)}, on which others depend" if missing else ""


def _category_scores(
    kept: Sequence[tuple[Sequence[Question], Sequence[Sequence[bool]]]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the broad and of the finer categories.

    A score is the percentage of raw yes over all questions of the category, in all given prompts and crops.
    """
    broad, finer = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for questions, crops in kept:
        for crop in crops:
            for question, answer in zip(questions, crop, strict=True):
                broad[question.broad].append(bool(answer))
                finer[question.category].append(bool(answer))
    level1, level2 = ({n: 100 * statistics.fmean(level[n]) for n in sorted(level)} for level in (broad, finer))
    return level1, level2
