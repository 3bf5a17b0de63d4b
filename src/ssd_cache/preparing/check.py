"""The last stage: the fidelity of the finished map at several budgets, on prompts that no other stage used.

The images are compared a batch at a time. Each finished batch is a small file, so the stage resumes from them, and
processes can share the batches. `evaluation/fidelity` makes the comparison.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssd_cache.budget import Amount, resolve_amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.evaluation.fidelity import measure_fidelity
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.io.untrusted import checked, parse_json, read_bytes
from ssd_cache.models import Generator
from ssd_cache.preparing.state import StateFolder
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.run_folder import write_part

CURVE = (0.1, 0.2, 0.3, 0.5)
"""Budgets of the curve, with the map's own."""

Rows = dict[str, dict[str, list[float]]]
"""By budget, then by measure: a number for each image."""

MEASURES = ("kl", "agreement", "retained")

LARGEST = 1e9
"""No measure is larger; a damaged file may hold numbers whose sum overflows."""


def curve_budgets(head_map: HeadMap, budget: Amount) -> list[float]:
    """The budgets of the curve that a cache of this map can have, as fractions, in ascending order."""
    cells = head_map.num_visual_tokens
    own = budget if isinstance(budget, float) else budget / cells
    shares = {resolve_amount("budget", share, cells): share for share in (*CURVE, own)}  # equal slots once
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows shorter than a row are intended
        for _, share in sorted(shares.items()):
            with suppress(ValueError):  # too few slots for an eviction
                SSDCache(head_map, share)
                found.append(share)
    return found


def check_fidelity(
    generator: Generator,
    prompts: Sequence[str],
    head_map: HeadMap,
    budgets: Sequence[float],
    *,
    batch_size: int,
    folder: StateFolder,
    processes: Processes,
    progress: bool,
    seed: int,
    guidance_scale: float,
    temperature: float,
) -> HeadMap:
    """Measure caches of the map against the full cache; the means are in `profile["fidelity"]` of the result.

    Every process must call this function; each gets the same result.
    """
    sampling = {"guidance_scale": guidance_scale, "temperature": temperature}
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    mine: dict[int, Rows] = {}
    for index in range(processes.index, len(batches), processes.count):
        path = folder.path / f"check-{index}.json"
        facts = {"head_map": head_map.digest, "slots": head_map.slots, "prompts": batches[index], "budgets": budgets}
        rows = _read(path, facts)
        if rows is None:
            rows = _measure(generator, batches[index], head_map, budgets, progress, seed=seed + index, **sampling)
            write_part(path, {**facts, "rows": rows})
        mine[index] = rows
    merged: dict[int, Rows] = {}
    for part in processes.gather_all(mine):
        merged |= part
    curve = [_point(budget, [merged[index][f"{budget:g}"] for index in sorted(merged)]) for budget in budgets]
    fidelity = {"num_images": len(prompts), "seed": seed, **sampling, "curve": curve}
    return replace(head_map, profile={**head_map.profile, "fidelity": fidelity})


def _measure(
    generator: Generator, prompts: list[str], head_map: HeadMap, budgets: Sequence[float], progress: bool, **sampling
) -> Rows:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        caches = {f"{budget:g}": (lambda budget=budget: SSDCache(head_map, budget)) for budget in budgets}
        found = measure_fidelity(generator, prompts, caches, progress=progress, **sampling)
    return {
        name: {
            "kl": result.kl.mean(1).tolist(),
            "agreement": result.agrees.double().mean(1).tolist(),
            "retained": [result.mean_retained] * len(prompts),
        }
        for name, result in found.items()
    }


def _point(budget: float, batches: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The means over images at one budget."""
    divergences = [value for batch in batches for value in batch["kl"]]
    error = None if len(divergences) < 2 else statistics.stdev(divergences) / len(divergences) ** 0.5
    means = {name: statistics.fmean(value for batch in batches for value in batch[name]) for name in MEASURES}
    return {"budget": budget, **means, "kl_standard_error": error}


def _read(path: Path, facts: dict[str, Any]) -> Rows | None:
    """The rows of a batch that was measured with the same map and prompts, else None."""
    with suppress(OSError, ValueError):
        content = checked(dict[str, Any], parse_json(read_bytes(path)))
        rows = checked(Rows, content.pop("rows", None))
        if content == {name: _plain(value) for name, value in facts.items()} and _is_whole(rows, facts):
            return rows
    return None


def _is_whole(rows: Rows, facts: dict[str, Any]) -> bool:
    """Whether there is a number for every budget, measure and prompt, and none that no run measures."""
    return list(rows) == [f"{budget:g}" for budget in facts["budgets"]] and all(
        set(row) == set(MEASURES)
        and all(len(values) == len(facts["prompts"]) and max(map(abs, values)) < LARGEST for values in row.values())
        for row in rows.values()
    )


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
