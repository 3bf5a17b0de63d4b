"""The report of a reproduction: our numbers beside the paper's, paired tests, speed and memory; as Markdown and JSON.

It reads the files of the stages and computes nothing. `paper.py` has the paper's figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_cache.bench.results import number, size
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES, TOO_FEW, Difference, cell
from ssd_cache.evaluation.policies import budget_name
from ssd_cache.io.markdown import escape, table
from ssd_cache.io.writing import write_files
from ssd_cache.models import BUNDLED
from ssd_cache.reproducing.benchmarks import NUM_SAMPLES
from ssd_cache.reproducing.paper import COLUMNS, NOTES, paper_model, paper_quality, paper_speed
from ssd_cache.reproducing.settings import Settings
from ssd_cache.reproducing.stages import Run, making_room, read_scores, read_speeds

PAGE, NUMBERS = "reproduction.md", "reproduction.json"

FORMAT = "ssd-cache reproduction 1"

DIGITS = {"geneval": 3, "dpg": 2}
"""Digits after the point: GenEval is a share, DPG-Bench goes to 100."""


def write_report(run: Run) -> Path:
    """Write `reproduction.md` and `reproduction.json`; returns the path of the first.

    Raises:
        ProfilingError: a file of a stage is damaged, or the report cannot be written.
    """
    settings, model = run.settings, paper_model(run.settings.checkpoint.name)
    num_cells = len(settings.cells)
    qualities = {one.name: read_scores(run.scores(one), num_cells) for one in settings.benchmarks}
    for name, found in qualities.items():
        for one, row in zip(settings.cells, found["rows"], strict=True):
            row["paper"] = paper_quality(model, name, one.policy, one.budget)
    speeds = [row for batch_size in settings.speed_batch_sizes for row in read_speeds(run.speed(batch_size))]
    for row in speeds:
        row["paper"] = paper_speed(model, row["batch_size"], row["cache"])
    numbers = {"format": FORMAT, "settings": settings.facts(), "paper_model": model, **qualities, "speed": speeds}
    page = run.folder.path / PAGE
    contents = {
        page: to_markdown(settings, model, qualities, speeds),
        page.with_name(NUMBERS): json.dumps(numbers, indent=1, allow_nan=False) + "\n",
    }
    with making_room(page):
        write_files({path: text.encode() for path, text in contents.items()})
    return page


def to_markdown(
    settings: Settings, model: str | None, qualities: dict[str, dict[str, Any]], speeds: Sequence[dict[str, Any]]
) -> str:
    """The page; `model` is the paper's model, if the measured one is named so."""
    title = f"# Reproduction of SSD (arXiv 2510.18716) with {escape(settings.checkpoint.name)}"
    parts = [title, _bullets(_facts(settings, model))]
    for name, found in qualities.items():
        parts += [f"## {escape(found['judge']['scorer'])}", _quality_table(name, found["rows"])]
        parts.append(_bullets([f"{fact}: {_plain(value)}" for fact, value in found["judge"].items()]))
        if found["differences"]:
            words = (
                f"Of overall. Paired bootstrap over prompts, {NUM_RESAMPLES} resamples: 95% percentile interval and "
                f"two-sided p, not corrected for their number; {TOO_FEW}."
            )
            parts += ["### Paired differences", words, _difference_table(name, found["differences"])]
    tokens = sum(map(len, settings.windows()))
    words = (
        f"{tokens} tokens of each image, {settings.rounds} round(s) after one to warm up; the folder speed has the "
        "machine and all details. The paper measured Janus-Pro-1B on an A100."
    )
    parts += ["## Throughput and memory", words, _speed_table(speeds)]
    parts += ["## Conditions", _bullets([f"{name}: {_plain(value)}" for name, value in settings.facts().items()])]
    return "\n\n".join(parts) + "\n"


def _facts(settings: Settings, model: str | None) -> list[str]:
    """What was run, and what keeps it from being the paper's run."""
    name = settings.checkpoint.name
    share = "all prompts" if settings.sample == 1 else f"{settings.sample:.3g} of the prompts, evenly spaced (--sample)"
    used = ", ".join(f"{len(one.captions)} of {one.name} with {NUM_SAMPLES} images each" for one in settings.benchmarks)
    facts = [f"{share}: {used}", *settings.omissions()]
    if name == BUNDLED:
        facts.append(
            f"{BUNDLED} is the small model of this package and not a model of the paper. It generates shapes only, so "
            "this page shows that the run works, and says nothing about the paper"
        )
    elif model is None:
        facts.append(f"{name} is not named Janus-Pro-1B or Janus-Pro-7B, so the paper's columns are empty")
    return [*facts, *NOTES]


def _quality_table(benchmark: str, rows: Sequence[dict[str, Any]]) -> str:
    """The columns of the paper's table, each beside the paper's figure."""
    lines, digits, columns = [], DIGITS[benchmark], COLUMNS[benchmark]
    for row in rows:
        ours, paper = row["results"], row["paper"]
        line = [row["policy"], budget_name(row["budget"])]
        for column in columns:
            line += [cell(_number(ours.get(column)), digits), cell(_number(paper.get(column)), 2)]
        lines.append([*line, cell(_number(ours["standard_error"]), digits)])
    heads = [head for column in columns for head in (column, "paper")]
    return table(["policy", "budget", *heads, "s.e. of overall"], lines, num_left=2)


def _difference_table(benchmark: str, differences: Sequence[dict[str, Any]]) -> str:
    lines = []
    for entry in differences:
        difference, low, high, p = (_number(entry[name]) for name in ("difference", "low", "high", "p"))
        found = Difference(difference, low, high, p, entry["num_prompts"])
        lines.append([entry["first"], entry["second"], *found.cells(DIGITS[benchmark]), str(found.num_prompts)])
    return table(["policy", "against", "difference", "95% interval", "p", "prompts"], lines, num_left=2)


def _speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """Tokens per second and memory of every cache and batch size, beside the paper's."""
    lines = []
    for row in rows:
        speed, memory = row["paper"] or (math.nan, math.nan)
        ours = [row["failure"], "-", "-"]
        if row["failure"] is None:
            peak = "-" if row["peak"] is None else size(row["peak"])
            ours = [number(row["tokens_per_second"]), size(row["key_value"]), peak]
        lines.append([row["cache"], str(row["batch_size"]), ours[0], cell(speed, 1), *ours[1:], cell(memory, 1)])
    return table(["cache", "batch", "tokens/s", "paper", "K and V", "peak memory", "paper, GB"], lines, num_left=1)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
