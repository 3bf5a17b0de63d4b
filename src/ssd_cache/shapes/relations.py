"""Where one box lies relative to another: GenEval's rule, for its own scorer and for the judge of shapes.

Geometry of two boxes and nothing else. Source: github.com/djghosh13/geneval, evaluation/evaluate_images.py, written
anew from its rules.
"""

from __future__ import annotations

import math

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels or cells, y downwards, ends excluded."""


def relations(first: Box, second: Box, threshold: float = 0.1) -> set[str]:
    """Where the first box lies relative to the second: up to two of "left of", "right of", "above", "below".

    The offset of the centres is shrunk on each axis by `threshold` times both sizes, and must then be more than half
    of the whole, unshrunk distance. Two boxes 100 wide, side by side and 40 apart at their centres: 40 - 20 = 20 is not
    more than 40 / 2, so neither is left of the other; 41 apart, one is.
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
