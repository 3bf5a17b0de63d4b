"""What the figures share: matplotlib on demand, one size that a phone can read, colours, and the way to PNG.

Figures are matplotlib `Figure` objects of their own: no pyplot, no global state, no window. It knows nothing of heads.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ssd_cache.io.showing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REMEDY = "pip install 'ssd-cache[plot]'"
WIDTH = 5.0
"""Inches. Letters of 10 points on a picture this wide can be read on a phone."""

COLOR_MAP = "cividis"
"""Made to look the same with any colour vision (Nuñez, Anderton and Renslow 2018); bright is much."""

TO_COME, MARK = "#cfcfcf", "#D55E00"
"""Cells not drawn yet, and what a figure points at."""


def check_packages(*names: str) -> None:
    """Refuse to start what would end without the optional packages.

    Raises:
        ImportError: one of them is not installed, with the remedy.
    """
    missing = [name for name in names or ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"figures and reports need {' and '.join(missing)}, not installed here: {REMEDY}")


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, whose parts make room for each other."""
    check_packages("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def color_map(bad: str = TO_COME):
    """The colour map, with `bad` for what is masked."""
    check_packages("matplotlib")
    from matplotlib import colormaps

    return colormaps[COLOR_MAP].with_extremes(bad=bad)


def draw_grid_axes(axes: Axes, grid: tuple[int, int]) -> None:
    """Rows and columns of a picture's grid, first and last ones included in the numbers."""
    rows, columns = grid
    axes.set_xticks(sorted({0, (columns - 1) // 2, columns - 1}))
    axes.set_yticks(sorted({0, (rows - 1) // 2, rows - 1}))
    axes.tick_params(length=2, labelsize=9)


def root_norm(top: float):
    """A colour scale by the square root of a weight, from 0 to `top`, so that small weights show."""
    check_packages("matplotlib")
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=max(top, 1e-6))


def outline_cell(axes: Axes, row: int, column: int) -> None:
    """Point at one cell of a grid, on bright and dark colours alike."""
    from matplotlib.patches import Rectangle

    for color, width in (("white", 2.6), (MARK, 1.4)):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=width))


def plain_label(text: str) -> str:
    """A foreign text as a label of a figure: short, on one line, and without math.

    A legend leaves out names that begin with an underscore, so a space comes before it.
    """
    line = " ".join(printable(text, 80).split()).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def to_png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as the bytes of a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
