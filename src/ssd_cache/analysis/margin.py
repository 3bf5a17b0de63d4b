"""A permutation test: do the margin columns of a grid hold more of a sum than expected by chance?

It works on sums over cells; `concentration.py` computes these sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_SHIFTS = 9999


@dataclass(frozen=True)
class MarginTest:
    """Result of a test whether the margin columns hold more of a sum over the grid than expected by chance.

    Attributes:
        share: the share of the sum in the first and the last column.
        chance: the average share of two columns.
        p_value: fraction of random shifts with at least this `share`; the unshifted data counts as one shift.
        num_units: number of images.
    """

    share: float
    chance: float
    p_value: float
    num_units: int


def margin_test(difference: torch.Tensor, columns: int, *, num_shifts: int = NUM_SHIFTS, seed: int = 0) -> MarginTest:
    """Test the share of the first and the last column against cyclic shifts of the columns.

    The null hypothesis is that margin columns are like all other columns, so a cyclic shift changes nothing. The test
    shifts each image by a random number of columns, all rows together, and repeats this `num_shifts` times. The first
    and the last column stay neighbours. Correlations between neighbouring rows and columns are also kept, so an object
    in an image does not give a false positive. p = (1 + shifts with at least the true share) / (1 + num_shifts). With
    one image of 24 columns, p cannot fall below about 1/24, so generate several images.

    Args:
        difference: `[images, tokens]`, not negative; an incomplete last row is ignored.
        columns: number of grid columns.
        num_shifts: number of random shifts.
        seed: seed of the random shifts.

    Raises:
        ValueError: there are fewer than three columns, or no complete row.
    """
    num_images, tokens = difference.shape
    if columns < 3 or tokens < columns:
        raise ValueError(
            f"{tokens} tokens on a grid of {columns} columns: the margin test needs three columns and a complete row"
        )
    by_column = difference[:, : tokens // columns * columns].double().cpu().unflatten(1, (-1, columns)).sum(1)
    pairs = by_column + by_column.roll(1, dims=1)  # [:, s]: sum in the margins after a shift by s; s = 0 is unshifted
    total = by_column.sum().clamp(min=1e-300)
    share = (pairs[:, 0].sum() / total).item()
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(columns, (num_images, num_shifts), generator=generator)
    shifted = pairs.gather(1, shifts).sum(0) / total
    hits = int((shifted >= share * (1 - 1e-9)).sum())  # a different order of summation may change the last digits
    return MarginTest(share, 2 / columns, (1 + hits) / (1 + num_shifts), num_images)
