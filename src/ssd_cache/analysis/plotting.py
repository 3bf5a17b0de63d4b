"""Shared helpers for figures: matplotlib on demand, a size readable on a phone, colours, and PNG output.

Figures are plain matplotlib `Figure` objects, without pyplot, global state or windows. No code here is about heads.
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
"""Figure width in inches. At this width, 10-point text is readable on a phone."""

COLOR_MAP = "cividis"
"""Looks the same with any colour vision (Nuñez, Anderton and Renslow 2018). Bright means a high value."""

TO_COME, MARK = "#cfcfcf", "#D55E00"
"""Colours of cells not generated yet, and of outlines that mark a cell."""


def check_packages(*names: str) -> None:
    """Check that optional packages are installed, before any work that needs them.

    Raises:
        ImportError: a package is not installed; the message says how to install it.
    """
    missing = [name for name in names or ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(f"figures and reports need {' and '.join(missing)}, not installed here: {REMEDY}")


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Create an empty figure with constrained layout, so that its parts do not overlap. Sizes are in inches."""
    check_packages("matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def color_map(bad: str = TO_COME):
    """The colour map, with the colour `bad` for masked cells."""
    check_packages("matplotlib")
    from matplotlib import colormaps

    return colormaps[COLOR_MAP].with_extremes(bad=bad)


def draw_grid_axes(axes: Axes, grid: tuple[int, int]) -> None:
    """Label the rows and columns of an image grid, always including the first and the last."""
    rows, columns = grid
    axes.set_xticks(sorted({0, (columns - 1) // 2, columns - 1}))
    axes.set_yticks(sorted({0, (rows - 1) // 2, rows - 1}))
    axes.tick_params(length=2, labelsize=9)


def root_norm(top: float):
    """A square-root colour scale from 0 to `top`, which keeps small weights visible."""
    check_packages("matplotlib")
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=max(top, 1e-6))


def outline_cell(axes: Axes, row: int, column: int) -> None:
    """Outline one cell of a grid, visible on bright and on dark colours."""
    from matplotlib.patches import Rectangle

    for color, width in (("white", 2.6), (MARK, 1.4)):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=color, linewidth=width))


def plain_label(text: str) -> str:
    """Make untrusted text safe as a figure label: short, on one line, without math markup.

    Matplotlib omits legend names that begin with an underscore, so a space is put before it.
    """
    line = " ".join(printable(text, 80).split()).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def to_png(figure: Figure, dpi: int = 200) -> bytes:
    """Encode the figure as PNG. The same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
