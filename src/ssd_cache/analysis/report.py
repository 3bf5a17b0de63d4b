"""The report of an analysis: one self-contained HTML page, and a JSON file with all its numbers.

Images are embedded in the page, and nothing is loaded from a network. `page.py` defines the content of the page.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssd_cache.analysis.page import render
from ssd_cache.analysis.plotting import check_packages
from ssd_cache.analysis.study import Analysis
from ssd_cache.io.writing import write_files


def write_report(analysis: Analysis, output: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write the page and its JSON file, either both or neither. Returns their paths.

    Args:
        analysis: the analysis to report.
        output: a file name that ends with .html; the JSON file is written next to it. Any other name is a folder,
            created if missing, for report.html and report.json.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
        OSError: a file cannot be written; existing files are unchanged.
    """
    check_packages()
    page, numbers = report_paths(output)
    texts = {page: render(analysis), numbers: json.dumps(as_json(analysis), allow_nan=False, ensure_ascii=False)}
    is_new = not page.parent.exists()
    page.parent.mkdir(exist_ok=True)
    try:
        write_files({path: text.encode() for path, text in texts.items()})
    except BaseException:
        if is_new and not any(page.parent.iterdir()):
            page.parent.rmdir()
        raise
    return page, numbers


def report_paths(output: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The paths where `write_report` writes the page and its JSON file."""
    path = Path(output).expanduser().absolute()
    page = path if path.suffix.lower() in (".html", ".htm") else path / "report.html"
    return page, page.with_suffix(".json")


def as_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers of an analysis as JSON types, with floats to seven digits and without images."""
    numbers = {
        field.name: plain(getattr(analysis, field.name))
        for field in dataclasses.fields(analysis)
        if field.name != "pictures"
    }
    numbers["concentration"]["is_shown"] = analysis.concentration.is_shown
    numbers["concentration"]["sentence"] = analysis.concentration.sentence(analysis.conditions["model"])
    for policy, retention in analysis.retention.items():
        numbers["retention"][policy] |= plain(
            {
                "mean_held": retention.mean_held,
                "lost_share": retention.lost_share,
                "margin_share": {kind: retention.margin_share(kind) for kind in ("spatial", "semantic")},
            }
        )
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
