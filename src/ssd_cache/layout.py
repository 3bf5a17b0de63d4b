"""`ImageLayout`: the grids of one image, its grid of visual tokens and the draft grids that some models generate first.

Visual tokens come grid by grid, and row by row within a grid. Token numbers follow this order. `model_grids.py` has the
layouts of each model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ssd_cache.io.showing import shown

Grid = tuple[int, int]
"""Rows and columns in visual tokens; end-of-line tokens are the last columns of a row."""

MAX_SIDE, MAX_DRAFT_GRIDS = 4096, 8


@dataclass(frozen=True)
class ImageLayout:
    """The grids of one image; raises ValueError for a side below 1 or above 4096, or more than 8 draft grids.

    Attributes:
        grid: rows and columns of the image.
        draft_grids: grids that the model generates before the image, in order, as GLM-Image does; usually none.

    Example:
        >>> layout = ImageLayout((36, 24), ((19, 13),))
        >>> str(layout), layout.num_tokens
        ('19x13+36x24', 1111)
    """

    grid: Grid
    draft_grids: tuple[Grid, ...] = ()

    def __post_init__(self):
        if not isinstance(self.draft_grids, (tuple, list)) or len(self.draft_grids) > MAX_DRAFT_GRIDS:
            raise ValueError(
                f"previews={shown(self.draft_grids)}; give at most {MAX_DRAFT_GRIDS} draft grids, like [(19, 13)]"
            )
        object.__setattr__(self, "grid", _checked(self.grid))
        object.__setattr__(self, "draft_grids", tuple(map(_checked, self.draft_grids)))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """All grids in the order of their tokens; the grid of the image is the last."""
        return (*self.draft_grids, self.grid)

    @property
    def num_draft_tokens(self) -> int:
        """Number of visual tokens of the draft grids."""
        return sum(rows * columns for rows, columns in self.draft_grids)

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens of an image, draft grids included."""
        return self.num_draft_tokens + self.grid[0] * self.grid[1]

    @property
    def row_lengths(self) -> list[int]:
        """Number of visual tokens in every row of every grid."""
        return [columns for rows, columns in self.grids for _ in range(rows)]

    @property
    def widest(self) -> int:
        """Number of columns of the widest grid."""
        return max(columns for _, columns in self.grids)

    def text(self, times: str = " x ") -> str:
        """The grids for a message: "24 x 24", or "19 x 13+36 x 24" with a draft grid."""
        return "+".join(f"{rows}{times}{columns}" for rows, columns in self.grids)

    def __str__(self) -> str:
        return self.text("x")

    def as_json(self) -> dict[str, Any]:
        """Entries for the JSON record of a run; `previews` only if there are draft grids, as in older records."""
        entries: dict[str, Any] = {"grid": list(self.grid)}
        return entries | ({"previews": [list(grid) for grid in self.draft_grids]} if self.draft_grids else {})


def _checked(grid: Any) -> Grid:
    sides = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        raise ValueError(f"grid={shown(grid)}; give (rows, columns), integers from 1 to {MAX_SIDE}, like (24, 24)")
    return sides
