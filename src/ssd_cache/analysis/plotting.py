"""Shared helpers for figures: matplotlib on demand, a size readable on a phone, colours, and PNG output.

Figures are plain matplotlib `Figure` objects, without pyplot, global state or windows.
"""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ssd_cache.io.showing import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Figure width in inches. At this width, 10-point text is readable on a phone."""

COLOR_MAP = "cividis"
"""Looks the same with any colour vision (Nuñez, Anderton and Renslow 2018). Bright means a high value."""

TO_COME = "#cfcfcf"
"""Colour of cells not generated yet."""


def check_packages(*names: str) -> None:
    """Raise ImportError, with the install command, if one of these packages is missing; default: jinja2, matplotlib."""
    missing = [name for name in names or ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"figures and reports need {' and '.join(missing)}, not installed here: "
            "pip install -e '.[plot]' in a clone of ssd-cache"
        )


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


def index_ticks(axis: Axis, number: int, spacing: float = 1.0, start: float = 0.0) -> None:
    """Put at most 16 tick labels on an axis of `number` layers or heads; index i is at `start + i * spacing`."""
    shown = range(0, number, -(-number // 16))
    axis.set_ticks([start + index * spacing for index in shown], list(map(str, shown)))


def mark_spatial(axes: Axes, is_spatial: torch.Tensor) -> None:
    """Label the axes of a heat map `[layers, kv_heads]`, and mark spatial heads with a dot."""
    row, column = is_spatial.numpy().nonzero()
    size = max(4.0, min(60.0, 4000 / max(is_spatial.shape) ** 2))
    dots = axes.scatter(column, row, s=size, color="white", edgecolors="black", linewidths=0.8)
    dots.set_label(f"spatial ({len(row)} of {is_spatial.numel()})")
    axes.set(xlabel="KV head", ylabel="layer")
    index_ticks(axes.yaxis, is_spatial.shape[0])
    index_ticks(axes.xaxis, is_spatial.shape[1])


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
