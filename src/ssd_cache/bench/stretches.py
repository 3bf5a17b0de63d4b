"""Which steps of a picture are drawn: all of them, or stretches around the middles of its four quarters.

Steps of a full cache grow, so a few early ones would flatter it; a stretch of each quarter has the mean of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_STRETCHES = 4


@dataclass(frozen=True)
class Stretch:
    """Visual tokens `start` to `start + num_tokens - 1` of a picture; nothing is drawn before `start`."""

    start: int
    num_tokens: int

    @property
    def positions(self) -> range:
        """Visual tokens that the timed steps feed; the first step is not timed, a call's beginning is in it.

        The first step of a whole picture is the prompt's, so that the first one timed feeds visual token 0.
        """
        first = self.start + 1 if self.start else 0
        return range(first, first + self.num_tokens - 1)


def choose_stretches(num_cells: int, num_tokens: int | None) -> list[Stretch]:
    """One stretch for a whole picture, or four that have `num_tokens` steps together.

    Args:
        num_cells: visual tokens of the picture.
        num_tokens: steps to draw; None for all. A multiple of 4 grid rows has evictions in their true proportion.

    Raises:
        ValueError: fewer than 8 tokens, or as many as the picture has.
    """
    if num_tokens is None:
        return [Stretch(0, num_cells)]
    least = 2 * NUM_STRETCHES
    if not least <= num_tokens < num_cells:
        raise ValueError(
            f"{num_tokens} tokens to draw: give {least} to {num_cells - 1}, a stretch in each quarter of the picture's "
            f"{num_cells}, or none for all"
        )
    length = num_tokens // NUM_STRETCHES
    middles = [(2 * quarter + 1) * num_cells // (2 * NUM_STRETCHES) for quarter in range(NUM_STRETCHES)]
    return [Stretch(max(1, middle - length // 2), length) for middle in middles]


def last_steps(num_cells: int) -> list[Stretch]:
    """The last two steps of a picture, when a cache is at its largest."""
    return [Stretch(num_cells - 2, 2)]
