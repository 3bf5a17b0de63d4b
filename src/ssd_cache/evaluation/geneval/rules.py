"""GenEval's rules: from detections to objects, and from objects to a verdict on one image.

They use only boxes, scores and names. Detections come from `detector.py`, colours from a function passed as argument.
Source: github.com/djghosh13/geneval, evaluation/evaluate_images.py, reimplemented from its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssd_cache.evaluation.geneval.prompts import CLASSES, GenEvalPrompt, Include
from ssd_cache.shapes.relations import Box, relations

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts if its score is above this; for the tag "counting"
MAX_OBJECTS = 16  # of each class
POSITION_THRESHOLD = 0.1  # share of the sizes of both boxes that an offset must exceed

RULES = {
    "threshold": THRESHOLD,
    "counting_threshold": COUNTING_THRESHOLD,
    "max_objects": MAX_OBJECTS,
    "max_overlap": 1.0,
    "position_threshold": POSITION_THRESHOLD,
}
"""The thresholds as result files record them; a maximum overlap of 1 disables that rule."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One object that a detector found.

    Attributes:
        label: index of its class in `prompts.CLASSES`.
        score: from 0 to 1.
        box: its bounding box.
        mask: its pixels, boolean `[height, width]` of the image, or None when only the box is known.
    """

    label: int
    score: float
    box: Box
    mask: np.ndarray | None = None


FoundObjects = Mapping[str, Sequence[Detection]]
"""Objects that count, by class name, the highest score first; classes without objects are absent."""

ColorsOf = Callable[[Sequence[Detection], str], Sequence[str]]
"""A function that returns the colour of every detection of a class; the second argument is the class name."""


def objects_of(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count for a prompt with this tag, by class, the highest score first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    counted = sorted((item for item in detections if item.score > threshold), key=lambda item: -item.score)
    labels = sorted({item.label for item in counted})
    return {CLASSES[label]: [item for item in counted if item.label == label][:MAX_OBJECTS] for label in labels}


def judge(prompt: GenEvalPrompt, objects: FoundObjects, colors_of: ColorsOf) -> list[str]:
    """Reasons why an image with these objects does not match the prompt; empty if it is correct.

    Colour and position are checked for the best `count` objects of a class only. Additional objects of a class are
    wrong only if the prompt excludes them (counting); objects of other classes are never wrong.
    `colors_of` is called only where the prompt requires a colour.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in prompt.include:
        found = objects.get(wanted.class_name, ())[: wanted.count]
        reason = _count_or_color_wrong(wanted, found, colors_of)
        if not reason and wanted.position is not None:
            relation, index = wanted.position
            target_name, target = prompt.include[index].class_name, matched[index]
            if target is None:
                reason = f"no {target_name} for the {wanted.class_name} to be {relation}"
            elif not all(
                relation in relations(one.box, other.box, POSITION_THRESHOLD) for one in found for other in target
            ):
                reason = f"expected {wanted.class_name} {relation} {target_name}, which it is not"
        if reason:
            reasons.append(reason)
        matched.append(None if reason else found)
    for excluded in prompt.exclude:
        number = len(objects.get(excluded.class_name, ()))
        if number >= excluded.count:
            reasons.append(f"expected {excluded.class_name}<{excluded.count}, found {number}")
    return reasons


def _count_or_color_wrong(wanted: Include, found: Sequence[Detection], colors_of: ColorsOf) -> str:
    """The reason why the number of objects or their colours are wrong; empty if they are not."""
    if len(found) < wanted.count:
        return f"expected {wanted.class_name}>={wanted.count}, found {len(found)}"
    if wanted.color is not None:
        colors = list(colors_of(found, wanted.class_name))
        if colors.count(wanted.color) < wanted.count:
            return f"expected {wanted.color} {wanted.class_name}>={wanted.count}, found {', '.join(colors)}"
    return ""
