"""The rasters of one picture: its grid of visual tokens, and before it the previews that some models draw first.

Visual tokens come raster by raster, each row by row, so a token's number and the rows of all rasters are in one order.
Which grids a model has is in `model_grids.py`; what a grid may be is checked in `head_map_checks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

Grid = tuple[int, int]
"""Rows and columns in visual tokens; tokens that end a row are its last columns."""


def count_cells(grid: Grid, previews: Sequence[Grid] = ()) -> int:
    """Visual tokens of a picture, previews included.

    >>> count_cells((36, 24), [(19, 13)])
    1111
    """
    return sum(rows * columns for rows, columns in (*previews, grid))


def row_lengths(grid: Grid, previews: Sequence[Grid] = ()) -> list[int]:
    """Visual tokens in every row, in the order in which they are drawn.

    >>> row_lengths((3, 2), [(2, 5)])
    [5, 5, 2, 2, 2]
    """
    return [columns for rows, columns in (*previews, grid) for _ in range(rows)]


def previews_entry(previews: Sequence[Grid]) -> dict[str, list[list[int]]]:
    """What the JSON record of a run says of previews: nothing where there are none, as records did before."""
    return {"previews": [list(preview) for preview in previews]} if previews else {}


def format_rasters(previews: Sequence[Grid], grid: Grid, times: str = "x") -> str:
    """Grids in the order in which they are drawn: "24x24", or "19x13+36x24" with a preview."""
    return "+".join(f"{rows}{times}{columns}" for rows, columns in (*previews, grid))
