"""Computes DPG scores from yes/no answers, with pure functions: no image and no model.

The rules are the official script's (ELLA, `compute_dpg_bench.py`), reimplemented. Answers have the form
`[crops][questions]`, with questions in the order of the file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ssd_cache.evaluation.dpg.questions import Question

Answers = list[list[bool]]
"""Raw answers about one sheet, `[crops][questions]`."""


@dataclass(frozen=True)
class DPGScore:
    """The score of a folder.

    Attributes:
        name: "DPG rules (VQA = ...)", followed by ", official quirks" if they were applied.
        prompts: prompt scores by item id, 0 to 1.
        level1: scores of the five broad categories, 0 to 100, sorted by name; computed from raw answers.
        level2: scores of the finer categories, in the same form.
        num_prompts: number of prompts to score.
        dropped: item ids excluded from all means, with the reason; only with the quirks.
        unreadable: item ids whose image could not be read, with the reason; they are excluded from all means.
        answers: raw answers by item id, `[crops][questions]`.
        is_official: whether the quirks of the official script were applied.
    """

    name: str
    prompts: dict[str, float]
    level1: dict[str, float]
    level2: dict[str, float]
    num_prompts: int
    dropped: dict[str, str]
    unreadable: dict[str, str]
    answers: dict[str, Answers]
    is_official: bool = False

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

    @property
    def is_complete(self) -> bool:
        """Whether the mean includes every prompt to score."""
        return len(self.prompts) == self.num_prompts

    def to_dict(self) -> dict[str, Any]:
        """The score without the answers, for a JSON file."""
        return {
            "name": self.name,
            "overall": self.overall,
            "standard_error": self.standard_error,
            "level1": self.level1,
            "level2": self.level2,
            "num_prompts": self.num_prompts,
            "num_scored": len(self.prompts),
            "is_complete": self.is_complete,
            "dropped": self.dropped,
            "unreadable": self.unreadable,
            "prompts": self.prompts,
        }


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
    answered: Iterable[tuple[Sequence[Question], Sequence[Sequence[bool]]]], category_of: Callable[[Question], str]
) -> dict[str, float]:
    """Percentage of raw yes over all questions of each category, sorted by name.

    Args:
        answered: questions and raw answers of every prompt.
        category_of: returns the category of a question.
    """
    by_category: dict[str, list[bool]] = {}
    for questions, crops in answered:
        for crop in crops:
            for question, answer in zip(questions, crop, strict=True):
                by_category.setdefault(category_of(question), []).append(answer)
    return {name: 100 * statistics.fmean(by_category[name]) for name in sorted(by_category)}
