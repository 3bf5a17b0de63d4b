"""The judge: finds the icon that an image shows and decides whether the image meets its caption.

It compares the image with every icon, mirrored or not, at every place, by the squared distance of pixels. It uses no
neural network. An image that is unlike every icon shows nothing and fails, whatever its caption names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from ssd_cache.emoji.captions import BACKGROUNDS, STYLES, SUBJECTS, parse_caption
from ssd_cache.emoji.icons import BACKGROUND_RGB, CELL, CLEAR, GRID, ICON_SIDE, load_icons, to_pixels

CELL_PIXELS = 2
"""Side of a cell in pixels when images are compared; the image is reduced to 48 x 48."""

MAX_ERROR = 0.15
"""Maximum squared distance from the nearest icon, as a share of that icon's own from an empty background.

Of 500 images whose upper half is of one icon and the lower half of another, 16 are nearer than this to one of the two,
and 97% of icons with 5% of their tokens drawn anew are."""

MAX_TINT = 0.06
"""Maximum distance of a cell's colour from a background's for the cell to count as that background."""


@dataclass(frozen=True)
class Verdict:
    """The judgement on one image; `reason` is empty when it is correct.

    `subject`, `style` and `background` are those of the nearest icon, or None in an image that shows none. `error` is
    the squared distance from it, as a share of the icon's own from an empty background; 1 or more is no resemblance.
    """

    correct: bool
    reason: str
    subject: str | None
    style: str | None
    background: str | None
    error: float


def judge(image: np.ndarray | Image.Image | Sequence[int], caption: str) -> Verdict:
    """Decide whether an image shows the subject, style and background that its caption names, and nothing else.

    Args:
        image: 576 tokens in any shape, or a PIL image of at least 48 x 48 pixels.
        caption: a caption that `parse_caption` accepts.

    Raises:
        ValueError: a caption that cannot be read, an image of another size, or a token outside the codebook.
    """
    request = parse_caption(caption)
    subject, style, background, error = read_image(image)
    if background is None:
        reason = "no background"
    elif subject is None:
        reason = f"no icon: the nearest one differs by {error:.2f}, more than {MAX_ERROR}"
    elif subject != request.subject:
        reason = f"expected {request.subject}, found {subject}"
    elif request.style not in (None, style):
        reason = f"expected {request.style} style, found {style}"
    elif request.background not in (None, background):
        reason = f"expected a {request.background} background, found {background}"
    else:
        reason = ""
    return Verdict(not reason, reason, subject, style, background, error)


def read_image(
    image: np.ndarray | Image.Image | Sequence[int],
) -> tuple[str | None, str | None, str | None, float]:
    """Find the subject, style and background of an image, and the error of the nearest icon (see `Verdict`).

    Raises:
        ValueError: an image of another size, or a token outside the codebook.
    """
    pixels = _reduce(image)
    background = _background(pixels)
    if background is None:
        return None, None, None, 1.0
    references, energies = _references(background)
    rest = pixels - BACKGROUND_RGB[background]
    side = ICON_SIDE * CELL_PIXELS
    windows = np.lib.stride_tricks.sliding_window_view(rest, (side, side), (0, 1))[::CELL_PIXELS, ::CELL_PIXELS]
    windows = windows.transpose(0, 1, 3, 4, 2).reshape(-1, side * side * 3)  # [places, pixels]
    # |image - reference|^2 over the whole image, for every place and reference
    distances = (rest**2).sum() - 2 * windows @ references.T + energies
    nearest = int(distances.min(0).argmin())
    error = max(0.0, float(distances[:, nearest].min() / energies[nearest]))
    name = tuple(BACKGROUNDS)[background]
    if error > MAX_ERROR:
        return None, None, name, error
    subject, style, _ = np.unravel_index(nearest, (len(SUBJECTS), len(STYLES), 2))
    return SUBJECTS[subject], STYLES[style], name, error


def _reduce(image: np.ndarray | Image.Image | Sequence[int]) -> np.ndarray:
    """Pixels `[48, 48, 3]` in [0, 1] of tokens or of an image."""
    height, width = GRID[0] * CELL_PIXELS, GRID[1] * CELL_PIXELS
    if isinstance(image, Image.Image):
        if image.width < width or image.height < height:
            raise ValueError(
                f"an image of {image.width} x {image.height} pixels is too small for the judge of emoji, which "
                f"compares {width} x {height}"
            )
        small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32) / 255
    tokens = np.asarray(image)
    if tokens.size != GRID[0] * GRID[1]:
        raise ValueError(f"an image of emoji has {GRID[0] * GRID[1]} tokens, got {tokens.size}")
    limit = load_icons().num_tokens
    if tokens.min() < 0 or tokens.max() >= limit:
        raise ValueError(f"tokens of emoji are 0 to {limit - 1}, got {tokens.min()} to {tokens.max()}")
    return _halve(to_pixels(tokens.reshape(GRID)))


def _halve(pixels: np.ndarray) -> np.ndarray:
    """Reduce cells of 4 x 4 pixels to cells of `CELL_PIXELS`, by means; `[..., height, width, channels]`."""
    *shape, height, width, channels = pixels.shape
    step = CELL // CELL_PIXELS
    return pixels.reshape(*shape, height // step, step, width // step, step, channels).mean((-4, -2))


def _background(pixels: np.ndarray) -> int | None:
    """The background with most cells of its colour; None if fewer than a tenth of all cells have one's colour."""
    cells = pixels.reshape(GRID[0], CELL_PIXELS, GRID[1], CELL_PIXELS, 3).mean((1, 3))
    tint = np.linalg.norm(cells[:, :, None] - BACKGROUND_RGB, axis=-1)  # [rows, columns, backgrounds]
    counts = (tint < MAX_TINT).sum((0, 1))
    return int(counts.argmax()) if counts.max() >= GRID[0] * GRID[1] // 10 else None


@lru_cache(maxsize=len(BACKGROUNDS))
def _references(background: int) -> tuple[np.ndarray, np.ndarray]:
    """Icons on a background, minus its colour, `[icons, pixels]`, and their squared norms `[icons]`."""
    icons = load_icons()
    clear = np.zeros((1, CELL, CELL, 4), dtype=np.float32)
    table = np.concatenate([clear, icons.codes])
    grids = np.where(icons.grids == CLEAR, 0, icons.grids - len(BACKGROUNDS) + 1).reshape(-1, ICON_SIDE, ICON_SIDE)
    cells = table[grids].transpose(0, 1, 3, 2, 4, 5)
    rgba = _halve(cells.reshape(len(grids), ICON_SIDE * CELL, ICON_SIDE * CELL, 4))
    references = (rgba[..., :3] - rgba[..., 3:] * BACKGROUND_RGB[background]).reshape(len(grids), -1)
    return references, (references**2).sum(1)
