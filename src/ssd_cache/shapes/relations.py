"""Relative position of two boxes by GenEval's rule, for the GenEval scorer and for the judge of shapes.

This module contains only geometry. Source: github.com/djghosh13/geneval, evaluation/evaluate_images.py, reimplemented
from its rules.
"""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels or cells, y downwards, ends excluded."""


def relations(first: Box, second: Box, threshold: float = 0.1) -> set[str]:
    """Position of the first box relative to the second: up to two of "left of", "right of", "above", "below".

    On each axis, the offset of the centres is reduced by `threshold` times the sum of both sizes. A relation holds if
    the reduced offset is more than half of the full distance between the centres. Example: two boxes are 100 wide, and
    their centres are 40 apart, side by side. 40 - 20 = 20 is not more than 40 / 2, so neither is left of the other. If
    the centres are 41 apart, one is.
    """
    offset, shrunk = [], []
    for axis in (0, 1):
        distance = (first[axis] + first[axis + 2] - second[axis] - second[axis + 2]) / 2
        sizes = (first[axis + 2] - first[axis]) + (second[axis + 2] - second[axis])
        offset.append(distance)
        shrunk.append(math.copysign(max(abs(distance) - threshold * sizes, 0), distance))
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    across, down = (value / math.hypot(*offset) for value in shrunk)
    found = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in found.items() if holds}
