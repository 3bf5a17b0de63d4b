"""Pixel-art scenes and their captions: the data set that shapes-janus was trained on.

A scene is a 24 x 24 grid of palette entries, one visual token per cell. It has a light background and one to four
objects (circle, square, triangle; six colours, each in three shades). Captions follow the six kinds of GenEval
(Ghosh et al. 2023). No model is used here; `shapes/judge.py` reads objects from images.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

GRID = (24, 24)
"""Rows and columns of visual tokens, as in Janus-Pro."""

TILE = 8
"""Side of a tile in cells. Every object lies inside one tile, away from one edge, so that neighbours never touch."""

BACKGROUNDS = ((245, 240, 230), (226, 238, 246), (236, 230, 243))
COLOR_SHADES = {
    "red": ((250, 138, 126), (222, 64, 56), (140, 28, 24)),
    "green": ((144, 220, 150), (74, 176, 92), (28, 98, 44)),
    "blue": ((136, 182, 250), (62, 114, 214), (24, 54, 128)),
    "yellow": ((255, 236, 150), (246, 204, 64), (170, 128, 16)),
    "purple": ((204, 156, 238), (150, 88, 196), (84, 38, 122)),
    "black": ((146, 146, 152), (84, 84, 88), (18, 18, 20)),
}
"""RGB of the light, middle and dark shade of every colour."""

PALETTE = (*BACKGROUNDS, *(shade for shades in COLOR_SHADES.values() for shade in shades))
"""RGB of every token."""

NUM_BACKGROUNDS, SHADES = len(BACKGROUNDS), 3

SHAPES = ("circle", "square", "triangle")
COLORS = tuple(COLOR_SHADES)
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six kinds of caption, named as GenEval's tags."""

# Lit from the upper left. All rows of the three shapes differ, so a row determines the rows below it, as in most
# natural images. A cache that keeps little more than a row can therefore still complete an object.
_SHADING = {
    "circle": (" +++ ", "++###", "+###-", "###--", " --- "),
    "square": ("+++++", "++##-", "+#+#-", "+##+-", "+----"),
    "triangle": ("  +  ", " +#- ", " +-- ", "+##--", "-----"),
}

BITMAPS = {shape: np.array([[" +#-".index(cell) for cell in row] for row in rows]) for shape, rows in _SHADING.items()}
"""`[5, 5]` a shape: 0 outside, 1 light, 2 middle, 3 dark."""

OBJECT_SIZE = 5


@dataclass(frozen=True)
class SceneObject:
    """One object: its shape, its colour, and the cell (row, column) of its bounding box's upper left corner."""

    shape: str
    color: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A caption and an image that meets it; `tokens` is `[rows * 24]`, in raster order."""

    kind: str
    caption: str
    objects: tuple[SceneObject, ...]
    background: int
    tokens: np.ndarray


def draw(objects: tuple[SceneObject, ...], background: int = 0, rows: int = GRID[0]) -> np.ndarray:
    """Paint objects onto a background; returns tokens `[rows, 24]`, int64."""
    tokens = np.full((rows, GRID[1]), background, dtype=np.int64)
    for item in objects:
        bitmap = BITMAPS[item.shape]
        lightest = NUM_BACKGROUNDS + SHADES * COLORS.index(item.color)
        view = tokens[item.row : item.row + OBJECT_SIZE, item.column : item.column + OBJECT_SIZE]
        view[bitmap > 0] = lightest + bitmap[bitmap > 0] - 1
    return tokens


def _caption(kind: str, rng: random.Random, max_count: int, relations: tuple[str, ...]):
    """Sample a caption; returns its text, the objects' (shape, colour) and the relation of the first to the second."""
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


def _tiles(kind: str, number: int, relation: str | None, tile_rows: int, rng: random.Random) -> list[tuple[int, int]]:
    """Choose tiles (row, column) for the objects, in the order in which the caption names them.

    Counted objects lie in one row, or in two rows of two for four objects. Objects with a relation share a row or a
    column of tiles. Other objects lie anywhere, in raster order of their names in the caption.
    """
    columns = range(GRID[1] // TILE)
    if kind == "counting":
        rows = sorted(rng.sample(range(tile_rows), 2 if number == 4 else 1))
        across = sorted(rng.sample(columns, number // len(rows)))
        return [(row, column) for row in rows for column in across]
    if relation is None:
        return sorted(rng.sample([(row, column) for row in range(tile_rows) for column in columns], number))
    sideways = relation in ("left of", "right of")
    before, after = sorted(rng.sample(columns if sideways else range(tile_rows), 2))
    line = rng.choice(range(tile_rows) if sideways else columns)
    pair = [(line, before), (line, after)] if sideways else [(before, line), (after, line)]
    return pair if relation in ("left of", "above") else pair[::-1]


def make_scene(rng: random.Random, kind: str | None = None, rows: int = GRID[0]) -> Scene:
    """Make a random scene with a caption that it meets.

    Args:
        rng: the random generator; the same state gives the same scene.
        kind: one of `KINDS`; chosen uniformly when not given.
        rows: height in cells, a multiple of 8. Training begins with images of fewer rows, whose captions omit content
            that does not fit (four objects, above and below).

    Raises:
        ValueError: unknown kind, or a height that is not a multiple of 8 up to 24.
    """
    if rows not in range(TILE, GRID[0] + 1, TILE):
        raise ValueError(f"rows={rows}: a scene is 8, 16 or 24 rows high")
    kind = rng.choice(KINDS) if kind is None else kind
    tile_rows = rows // TILE
    caption, things, relation = _caption(
        kind, rng, max_count=3 if tile_rows == 1 else 4, relations=RELATIONS if tile_rows > 1 else RELATIONS[:2]
    )
    tiles = _tiles(kind, len(things), relation, tile_rows, rng)
    spare = TILE - OBJECT_SIZE
    # objects of one row of tiles start on the same row of cells, so that raster order keeps the order of the tiles
    down = [rng.randrange(spare) for _ in range(tile_rows)]
    objects = tuple(
        SceneObject(shape, color, row * TILE + down[row], column * TILE + rng.randrange(spare))
        for (shape, color), (row, column) in zip(things, tiles, strict=True)
    )
    background = rng.randrange(NUM_BACKGROUNDS)
    return Scene(kind, caption, objects, background, draw(objects, background, rows).reshape(-1))


def make_prompts(num_per_kind: int, seed: int = 0) -> list[tuple[str, str]]:
    """Make prompts, `num_per_kind` of every kind, as (kind, caption); the same seed gives the same prompts."""
    rng = random.Random(f"prompts-{seed}")
    return [(kind, _caption(kind, rng, 4, RELATIONS)[0]) for kind in KINDS for _ in range(num_per_kind)]
