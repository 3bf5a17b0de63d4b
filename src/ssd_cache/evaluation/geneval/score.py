"""Scores a folder of images: detector, colour classifier and GenEval's rules on every image, then GenEval's means.

A tag's result is the mean over its images, the overall result the mean over tags with equal weights. Source:
github.com/djghosh13/geneval, evaluation/summary_scores.py, reimplemented from its rules.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.geneval.colors import ColorClassifier
from ssd_cache.evaluation.geneval.detector import Detector
from ssd_cache.evaluation.geneval.folder import SampleFolder
from ssd_cache.evaluation.geneval.prompts import TAGS, GenEvalPrompt
from ssd_cache.evaluation.geneval.rules import RULES, judge, objects_of
from ssd_cache.evaluation.scoring import judge_files

SCORER = "GenEval rules, HF detector"
"""Stored in all results: the rules are GenEval's, the detector's weights are not, so scores are not official."""


@dataclass(frozen=True)
class GenEvalScore:
    """The score of a folder.

    Attributes:
        tags: share of correct images of each tag that has images, in GenEval's order.
        overall: unweighted mean of `tags`.
        images_correct: share of correct images over all tags.
        prompts_correct: share of prompts with at least one correct image.
        num_images, num_prompts: by tag.
        tag_errors: standard error of each tag, see `bootstrap.standard_error`; NaN for a single prompt.
        standard_error: standard error of `overall`.
        judge: the scorer and its settings.
    """

    tags: dict[str, float]
    overall: float
    images_correct: float
    prompts_correct: float
    num_images: dict[str, int]
    num_prompts: dict[str, int]
    tag_errors: dict[str, float]
    standard_error: float
    judge: dict[str, Any]


def score_folder(
    folder: SampleFolder[GenEvalPrompt],
    detector: Detector,
    classifier: ColorClassifier,
    *,
    results_file: str | Path | None = None,
    on_image: Callable[[], object] | None = None,
) -> GenEvalScore:
    """Judge every image of a complete folder.

    Args:
        folder: the images and their prompts.
        detector: finds the objects.
        classifier: classifies their colours.
        results_file: file of JSON lines, one per image, in GenEval's fields. If it exists, its images are not judged
            again, except those that have changed.
        on_image: called after every image, for a progress bar.

    Raises:
        ValueError: the folder is incomplete, an image cannot be read, or the file holds results of another run.
        OSError: the file cannot be written.
    """
    folder.check_complete()
    settings = {
        "benchmark": "GenEval",
        "scorer": SCORER,
        "detector": detector.name,
        "short_side": detector.short_side,
        "long_side": detector.long_side,
        "classifier": classifier.name,
        "rules": RULES,
    }
    files = []
    for number in range(len(folder.texts)):
        prompt = folder.prompt_of(number)
        known = {"tag": prompt.tag, "prompt": prompt.prompt, "metadata": prompt.to_json()}
        files.append((folder.path(number), {"filename": folder.name(number), **known}))

    def verdict(number: int, image: Image.Image) -> dict[str, Any]:
        prompt = folder.prompt_of(number)
        objects = objects_of(detector.detect(image), prompt.tag)
        reasons = judge(prompt, objects, lambda found, name: classifier.classify(image, found, name))
        details = {name: [[*item.box, item.score] for item in found] for name, found in objects.items()}
        return {"correct": not reasons, "reason": "\n".join(reasons), "details": details, "result": float(not reasons)}

    return summarize(judge_files(files, verdict, settings, results_file, on_image, highest=1.0))


def summarize(lines: Sequence[Mapping[str, Any]]) -> GenEvalScore:
    """Compute the score of some images from their lines of results, which are of one judge."""
    by_prompt: dict[str, dict[str, list[float]]] = {}
    for line in sorted(lines, key=lambda line: TAGS.index(line["tag"])):
        by_prompt.setdefault(line["tag"], {}).setdefault(line["metadata"], []).append(line["result"])
    images = {tag: [result for results in prompts.values() for result in results] for tag, prompts in by_prompt.items()}
    tags = {tag: statistics.fmean(results) for tag, results in images.items()}
    means = {
        tag: {prompt: statistics.fmean(results) for prompt, results in prompts.items()}
        for tag, prompts in by_prompt.items()
    }
    return GenEvalScore(
        tags=tags,
        overall=statistics.fmean(tags.values()),
        images_correct=statistics.fmean(line["result"] for line in lines),
        prompts_correct=statistics.fmean(mean > 0 for prompts in means.values() for mean in prompts.values()),
        num_images={tag: len(results) for tag, results in images.items()},
        num_prompts={tag: len(prompts) for tag, prompts in means.items()},
        tag_errors={tag: bootstrap.standard_error({tag: prompts}) for tag, prompts in means.items()},
        standard_error=bootstrap.standard_error(means),
        judge=lines[0]["judge"],
    )
