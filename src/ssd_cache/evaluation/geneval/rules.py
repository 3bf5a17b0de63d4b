"""GenEval's rules: from detections to objects, and from objects to a verdict on one image.

They use only boxes, scores and names. Detections come from `detector.py`, colours from a function passed as argument.
`summary.py` computes the means over images. Source: github.com/djghosh13/geneval, evaluation/evaluate_images.py,
reimplemented from its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ssd_cache.evaluation.geneval.names import CLASSES
from ssd_cache.evaluation.geneval.prompts import GenEvalPrompt, Include
from ssd_cache.shapes.relations import Box, relations


@dataclass(frozen=True, eq=False)
class Detection:
    """One object that a detector found.

    Attributes:
        label: index of its class in `names.CLASSES`.
        score: from 0 to 1.
        box: its bounding box.
        mask: its pixels, boolean `[height, width]` of the image, or None when only the box is known.
    """

    label: int
    score: float
    box: Box
    mask: np.ndarray | None = None


Objects = Mapping[str, Sequence[Detection]]
"""Objects that count, by class name, the highest score first; classes without objects are absent."""

ColorsOf = Callable[[Sequence[Detection], str], Sequence[str]]
"""A function that returns the colour of every detection of a class; the second argument is the class name."""


@dataclass(frozen=True)
class Rules:
    """GenEval's thresholds; the defaults are the official ones.

    Attributes:
        threshold: a detection counts if its score is above this.
        counting_threshold: the same for prompts with the tag "counting".
        max_objects: maximum number of objects per class.
        max_overlap: a box counts if its overlap with every better box of its class is below this; 1 disables the rule.
        position_threshold: share of the sizes of both boxes that an offset must exceed.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "max_objects":
                if type(value) is not int or value < 1:
                    raise ValueError(
                        f"max_objects={value!r} is out of range: give a whole number from 1 up; 16 is usual"
                    )
            elif not 0 <= value <= 1:
                raise ValueError(
                    f"{field.name}={value!r} is out of range: give a number from 0 to 1; {field.default} is usual"
                )


OFFICIAL = Rules()


@dataclass(frozen=True)
class Judgement:
    """The verdict on one image; `reasons` is empty when it is correct."""

    correct: bool
    reasons: tuple[str, ...]


def objects_of(detections: Iterable[Detection], tag: str, rules: Rules = OFFICIAL) -> dict[str, list[Detection]]:
    """The detections that count for a prompt with this tag, by class, the highest score first.

    Raises:
        ValueError: a label is not the index of a class.
    """
    cut = rules.counting_threshold if tag == "counting" else rules.threshold
    by_label: dict[int, list[Detection]] = {}
    for detection in detections:
        if not 0 <= detection.label < len(CLASSES):
            raise ValueError(
                f"a detection has label {detection.label}, but GenEval's classes are 0 to {len(CLASSES) - 1}; "
                "give a detector of COCO's 80 classes"
            )
        if detection.score > cut:
            by_label.setdefault(detection.label, []).append(detection)
    objects = {}
    for label in sorted(by_label):
        best = sorted(by_label[label], key=lambda detection: -detection.score)[: rules.max_objects]
        kept: list[Detection] = []
        for detection in best:
            if rules.max_overlap == 1 or all(overlap(detection.box, other.box) < rules.max_overlap for other in kept):
                kept.append(detection)
        objects[CLASSES[label]] = kept
    return objects


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of boxes whose last row and column are included, so sizes are larger by one."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(
        max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])
    )
    union = area(*first) + area(*second) - shared
    return shared / union if union else 0.0


def judge(prompt: GenEvalPrompt, objects: Objects, colors_of: ColorsOf, rules: Rules = OFFICIAL) -> Judgement:
    """Decide whether an image with these objects matches the prompt.

    Colour and position are checked for the best `count` objects of a class only. Additional objects of a class are
    wrong only if the prompt excludes them (counting); objects of other classes are never wrong.

    Args:
        prompt: the requirements.
        objects: as `objects_of` returns them.
        colors_of: called only where the prompt requires a colour, with the objects to classify.
        rules: only `position_threshold` is used here.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in prompt.include:
        found = objects.get(wanted.class_name, ())[: wanted.count]
        reason = _counts_wrong(wanted, found) or _colors_wrong(wanted, found, colors_of)
        if not reason and wanted.position is not None:
            relation, index = wanted.position
            target_name, target = prompt.include[index].class_name, matched[index]
            if target is None:
                reason = f"no {target_name} for the {wanted.class_name} to be {relation}"
            elif not all(
                relation in relations(one.box, other.box, rules.position_threshold) for one in found for other in target
            ):
                reason = f"expected {wanted.class_name} {relation} {target_name}, which it is not"
        if reason:
            reasons.append(reason)
        matched.append(None if reason else found)
    for excluded in prompt.exclude:
        number = len(objects.get(excluded.class_name, ()))
        if number >= excluded.count:
            reasons.append(f"expected {excluded.class_name}<{excluded.count}, found {number}")
    return Judgement(not reasons, tuple(reasons))


def _counts_wrong(wanted: Include, found: Sequence[Detection]) -> str:
    if len(found) >= wanted.count:
        return ""
    return f"expected {wanted.class_name}>={wanted.count}, found {len(found)}"


def _colors_wrong(wanted: Include, found: Sequence[Detection], colors_of: ColorsOf) -> str:
    if wanted.color is None:
        return ""
    colors = list(colors_of(found, wanted.class_name))
    if colors.count(wanted.color) >= wanted.count:
        return ""
    return f"expected {wanted.color} {wanted.class_name}>={wanted.count}, found {', '.join(colors)}"
