"""Scores a folder of images: runs detector and colour classifier on every image and applies GenEval's rules.

Each result is appended to a file, and an interrupted run continues after the last complete line. An image that cannot
be read is reported and counts as wrong. `summary.py` computes the means; nothing is generated here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssd_cache.evaluation.geneval.colors import ColorClassifier
from ssd_cache.evaluation.geneval.detector import Detector
from ssd_cache.evaluation.geneval.folder import SampleFolder
from ssd_cache.evaluation.geneval.prompts import GenEvalPrompt
from ssd_cache.evaluation.geneval.rules import RULES, judge, objects_of
from ssd_cache.evaluation.geneval.summary import SCORER, GenEvalScore, ImageResult, summarize
from ssd_cache.evaluation.judge_models import decode_image
from ssd_cache.evaluation.result_file import append_row, check_settings, read_rows
from ssd_cache.io.untrusted import checked


def score_folder(
    folder: SampleFolder,
    detector: Detector,
    classifier: ColorClassifier,
    *,
    results_file: str | Path | None = None,
    on_image: Callable[[ImageResult], object] | None = None,
) -> GenEvalScore:
    """Judge every image of a complete folder.

    Args:
        folder: the images and their prompts.
        detector: finds the objects.
        classifier: classifies their colours.
        results_file: a file with one JSON object per image, see `ImageResult`. If it exists, its images are not judged
            again, except those that were unreadable or have changed.
        on_image: called with every result, in order, including those from the file.

    Raises:
        ValueError: the folder is incomplete, or the file holds results of another run.
        OSError: the file cannot be written.
    """
    folder.check_complete()
    settings = {
        "detector": detector.name,
        "short_side": detector.short_side,
        "long_side": detector.long_side,
        "classifier": classifier.name,
        "rules": RULES,
    }
    path = None if results_file is None else Path(results_file)
    done = {result.filename: result for result in read_results(path, settings)}
    results: list[ImageResult] = []
    for number in range(len(folder)):
        name, prompt = folder.name(number), folder.prompt_of(number)
        content = folder.path(number).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        result = done.get(name)
        if result is None or not result.readable or (result.sha256, result.metadata) != (sha256, prompt.to_json()):
            result = ImageResult(
                filename=name,
                tag=prompt.tag,
                prompt=prompt.prompt,
                metadata=prompt.to_json(),
                sha256=sha256,
                settings=settings,
                **_verdict(content, prompt, detector, classifier),
            )
            append_row(path, asdict(result))
        results.append(result)
        if on_image is not None:
            on_image(result)
    return summarize(results)


def read_results(path: Path | None, settings: dict[str, Any]) -> list[ImageResult]:
    """Results of an earlier run with the same settings; raises WrongFileError if they are of another run."""

    def check(_: int, row: dict[str, Any]) -> ImageResult:
        result = checked(ImageResult, row)
        check_settings(result.judge, {"scorer": SCORER, **settings})
        return result

    return read_rows(path, check)


def _verdict(content: bytes, prompt: GenEvalPrompt, detector: Detector, classifier: ColorClassifier) -> dict[str, Any]:
    """The fields of an `ImageResult` that depend on the content of the image file."""
    try:
        image = decode_image(content)
    except ValueError as error:
        return {"correct": False, "reason": str(error), "readable": False}
    objects = objects_of(detector.detect(image), prompt.tag)
    reasons = judge(prompt, objects, lambda found, name: classifier.classify(image, found, name))
    return {
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "details": {name: [[*item.box, item.score] for item in found] for name, found in objects.items()},
    }
