"""`History`: what the page shows of one run, with its curves, its two images, and the held tokens after every row.

It is kept for a visitor until the next run, so that held tokens of any row can be shown. Nothing is drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from rich.filesize import decimal

from ssd_cache.app.drawing import HEADS, draw_held
from ssd_cache.app.generation import FULL, Frame

POLICY = "policy"
"""Name of the policy's curve, whichever policy it is."""


@dataclass
class History:
    """One run so far, which `add` extends.

    Attributes:
        grid: rows and columns of visual tokens.
        points: of the curves: percent of the visual tokens, name of the curve, MB of K and V, tokens per second.
        newest: the newest frame of each image, by name.
        held: for every row of the policy's image, the shares of `held_shares`.
    """

    grid: tuple[int, int]
    points: list[tuple[float, str, float, float | None]] = field(default_factory=list)
    newest: dict[str, Frame] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)

    def add(self, frame: Frame) -> None:
        """Add the next frame of either image."""
        self.newest[frame.name] = frame
        curve = FULL if frame.name == FULL else POLICY
        share = 100 * frame.num_tokens / (self.grid[0] * self.grid[1])
        self.points.append((share, curve, frame.nbytes / 1e6, frame.tokens_per_second))
        if frame.held is not None:
            self.held.append(frame.held)

    def draw_held(self, row: object, heads: object) -> Image.Image | None:
        """The newest image of the policy under the tokens held after a row, counted from 1; None without such a row.

        Args:
            row: a number; from a visitor, it may be of any type and value.
            heads: one of `HEADS`; from a visitor, too.
        """
        images = [frame.image for name, frame in self.newest.items() if name != FULL]
        if not images or images[0] is None or heads not in HEADS:
            return None
        if not isinstance(row, int | float) or not 1 <= row <= len(self.held):
            return None
        return draw_held(images[0], self.grid, self.held[int(row) - 1][HEADS.index(heads)])

    def progress(self) -> str:
        """A line on the run, and a line on each image: the bytes held, and the speed of its newest row."""
        rows, columns = self.grid
        num_rows = min(frame.num_tokens for frame in self.newest.values()) // columns
        lines = [f"row {num_rows} of {rows}" if num_rows < rows or len(self.newest) < 2 else self._result()]
        for name, frame in self.newest.items():
            speed = "" if frame.tokens_per_second is None else f", {frame.tokens_per_second:.0f} tokens/s"
            lines.append(f"{name}: {decimal(frame.nbytes)}{speed}")
        return "\n".join(lines)

    def _result(self) -> str:
        full, *others = (frame.nbytes for frame in self.newest.values())
        return f"finished: {decimal(others[0])} of K and V instead of {decimal(full)}, {others[0] / full:.0%}"
