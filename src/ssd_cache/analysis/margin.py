"""A permutation test: do the margin columns of a grid hold more of a sum than expected by chance?

It works on sums over cells; `concentration.py` computes these sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

NUM_SHIFTS = 9999


@dataclass(frozen=True)
class MarginTest:
    """Whether the margin columns hold more of a sum over the grid than chance would give them.

    Attributes:
        share: what the first and the last column hold.
        chance: what two of the columns hold on average.
        p_value: share of random shifts, this picture itself counted as one, with at least this `share`.
        num_units: pictures, or rows of pictures, that were shifted on their own.
    """

    share: float
    chance: float
    p_value: float
    num_units: int


def margin_test(
    difference: torch.Tensor,
    columns: int,
    *,
    unit: Literal["picture", "row"] = "picture",
    num_shifts: int = NUM_SHIFTS,
    seed: int = 0,
) -> MarginTest:
    """Test the share of the first and the last column against cyclic shifts of the columns.

    If margins were columns like all others, turning a picture round by some columns would change nothing. So each
    picture is turned by a random number of columns, all of its rows together, `num_shifts` times. First and last
    column stay neighbours, and what is alike in neighbouring rows and columns stays so: an object in a picture does not
    pass for a finding. p = (1 + shifts with at least the true share) / (1 + num_shifts). With one picture of 24
    columns it cannot fall below about 1/24: draw several.

    Args:
        difference: `[pictures, tokens]`, not negative; a last row that is not complete is left out.
        columns: of the grid.
        unit: what is turned on its own. "row" turns every row by itself, which takes rows of a picture for
            independent of each other; where they are not, its p is too small.
        num_shifts: random shifts.
        seed: of the shifts.

    Raises:
        ValueError: fewer than three columns, or not one complete row.
    """
    if columns < 3 or difference.shape[1] < columns:
        raise ValueError(
            f"{difference.shape[1]} tokens on a grid of {columns} columns: margins need three columns and a whole row"
        )
    pictures, tokens = difference.shape
    complete = tokens // columns * columns
    units = difference[:, :complete].double().cpu().reshape(pictures, -1, columns)
    units = units.sum(1) if unit == "picture" else units.flatten(0, 1)
    pairs = units + units.roll(1, dims=1)  # [:, s]: what the margins hold when turned by s; 0 is the truth
    total = units.sum().clamp(min=1e-300)
    share = (pairs[:, 0].sum() / total).item()
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(columns, (len(units), num_shifts), generator=generator)
    shifted = pairs.gather(1, shifts).sum(0) / total
    hits = int((shifted >= share * (1 - 1e-9)).sum())  # sums in another order may differ in the last digits
    return MarginTest(share, min(2, columns) / columns, (1 + hits) / (1 + num_shifts), len(units))
