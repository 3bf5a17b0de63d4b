"""Pixel-art scenes and their captions: the little world that shapes-janus was trained to draw.

A scene is a 24 x 24 grid of palette entries, one visual token a cell: a light background and one to four
objects (circle, square, triangle; six colours; a fill and a darker outline). Captions follow the six kinds
of GenEval (Ghosh et al. 2023). Nothing here looks at a model; reading pictures back is `judge.py`'s work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

GRID = (24, 24)
"""Rows and columns of visual tokens, Janus-Pro's own."""

TILE = 8
"""Objects stand on a lattice of tiles of this side, so that neighbours never touch."""

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "purple", "black")
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six kinds of caption, named as GenEval's tags."""

NUM_BACKGROUNDS = 3
PALETTE = (
    # three light backgrounds
    (245, 240, 230),
    (226, 238, 246),
    (236, 230, 243),
    # fill and outline of every colour, in the order of COLORS
    (222, 64, 56),
    (140, 28, 24),
    (74, 176, 92),
    (28, 98, 44),
    (62, 114, 214),
    (24, 54, 128),
    (246, 204, 64),
    (170, 128, 16),
    (150, 88, 196),
    (84, 38, 122),
    (84, 84, 88),
    (18, 18, 20),
)
"""RGB of every token."""

_OUTLINES = {
    "circle": ("..###..", ".#####.", "#######", "#######", "#######", ".#####.", "..###.."),
    "square": ("#######",) * 7,
    "triangle": ("...#...", "..###..", "..###..", ".#####.", ".#####.", "#######", "#######"),
}


def _bitmap(rows: tuple[str, ...]) -> np.ndarray:
    """`[7, 7]` of 0 outside, 1 fill, 2 outline: a cell of the body with an outside 4-neighbour is outline."""
    body = np.pad(np.array([[cell == "#" for cell in row] for row in rows]), 1)
    inner = body[1:-1, 1:-1] & body[:-2, 1:-1] & body[2:, 1:-1] & body[1:-1, :-2] & body[1:-1, 2:]
    return np.where(inner, 1, np.where(body[1:-1, 1:-1], 2, 0))


BITMAPS = {shape: _bitmap(rows) for shape, rows in _OUTLINES.items()}
"""`[7, 7]` a shape: 0 outside, 1 fill, 2 outline."""

OBJECT_SIZE = 7


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is and the cell (row, column) of its bounding box's upper left corner."""

    shape: str
    color: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A caption and a picture that meets it; `tokens` is `[rows * 24]`, raster order."""

    kind: str
    caption: str
    objects: tuple[SceneObject, ...]
    background: int
    tokens: np.ndarray


def draw(objects: tuple[SceneObject, ...], background: int = 0, rows: int = GRID[0]) -> np.ndarray:
    """Paint objects onto a background; returns tokens `[rows, 24]`, int64."""
    picture = np.full((rows, GRID[1]), background, dtype=np.int64)
    for item in objects:
        bitmap = BITMAPS[item.shape]
        fill = NUM_BACKGROUNDS + 2 * COLORS.index(item.color)
        view = picture[item.row : item.row + OBJECT_SIZE, item.column : item.column + OBJECT_SIZE]
        view[bitmap == 1] = fill
        view[bitmap == 2] = fill + 1
    return picture


def _caption(kind: str, rng: random.Random, max_count: int, relations: tuple[str, ...]):
    """Draw a caption; returns its text, the objects' (shape, colour) and the relation of the first to the second."""
    first, second = rng.sample(SHAPES, 2)
    color, other = rng.choice(COLORS), rng.choice(COLORS)
    if kind == "single_object":
        return f"a photo of a {first}", [(first, color)], None
    if kind == "two_object":
        return f"a photo of a {first} and a {second}", [(first, color), (second, other)], None
    if kind == "counting":
        number = rng.choice([word for word, count in NUMBERS.items() if count <= max_count])
        return f"a photo of {number} {first}s", [(first, color)] * NUMBERS[number], None
    if kind == "colors":
        return f"a photo of a {color} {first}", [(first, color)], None
    if kind == "position":
        relation = rng.choice(relations)
        return f"a photo of a {first} {relation} a {second}", [(first, color), (second, other)], relation
    if kind == "color_attr":
        color, other = rng.sample(COLORS, 2)
        return f"a photo of a {color} {first} and a {other} {second}", [(first, color), (second, other)], None
    raise ValueError(f"unknown kind of caption {kind!r}; the kinds are {', '.join(KINDS)}")


def _places(number: int, relation: str | None, tile_rows: int, rng: random.Random) -> list[tuple[int, int]]:
    """Tiles (row, column) for the objects: in the caption's order, or as the relation has it, in one row or column."""
    tile_columns = GRID[1] // TILE
    if relation is None:
        tiles = [(row, column) for row in range(tile_rows) for column in range(tile_columns)]
        return sorted(rng.sample(tiles, number))  # first named is first drawn
    sideways = relation in ("left of", "right of")
    before, after = sorted(rng.sample(range(tile_columns if sideways else tile_rows), 2))
    line = rng.randrange(tile_rows if sideways else tile_columns)
    pair = [(line, before), (line, after)] if sideways else [(before, line), (after, line)]
    return pair if relation in ("left of", "above") else pair[::-1]


def make_scene(rng: random.Random, kind: str | None = None, rows: int = GRID[0]) -> Scene:
    """A random scene with a caption that it meets.

    Args:
        rng: the source of chance; the same state gives the same scene.
        kind: one of `KINDS`; drawn evenly when not given.
        rows: height in cells, a multiple of 8. Training begins on lower pictures, whose captions leave out
            what does not fit (four objects, above and below).

    Raises:
        ValueError: unknown kind, or a height that is no multiple of 8 up to 24.
    """
    if rows not in range(TILE, GRID[0] + 1, TILE):
        raise ValueError(f"rows={rows}: a scene is 8, 16 or 24 rows high")
    kind = rng.choice(KINDS) if kind is None else kind
    tile_rows = rows // TILE
    caption, things, relation = _caption(
        kind, rng, max_count=3 * tile_rows, relations=RELATIONS if tile_rows > 1 else RELATIONS[:2]
    )
    shift_row, shift_column = rng.randrange(2), rng.randrange(2)  # the lattice as a whole moves, so gaps stay
    places = _places(len(things), relation, tile_rows, rng)
    objects = tuple(
        SceneObject(shape, color, row * TILE + shift_row, column * TILE + shift_column)
        for (shape, color), (row, column) in zip(things, places, strict=True)
    )
    background = rng.randrange(NUM_BACKGROUNDS)
    return Scene(kind, caption, objects, background, draw(objects, background, rows).reshape(-1))


def make_prompts(num_per_kind: int, seed: int = 0) -> list[tuple[str, str]]:
    """Captions to draw from, `num_per_kind` of every kind, as (kind, caption), the same for the same seed."""
    rng = random.Random(f"prompts-{seed}")
    return [(kind, _caption(kind, rng, 4, RELATIONS)[0]) for kind in KINDS for _ in range(num_per_kind)]
