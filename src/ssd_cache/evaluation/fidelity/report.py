"""Writes the results of `measure_fidelity`: fidelity.json with the numbers, fidelity.png with the curves.

Both files are written, or neither. `result.py` defines the numbers, `figure.py` the figure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssd_cache.analysis.plotting import check_packages, to_png
from ssd_cache.analysis.report import plain
from ssd_cache.evaluation.fidelity.figure import draw_fidelity
from ssd_cache.evaluation.fidelity.result import Fidelity
from ssd_cache.io.writing import write_files

FORMAT = "ssd-cache fidelity 1"
NUMBERS, FIGURE = "fidelity.json", "fidelity.png"


def write_fidelity(
    results: Mapping[str, Fidelity], folder: str | os.PathLike[str], conditions: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write the numbers and the figure; returns their paths.

    Args:
        results: as `measure_fidelity` returns them; see `draw_fidelity` for how names affect the figure.
        folder: made when missing; older files of these names are replaced.
        conditions: the conditions of the results, as JSON values.

    Raises:
        ImportError: matplotlib is not installed; the message has the remedy.
        OSError: a file cannot be written; older files are unchanged.
    """
    check_packages("matplotlib")
    folder = Path(folder)
    numbers = {"format": FORMAT, "conditions": dict(conditions or {}), **as_json(results)}
    contents = {
        folder / NUMBERS: json.dumps(numbers, allow_nan=False, ensure_ascii=False).encode() + b"\n",
        folder / FIGURE: to_png(draw_fidelity(results)),
    }
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_files(contents)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return list(contents)


def as_json(results: Mapping[str, Fidelity]) -> dict[str, Any]:
    """The numbers as JSON types; floats have seven digits.

    KL and agreement are given for every image and step, attention errors for every step and layer. Retained mass is a
    mean over each grid row, since `[steps, layers, kv_heads]` is millions of numbers in a large model.
    """
    first = next(iter(results.values()))
    return {
        **first.layout.as_json(),
        "tokens": first.tokens.tolist(),
        "results": {
            name: plain(
                {
                    "budget": result.budget,
                    "mean_kl": result.mean_kl,
                    "kl_standard_error": result.kl_standard_error,
                    "agreement": result.agreement,
                    "mean_attention_error": result.mean_attention_error,
                    "mean_retained": result.mean_retained,
                    "mean_retained_by_kind": {kind: result.retained_by_kind(kind) for kind in ("spatial", "semantic")},
                    "is_spatial": result.is_spatial,
                    "retained_by_head": result.retained_by_head,
                    "kl": result.kl,
                    "agrees": result.agrees,
                    "attention_error": result.attention_error,
                    "retained_by_grid_row": result.by_grid_row(result.retained),
                }
            )
            for name, result in results.items()
        },
    }
