"""The steps of an image that are timed: all, or one stretch (range of steps) around the middle of each quarter.

Steps of a full cache become slower along the image, so timing only early steps would favour it. One stretch per quarter
gives the mean of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_STRETCHES = 4


@dataclass(frozen=True)
class Stretch:
    """Visual tokens `start` to `start + num_tokens - 1` of an image; tokens before `start` are not generated."""

    start: int
    num_tokens: int

    @property
    def positions(self) -> range:
        """Visual tokens that the timed steps feed. The first step is not timed: it contains the start of the call.

        The first step of a whole image feeds the prompt, so the first timed step feeds visual token 0.
        """
        first = self.start + 1 if self.start else 0
        return range(first, first + self.num_tokens - 1)


def choose_stretches(num_cells: int, num_tokens: int | None) -> list[Stretch]:
    """Choose one stretch for a whole image, or four stretches with `num_tokens` steps in total.

    Args:
        num_cells: visual tokens of the image.
        num_tokens: steps to generate; None for all. A multiple of 4 grid rows has evictions in their true proportion.

    Raises:
        ValueError: fewer than 8 tokens, or as many as the image has.
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
    """The last two steps of an image, when a cache is at its largest."""
    return [Stretch(num_cells - 2, 2)]
