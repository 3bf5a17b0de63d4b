"""Write the report of an analysis: one self-contained HTML page, and a JSON file with all measured values.

`report.html.j2` is the page. Jinja2 escapes all text. Images are embedded, and nothing is loaded from a network.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ssd_cache.analysis.attention import plot_attention
from ssd_cache.analysis.concentration import plot_concentration
from ssd_cache.analysis.plotting import check_packages, to_png
from ssd_cache.analysis.retention import plot_retention
from ssd_cache.analysis.scores import plot_scores
from ssd_cache.analysis.study import Analysis
from ssd_cache.io.writing import write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(analysis: Analysis, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write report.html and report.json into a folder, either both or neither; returns their paths.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
        OSError: a file cannot be written; existing files are unchanged.
    """
    check_packages()
    folder = Path(folder).expanduser().absolute()
    page, numbers = folder / "report.html", folder / "report.json"
    data = json.dumps(as_json(analysis), allow_nan=False, ensure_ascii=False)
    write_files({page: render(analysis).encode(), numbers: data.encode()})
    return page, numbers


def render(analysis: Analysis) -> str:
    """Render the analysis as an HTML page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["embedded"] = _embedded
    functions = (plot_attention, plot_concentration, plot_retention, plot_scores)
    environment.globals.update({function.__name__: function for function in functions})
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    return template.render(vars(analysis))


def _embedded(figure: Figure | Image.Image) -> str:
    """The image as a data URL of a PNG file."""
    if isinstance(figure, Image.Image):
        buffer = io.BytesIO()
        figure.save(buffer, "PNG")
        content = buffer.getvalue()
    else:
        content = to_png(figure)
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def as_json(analysis: Analysis) -> dict[str, Any]:
    """All measured values of an analysis as JSON types, floats rounded to seven digits, without images."""
    numbers = plain({name: value for name, value in vars(analysis).items() if name != "images"})
    numbers["concentration"]["sentence"] = analysis.concentration.sentence(analysis.conditions["model"])
    for policy, part in analysis.retention.items():
        numbers["retention"][policy] |= plain({"mean_held": part.mean_held, "lost_share": part.lost_share})
    return numbers


def plain(value: Any) -> Any:
    """Convert dataclasses, tensors, tuples and mappings to dicts, lists and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value
