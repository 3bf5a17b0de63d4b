"""GenEval's means: for each tag over its images, and overall over the tags with equal weights.

It also reports the number of images and prompts, the unreadable images, and the scorer. It does not judge images.
Source: github.com/djghosh13/geneval, evaluation/summary_scores.py, reimplemented from its rules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ssd_cache.evaluation.geneval.names import TAGS, Tag

SCORER = "GenEval rules, HF detector"
"""Stored in all results: the rules are GenEval's, the detector's weights are not, so scores are not official."""


@dataclass(frozen=True)
class ImageResult:
    """The result of one image, with the fields of the official result file and four more.

    Attributes:
        filename: path of the image below the folder's root.
        tag, prompt: those of the prompt.
        correct: the verdict.
        reason: one reason per line, empty when it is correct.
        metadata: the prompt's line; it identifies the images of one prompt.
        details: the objects that counted: [left, top, right, bottom, score] of each, by class.
        readable: False for an image that cannot be opened or is truncated; it counts as wrong.
        sha256: checksum of the image file.
        scorer, settings: the scorer, and its detector, classifier and thresholds.
    """

    filename: str
    tag: Tag
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: dict[str, list[list[float]]] = field(default_factory=dict)
    readable: bool = True
    sha256: str = ""
    scorer: str = SCORER
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def judge(self) -> dict[str, Any]:
        """The scorer and its settings; results of different judges are not mixed."""
        return {"scorer": self.scorer, **self.settings}


@dataclass(frozen=True)
class GenEvalScore:
    """The score of a folder.

    Attributes:
        tags: share of correct images of each tag that has images, in GenEval's order.
        overall: unweighted mean of `tags`.
        images_correct: share of correct images over all tags.
        prompts_correct: share of prompts with at least one correct image.
        num_images, num_prompts: by tag.
        tag_errors: standard error of each tag; prompts are independent, the images of one prompt are not. None for a
            single prompt.
        standard_error: standard error of `overall`, from `tag_errors`; None if one of them is None.
        unreadable: names of images that could not be read; they count as wrong, so the score is too low.
        scorer, settings: the scorer and its settings.
    """

    tags: dict[str, float]
    overall: float
    images_correct: float
    prompts_correct: float
    num_images: dict[str, int]
    num_prompts: dict[str, int]
    tag_errors: dict[str, float | None]
    standard_error: float | None
    unreadable: tuple[str, ...] = ()
    scorer: str = SCORER
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for a JSON file."""
        return asdict(self)


def summarize(results: Sequence[ImageResult]) -> GenEvalScore:
    """Compute the score of some images.

    Raises:
        ValueError: there are no images, or the results are of several scorers or settings.
    """
    if not results:
        raise ValueError("no results: give those of at least one image")
    first = results[0]
    if other := next((result for result in results if result.judge != first.judge), None):
        raise ValueError(f"results of two runs: {first.filename} by {first.judge}, {other.filename} by {other.judge}")
    tags: dict[str, float] = {}
    by_prompt: dict[str, dict[str, list[bool]]] = {}
    for tag in TAGS:
        if part := [result for result in results if result.tag == tag]:
            tags[tag], by_prompt[tag] = statistics.fmean(result.correct for result in part), {}
            for result in part:
                by_prompt[tag].setdefault(result.metadata, []).append(result.correct)
    errors = {tag: _error([statistics.fmean(images) for images in by_prompt[tag].values()]) for tag in tags}
    known = [error for error in errors.values() if error is not None]
    return GenEvalScore(
        tags=tags,
        overall=sum(tags.values()) / len(tags),
        images_correct=statistics.fmean(result.correct for result in results),
        prompts_correct=statistics.fmean(any(images) for prompts in by_prompt.values() for images in prompts.values()),
        num_images={tag: sum(map(len, prompts.values())) for tag, prompts in by_prompt.items()},
        num_prompts={tag: len(prompts) for tag, prompts in by_prompt.items()},
        tag_errors=errors,
        standard_error=math.hypot(*known) / len(tags) if len(known) == len(tags) else None,
        unreadable=tuple(result.filename for result in results if not result.readable),
        scorer=first.scorer,
        settings=first.settings,
    )


def _error(means: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values."""
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
