"""Icons as visual tokens: the codebook, the tokens of every icon, and images from them.

An image is a grid of 24 x 24 cells of 4 x 4 pixels. The first eight tokens are backgrounds. The others are the codes of
a k-means codebook of RGBA cells, premultiplied by alpha. An icon's edge therefore has the same tokens on every
background, and a shift of the icon by whole cells shifts its tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ssd_cache.emoji.captions import BACKGROUNDS, STYLES, SUBJECTS

GRID = (24, 24)
"""Rows and columns of visual tokens, as in Janus-Pro."""

ICON_SIDE = 18
"""Rows and columns of an icon in cells; it lies anywhere in the grid, at whole cells."""

NUM_TOKENS = 1024
"""Different visual tokens of `load_icons`: the backgrounds and the codes."""

CELL = 4
"""Side of a cell in pixels."""

CLEAR = -1
"""In an icon's grid, a cell without any of the icon."""

BACKGROUND_RGB = np.array(tuple(BACKGROUNDS.values()), dtype=np.float32) / 255
"""`[backgrounds, 3]`; a background's index is its token."""


@dataclass(frozen=True)
class Icons:
    """All icons and their codebook.

    Args:
        codes: premultiplied RGBA cells of the tokens after the backgrounds, float32 in [0, 1], `[codes, 4, 4, 4]`
            (row, column, channel).
        grids: tokens, int64 `[subjects, styles, flips, 18, 18]`, `CLEAR` outside the icon; the second flip is the
            icon mirrored from left to right.
    """

    codes: np.ndarray
    grids: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(BACKGROUNDS) + len(self.codes)


@lru_cache(maxsize=1)
def load_icons() -> Icons:
    """Load the icons that emoji-janus was trained on."""
    return read_icons(Path(__file__).with_name("icons.npz"))


def read_icons(path: Path) -> Icons:
    """Read icons from a file that `examples/prepare_emoji_data.py` wrote.

    Raises:
        ValueError: a file with other subjects or styles, or with a token outside its codebook.
    """
    with np.load(path, allow_pickle=False) as file:
        icons = Icons(file["codes"].astype(np.float32) / 255, file["grids"].astype(np.int64))
    expected = (len(SUBJECTS), len(STYLES), 2, ICON_SIDE, ICON_SIDE)
    if icons.grids.shape != expected or icons.codes.shape[1:] != (CELL, CELL, 4):
        raise ValueError(
            f"{path} holds icons {icons.grids.shape} of cells {icons.codes.shape[1:]}; expected {expected} and "
            f"{(CELL, CELL, 4)}: prepare the data again with this version"
        )
    if icons.grids.min() < CLEAR or icons.grids.max() >= icons.num_tokens:
        raise ValueError(f"{path} has tokens outside its codebook of {icons.num_tokens}: prepare the data again")
    return icons


def place(grid: np.ndarray, background: int, row: int, column: int, rows: int = GRID[0]) -> np.ndarray:
    """Place an icon's grid `[18, 18]` on a background; returns tokens `[rows, 24]`, int64.

    Raises:
        ValueError: the icon does not lie inside the image.
    """
    if not (0 <= row <= rows - ICON_SIDE and 0 <= column <= GRID[1] - ICON_SIDE):
        raise ValueError(
            f"an icon of {ICON_SIDE} cells at row {row}, column {column} leaves an image of {rows} x {GRID[1]} cells"
        )
    tokens = np.full((rows, GRID[1]), background, dtype=np.int64)
    view = tokens[row : row + ICON_SIDE, column : column + ICON_SIDE]
    view[grid != CLEAR] = grid[grid != CLEAR]
    return tokens


def make_image(rng: random.Random, combination: tuple[str, str, str], rows: int = GRID[0]) -> np.ndarray:
    """Make an image of (subject, style, background), mirrored or not, anywhere; returns tokens `[rows, 24]`."""
    subject, style, background = combination
    grid = load_icons().grids[tuple(SUBJECTS).index(subject), STYLES.index(style), rng.randrange(2)]
    row, column = rng.randrange(rows - ICON_SIDE + 1), rng.randrange(GRID[1] - ICON_SIDE + 1)
    return place(grid, tuple(BACKGROUNDS).index(background), row, column, rows)


def background_of(tokens: np.ndarray) -> int | None:
    """The most frequent background among tokens of any shape, or None if no token is a background."""
    counts = np.bincount(tokens[tokens < len(BACKGROUNDS)], minlength=len(BACKGROUNDS))
    return int(counts.argmax()) if counts.any() else None


def to_pixels(tokens: np.ndarray) -> np.ndarray:
    """Decode tokens `[rows, columns]` by the codebook alone to RGB in [0, 1], float32 `[4 * rows, 4 * columns, 3]`.

    Partly transparent cells get the most frequent background of the image, or black if it has none. The model's VQ
    decoder, which is trained, makes smoother images.
    """
    rows, columns = tokens.shape
    background = background_of(tokens)
    behind = np.zeros(3, dtype=np.float32) if background is None else BACKGROUND_RGB[background]
    flat = np.broadcast_to(BACKGROUND_RGB[:, None, None], (len(BACKGROUNDS), CELL, CELL, 3))
    codes = load_icons().codes
    table = np.concatenate([flat, codes[..., :3] + behind * (1 - codes[..., 3:])])
    cells = table[tokens]  # [rows, columns, cell row, cell column, 3]
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * CELL, columns * CELL, 3)
