"""The paper's figures: SSD (arXiv 2510.18716), as printed in the tables of its project page.

The full cache's GenEval results equal those of the report of Janus-Pro (arXiv 2501.17811). No figure is computed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ssd_cache.budget import Amount
from ssd_cache.evaluation.policies import Policy

COLUMNS = {
    "geneval": ("two_object", "counting", "color_attr", "overall"),
    "dpg": ("entity", "attribute", "relation", "overall"),
}
"""Columns of the paper's main table, by benchmark. The paper omits the other GenEval tags."""

_QUALITY = {
    ("janus-pro-1b", "full", 1.0): ((0.82, 0.51, 0.56, 0.73), (89.06, 89.18, 89.73, 82.98)),
    ("janus-pro-1b", "streaming-llm", 0.2): ((0.77, 0.28, 0.44, 0.64), (87.28, 87.60, 87.78, 81.01)),
    ("janus-pro-1b", "h2o", 0.2): ((0.74, 0.44, 0.43, 0.67), (87.49, 87.54, 85.48, 80.44)),
    ("janus-pro-1b", "ssd", 0.2): ((0.81, 0.48, 0.57, 0.73), (89.23, 87.94, 89.48, 82.82)),
    ("janus-pro-1b", "streaming-llm", 0.5): ((0.80, 0.48, 0.55, 0.72), (89.75, 88.67, 89.92, 83.17)),
    ("janus-pro-1b", "h2o", 0.5): ((0.81, 0.49, 0.56, 0.67), (88.96, 88.47, 86.58, 82.28)),
    ("janus-pro-1b", "ssd", 0.5): ((0.81, 0.52, 0.58, 0.74), (88.54, 89.31, 88.90, 83.21)),
    ("janus-pro-7b", "full", 1.0): ((0.89, 0.59, 0.66, 0.80), (89.35, 90.24, 90.45, 84.77)),
    ("janus-pro-7b", "streaming-llm", 0.2): ((0.87, 0.52, 0.62, 0.77), (86.45, 87.51, 89.48, 83.20)),
    ("janus-pro-7b", "h2o", 0.2): ((0.78, 0.53, 0.47, 0.71), (81.90, 83.86, 83.12, 75.97)),
    ("janus-pro-7b", "ssd", 0.2): ((0.86, 0.58, 0.67, 0.79), (89.52, 89.26, 90.17, 84.45)),
    ("janus-pro-7b", "streaming-llm", 0.5): ((0.87, 0.59, 0.63, 0.79), (88.70, 88.89, 92.22, 84.83)),
    ("janus-pro-7b", "h2o", 0.5): ((0.86, 0.60, 0.62, 0.79), (87.37, 87.73, 89.47, 83.36)),
    ("janus-pro-7b", "ssd", 0.5): ((0.89, 0.60, 0.65, 0.80), (88.92, 89.51, 89.19, 84.72)),
}
"""By model, policy and budget: GenEval and DPG-Bench, in the order of `COLUMNS`."""

SPEED_MODEL = "janus-pro-1b"

SPEED = {
    (32, "DynamicCache"): (897.3, 18.1),
    (64, "DynamicCache"): (543.6, 32.2),
    (128, "DynamicCache"): (289.2, 60.4),
    (32, "ssd:buffer=1 20%"): (1253.0, 5.9),
    (64, "ssd:buffer=1 20%"): (1658.4, 7.9),
    (128, "ssd:buffer=1 20%"): (1911.7, 11.8),
    (32, "ssd 20%"): (1754.1, 5.8),
    (64, "ssd 20%"): (2524.6, 7.7),
    (128, "ssd 20%"): (3099.4, 11.6),
}
"""Tokens per second and memory in GB of Janus-Pro-1B on an A100, by batch size and our name of the cache.

The paper calls the last two "SSD" and "SSD with buffer", which it refreshes every 24 steps, a row of the grid.
"""

NOTES = (
    "paper: SSD, arXiv 2510.18716. Its scorers are the official ones and its generation settings are not public, so "
    "compare differences between policies, not levels",
    "paper: the GenEval overall 0.67 of H2O at 50% with Janus-Pro-1B contradicts its own columns and the paper's plot, "
    "which has 0.72",
    "paper: budgets may count the prompt's tokens; ours count visual tokens alone",
)


def paper_model(name: str) -> str | None:
    """The model of the paper that a checkpoint's name means: its last part is or begins with Janus-Pro-1B or -7B."""
    found = re.match(r"janus-pro-(?:1b|7b)\b", name.rstrip("/").rpartition("/")[2].lower())
    return found[0] if found else None


def paper_quality(model: str | None, benchmark: str, policy: Policy, budget: Amount) -> Mapping[str, float]:
    """The paper's results by column; empty for other models, policies, settings or budgets."""
    found = _QUALITY.get((model or "", policy.name, float(budget)))
    if found is None or not policy.settings.keys() <= {"buffer"}:
        return {}
    return dict(zip(COLUMNS[benchmark], found[list(COLUMNS).index(benchmark)], strict=True))


def paper_speed(model: str | None, batch_size: int, cache: str) -> tuple[float, float] | None:
    """The paper's tokens per second and GB; None where it has none."""
    return SPEED.get((batch_size, cache)) if model == SPEED_MODEL else None
