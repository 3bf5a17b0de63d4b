"""The grids of one image: its grid of visual tokens, preceded by the draft grids that some models generate first.

Visual tokens come grid by grid, and row by row within a grid. Token numbers follow this order. `model_grids.py` has the
grids of each model, and `head_map/checks.py` checks that a grid is valid.
"""

from __future__ import annotations

from collections.abc import Sequence

Grid = tuple[int, int]
"""Rows and columns in visual tokens; end-of-line tokens are the last columns of a row."""


def count_cells(grid: Grid, previews: Sequence[Grid] = ()) -> int:
    """Number of visual tokens of an image, draft grids included.

    >>> count_cells((36, 24), [(19, 13)])
    1111
    """
    return sum(rows * columns for rows, columns in (*previews, grid))


def row_lengths(grid: Grid, previews: Sequence[Grid] = ()) -> list[int]:
    """Number of visual tokens in every row, in the order in which they are generated.

    >>> row_lengths((3, 2), [(2, 5)])
    [5, 5, 2, 2, 2]
    """
    return [columns for rows, columns in (*previews, grid) for _ in range(rows)]


def previews_entry(previews: Sequence[Grid]) -> dict[str, list[list[int]]]:
    """Entry for draft grids in the JSON record of a run; empty without draft grids, as in older records."""
    return {"previews": [list(preview) for preview in previews]} if previews else {}


def format_rasters(previews: Sequence[Grid], grid: Grid, times: str = "x") -> str:
    """Grids in the order in which they are generated: "24x24", or "19x13+36x24" with a draft grid."""
    return "+".join(f"{rows}{times}{columns}" for rows, columns in (*previews, grid))
