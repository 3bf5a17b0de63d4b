"""The judge: reads the objects from an image of shapes and decides whether the image meets its caption.

It is exact and needs no detector, unlike GenEval, because every cell has a known colour. It is stricter than GenEval
in one point: anything that the caption does not name (another object, stray cells) fails the image.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.shapes.relations import relations
from ssd_cache.shapes.scenes import (
    BITMAPS,
    COLORS,
    GRID,
    NUM_BACKGROUNDS,
    NUMBERS,
    OBJECT_SIZE,
    PALETTE,
    RELATIONS,
    SHADES,
    SHAPES,
)

MIN_CELLS = 4
"""Groups of fewer connected cells are noise and are ignored."""

MIN_OBJECT_CELLS = 9
"""Smaller blots are junk: they are not objects, and they fail the image."""

MIN_OVERLAP = 0.8
"""Minimum intersection over union with the best bitmap; a blot with less is junk."""


@dataclass(frozen=True)
class FoundObject:
    """An object read from an image; `box` is (left, top, right, bottom) in cells, ends excluded."""

    shape: str
    color: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Requirement:
    """Content that a caption requires: (shape, colour or None) of each object; relation of the first to the second."""

    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The judgement on one image; `reason` is empty when it is correct."""

    correct: bool
    reason: str
    objects: tuple[FoundObject, ...]


_THING = rf"a (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_NAMED = re.compile(rf"a photo of {_THING}(?: (and|{'|'.join(RELATIONS)}) {_THING})?")
_COUNTED = re.compile(rf"a photo of ({'|'.join(NUMBERS)}) ({'|'.join(SHAPES)})s")


def parse_caption(caption: str) -> Requirement:
    """Parse a caption into a `Requirement`; raises ValueError for one that the judge does not know."""
    text = " ".join(caption.lower().split())
    if match := _COUNTED.fullmatch(text):
        return Requirement(((match[2], None),) * NUMBERS[match[1]])
    if match := _NAMED.fullmatch(text):
        color, shape, relation, other_color, other_shape = match.groups()
        others = () if relation is None else ((other_shape, other_color),)
        return Requirement(((shape, color), *others), None if relation == "and" else relation)
    raise ReadableError(
        f"the judge of shapes cannot read the caption {shown(caption)}; it knows 'a photo of a red circle', "
        "'a photo of three squares', 'a photo of a circle left of a square', "
        "'a photo of a red circle and a blue square'"
    )


def _accepts_picture(function):
    """Accept `picture`, the former name of the parameter `image`, with a warning."""

    @functools.wraps(function)
    def with_former_name(*args, **kwargs):
        if "picture" in kwargs:
            warnings.warn(f"{function.__name__}(picture=...) is now image=...", FutureWarning, stacklevel=2)
            kwargs["image"] = kwargs.pop("picture")
        return function(*args, **kwargs)

    return with_former_name


@_accepts_picture
def to_tokens(image: np.ndarray | Image.Image | Sequence[int]) -> np.ndarray:
    """Convert an image to tokens `[24, 24]`: from 576 tokens in any shape, or from the middle pixel of every cell.

    Raises:
        ValueError: an image of another size.
    """
    if isinstance(image, Image.Image):
        if image.width < GRID[1] or image.height < GRID[0]:
            raise ValueError(f"an image of {image.width} x {image.height} pixels has fewer than 24 x 24 cells")
        cells = np.asarray(image.convert("RGB").resize(GRID[::-1], Image.Resampling.NEAREST), dtype=np.int64)
        return ((cells[:, :, None] - np.array(PALETTE)) ** 2).sum(-1).argmin(-1)
    tokens = np.asarray(image)
    if tokens.size != GRID[0] * GRID[1]:
        raise ValueError(f"an image of shapes has {GRID[0] * GRID[1]} tokens, got {tokens.size}")
    return tokens.reshape(GRID)


def _blots(tokens: np.ndarray):
    """Yield groups of connected cells (4 neighbours) of one colour in any shade: (colour, cells `[n, 2]`)."""
    family = np.where(tokens < NUM_BACKGROUNDS, -1, (tokens - NUM_BACKGROUNDS) // SHADES)
    todo = {(int(row), int(column)) for row, column in zip(*np.nonzero(family >= 0), strict=True)}
    while todo:
        start = min(todo)  # raster order makes the result deterministic
        todo.remove(start)
        cells, edge = [start], [start]
        while edge:
            row, column = edge.pop()
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if near in todo and family[near] == family[start]:
                    todo.remove(near)
                    cells.append(near)
                    edge.append(near)
        yield COLORS[family[start]], np.array(cells)


def _shape_of(cells: np.ndarray) -> str | None:
    """The shape whose bitmap overlaps the cells best, or None if no overlap is above `MIN_OVERLAP`."""
    (top, left), (bottom, right) = cells.min(0), cells.max(0) + 1
    side = max(bottom - top, right - left, OBJECT_SIZE)
    blot = np.zeros((side, side), dtype=bool)
    blot[cells[:, 0] - top, cells[:, 1] - left] = True
    best, best_overlap = None, MIN_OVERLAP
    for shape, bitmap in BITMAPS.items():
        body = np.zeros_like(blot)
        body[:OBJECT_SIZE, :OBJECT_SIZE] = bitmap > 0
        overlap = (blot & body).sum() / (blot | body).sum()
        if overlap > best_overlap:
            best, best_overlap = shape, overlap
    return best


@_accepts_picture
def read_objects(image) -> tuple[tuple[FoundObject, ...], int]:
    """Read the objects of an image in raster order, and count the blots that are not objects."""
    objects, junk = [], 0
    for color, cells in _blots(to_tokens(image)):
        if len(cells) < MIN_CELLS:
            continue
        shape = _shape_of(cells) if len(cells) >= MIN_OBJECT_CELLS else None
        if shape is None:
            junk += 1
            continue
        (top, left), (bottom, right) = cells.min(0), cells.max(0) + 1
        objects.append(FoundObject(shape, color, (int(left), int(top), int(right), int(bottom))))
    return tuple(objects), junk


@_accepts_picture
def judge(image, caption: str) -> Verdict:
    """Decide whether an image shows the content of its caption, and nothing else.

    Args:
        image: 576 tokens in any shape, or a PIL image of at least 24 x 24 pixels.
        caption: a caption that `parse_caption` accepts.

    Raises:
        ValueError: a caption that cannot be read, or an image of another size.
    """
    requirement = parse_caption(caption)
    objects, junk = read_objects(image)
    wanted = Counter(shape for shape, _ in requirement.objects)
    found = Counter(item.shape for item in objects)
    if junk:
        return Verdict(False, f"{junk} blot(s) that are not an object", objects)
    if wanted != found:
        return Verdict(False, f"expected {_names(wanted)}, found {_names(found)}", objects)
    for shape, color in requirement.objects:
        if color is not None and not any(item.shape == shape and item.color == color for item in objects):
            return Verdict(False, f"expected a {color} {shape}", objects)
    if requirement.relation is not None:
        first, second = (next(item for item in objects if item.shape == shape) for shape, _ in requirement.objects)
        if requirement.relation not in relations(first.box, second.box):
            return Verdict(False, f"the {first.shape} is not {requirement.relation} the {second.shape}", objects)
    return Verdict(True, "", objects)


def _names(counts: Counter) -> str:
    return ", ".join(f"{number} {shape}" for shape, number in sorted(counts.items())) or "nothing"
