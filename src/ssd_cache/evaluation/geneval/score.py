"""Scores a folder of images: runs detector and colour classifier on every image and applies GenEval's rules.

Each result is appended to a file, and an interrupted run continues after the last complete line. An image that cannot
be read is reported and counts as wrong. `summary.py` computes the means; nothing is generated here.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ssd_cache.evaluation.geneval.colors import ColorClassifier
from ssd_cache.evaluation.geneval.detector import Detector
from ssd_cache.evaluation.geneval.folder import SampleFolder
from ssd_cache.evaluation.geneval.names import TAGS
from ssd_cache.evaluation.geneval.prompts import GenEvalPrompt
from ssd_cache.evaluation.geneval.rules import OFFICIAL, Rules, judge, objects_of
from ssd_cache.evaluation.geneval.summary import SCORER, GenEvalScore, ImageResult, summarize
from ssd_cache.io.showing import ReadableError, differences, shown
from ssd_cache.io.untrusted import WrongFileError, checked, parse_json
from ssd_cache.io.writing import write_files


def score_image(
    image: Image.Image,
    prompt: GenEvalPrompt,
    detector: Detector,
    classifier: ColorClassifier,
    *,
    filename: str = "",
    rules: Rules = OFFICIAL,
) -> ImageResult:
    """Judge one image; `filename` is copied into the result."""
    objects = objects_of(detector.detect(image), prompt.tag, rules)
    judgement = judge(prompt, objects, lambda found, name: classifier.classify(image, found, name), rules)
    return ImageResult(
        filename=filename,
        tag=prompt.tag,
        prompt=prompt.prompt,
        correct=judgement.correct,
        reason="\n".join(judgement.reasons),
        metadata=prompt.to_json(),
        details={name: [[*item.box, item.score] for item in found] for name, found in objects.items()},
        settings=settings_of(detector, classifier, rules),
    )


def settings_of(detector: Detector, classifier: ColorClassifier, rules: Rules = OFFICIAL) -> dict[str, Any]:
    """The settings of the judge; results with different settings are not compared or mixed."""
    return {
        "detector": detector.name,
        "short_side": detector.short_side,
        "long_side": detector.long_side,
        "classifier": classifier.name,
        "rules": asdict(rules),
    }


def score_folder(
    folder: SampleFolder,
    detector: Detector,
    classifier: ColorClassifier,
    *,
    results_file: str | Path | None = None,
    rules: Rules = OFFICIAL,
    on_image: Callable[[ImageResult], object] | None = None,
) -> GenEvalScore:
    """Judge every image of a complete folder.

    Args:
        folder: the images and their prompts.
        detector: finds the objects.
        classifier: classifies their colours.
        results_file: a file with one JSON object per image, see `ImageResult`. If it exists, its images are not judged
            again, except those that were unreadable or have changed.
        rules: GenEval's thresholds.
        on_image: called with every result, in order, including those from the file.

    Raises:
        ValueError: the folder is incomplete, or the file holds results of another run.
        OSError: the file cannot be written.
    """
    folder.check_complete()
    path = None if results_file is None else Path(results_file)
    done: dict[str, ImageResult] = {}
    if path is not None:
        done = {result.filename: result for result in _read_results(path, settings_of(detector, classifier, rules))}
        _write_results(path, done.values())  # drops an incomplete last line
    results: list[ImageResult] = []
    for number, sample in folder:
        name, prompt = folder.name(number, sample), folder.prompts[number]
        content = folder.picture(number, sample).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        result = done.get(name)
        if result is None or not result.readable or (result.sha256, result.metadata) != (sha256, prompt.to_json()):
            image = _open(content)
            if isinstance(image, str):
                settings = settings_of(detector, classifier, rules)
                result = ImageResult(
                    name, prompt.tag, prompt.prompt, False, image, prompt.to_json(), readable=False, settings=settings
                )
            else:
                result = score_image(image, prompt, detector, classifier, filename=name, rules=rules)
            result = replace(result, sha256=sha256)
            if path is not None:
                with path.open("a", encoding="utf-8") as lines:
                    lines.write(_line(result))
        results.append(result)
        if on_image is not None:
            on_image(result)
    if path is not None:  # rewrite in order, each image once
        _write_results(path, results)
    return summarize(results)


def _open(content: bytes) -> Image.Image | str:
    """An image from the bytes of its file, or the reason why it cannot be read."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        kind = "not a PNG file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        return f"the picture can not be read ({kind}); draw it anew"


def _line(result: ImageResult) -> str:
    return json.dumps(asdict(result)) + "\n"


def _write_results(path: Path, results: Iterable[ImageResult]) -> None:
    write_files({path: "".join(map(_line, results)).encode()})


def _read_results(path: Path, settings: dict[str, Any]) -> list[ImageResult]:
    """Results of an earlier run with the same settings, without an incomplete last line; empty without a file."""
    results: list[ImageResult] = []
    if not path.exists():
        return results
    remedy = "give another file, or delete it to begin anew"
    try:
        for line in path.read_bytes().split(b"\n")[:-1]:
            result = checked(ImageResult, parse_json(line))
            if result.tag not in TAGS:
                raise ReadableError(f"tag={shown(result.tag)}; GenEval's are {', '.join(TAGS)}")
            results.append(result)
    except (OSError, ValueError) as error:
        place = f"{path}, line {len(results) + 1}"
        raise WrongFileError(f"{place}: not a result of a GenEval run ({error}); {remedy}") from error
    for number, result in enumerate(results, 1):
        if (result.scorer, result.settings) != (SCORER, settings):
            other = differences({"scorer": result.scorer, **result.settings}, {"scorer": SCORER, **settings})
            raise WrongFileError(f"{path}, line {number}: a result of another run ({other}); {remedy}")
    return results
