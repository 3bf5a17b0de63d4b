"""Reads a picture of shapes back into objects and decides whether it meets its caption.

Exact where GenEval needs a detector: every cell is a known colour. Stricter than GenEval in one point:
whatever the caption does not name (another object, stray cells) fails the picture.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

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
"""Connected cells fewer than these are noise and are ignored."""

MIN_OBJECT_CELLS = 9
"""Smaller blots than these are junk: no object, and they fail the picture."""

MIN_OVERLAP = 0.8
"""Intersection over union with the best bitmap, below which a blot is junk."""


@dataclass(frozen=True)
class FoundObject:
    """An object read from a picture; `box` is (left, top, right, bottom) in cells, ends excluded."""

    shape: str
    color: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Requirement:
    """What a caption asks for: (shape, colour or None) of every object, and how the first lies to the second."""

    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None


@dataclass(frozen=True)
class Verdict:
    """The judgement on one picture; `reason` is empty when it is correct."""

    correct: bool
    reason: str
    objects: tuple[FoundObject, ...]


_THING = rf"a (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_ONE = re.compile(rf"a photo of {_THING}")
_TWO = re.compile(rf"a photo of {_THING} (and|{'|'.join(RELATIONS)}) {_THING}")
_MANY = re.compile(rf"a photo of ({'|'.join(NUMBERS)}) ({'|'.join(SHAPES)})s")


def parse_caption(caption: str) -> Requirement:
    """What a caption asks for.

    Raises:
        ValueError: not a caption of this little world.
    """
    text = " ".join(caption.lower().split())
    if match := _ONE.fullmatch(text):
        return Requirement(((match[2], match[1]),))
    if match := _MANY.fullmatch(text):
        return Requirement(((match[2], None),) * NUMBERS[match[1]])
    if match := _TWO.fullmatch(text):
        relation = None if match[3] == "and" else match[3]
        return Requirement(((match[2], match[1]), (match[5], match[4])), relation)
    raise ValueError(
        f"the judge of shapes can not read the caption {caption!r}; it knows 'a photo of a red circle', "
        "'a photo of three squares', 'a photo of a circle left of a square', "
        "'a photo of a red circle and a blue square'"
    )


def to_tokens(picture: np.ndarray | Image.Image | Sequence[int]) -> np.ndarray:
    """Tokens `[24, 24]` of a picture: tokens in any shape of 576, or an image whose cells are read at their middle.

    Raises:
        ValueError: a picture of another size.
    """
    if isinstance(picture, Image.Image):
        pixels = np.asarray(picture.convert("RGB"), dtype=np.int64)
        height, width = pixels.shape[:2]
        if height < GRID[0] or width < GRID[1]:
            raise ValueError(f"a picture of {width} x {height} pixels has fewer than 24 x 24 cells")
        rows = (np.arange(GRID[0]) * 2 + 1) * height // (2 * GRID[0])
        columns = (np.arange(GRID[1]) * 2 + 1) * width // (2 * GRID[1])
        cells = pixels[rows][:, columns]
        return ((cells[:, :, None] - np.array(PALETTE)) ** 2).sum(-1).argmin(-1)
    tokens = np.asarray(picture)
    if tokens.size != GRID[0] * GRID[1]:
        raise ValueError(f"a picture of shapes has {GRID[0] * GRID[1]} tokens, got {tokens.size}")
    return tokens.reshape(GRID)


def _blots(picture: np.ndarray):
    """Connected cells (4 neighbours) of one colour, whatever their shade: (colour, cells `[n, 2]`)."""
    family = np.where(picture < NUM_BACKGROUNDS, -1, (picture - NUM_BACKGROUNDS) // SHADES)
    todo = {(int(row), int(column)) for row, column in zip(*np.nonzero(family >= 0), strict=True)}
    while todo:
        start = min(todo)  # raster order, so that the same picture always reads the same
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
    """The shape whose bitmap covers the cells best, or None when even the best is poor."""
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


def read_objects(picture) -> tuple[tuple[FoundObject, ...], int]:
    """Objects of a picture in raster order, and the number of blots that are no object."""
    objects, junk = [], 0
    for color, cells in _blots(to_tokens(picture)):
        if len(cells) < MIN_CELLS:
            continue
        shape = _shape_of(cells) if len(cells) >= MIN_OBJECT_CELLS else None
        if shape is None:
            junk += 1
            continue
        (top, left), (bottom, right) = cells.min(0), cells.max(0) + 1
        objects.append(FoundObject(shape, color, (int(left), int(top), int(right), int(bottom))))
    return tuple(objects), junk


def judge(picture, caption: str) -> Verdict:
    """Decide whether a picture shows what its caption says, and nothing else.

    Args:
        picture: tokens (576 of them, any shape) or a PIL image of at least 24 x 24 pixels.
        caption: a caption of this little world (see `parse_caption`).

    Raises:
        ValueError: a caption that can not be read, or a picture of another size.
    """
    requirement = parse_caption(caption)
    objects, junk = read_objects(picture)
    wanted = Counter(shape for shape, _ in requirement.objects)
    found = Counter(item.shape for item in objects)
    if junk:
        return Verdict(False, f"{junk} blot(s) that are no object", objects)
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
