"""`measure_in_parts`: `measure_fidelity` for many images, a few at a time, with a state file to resume from.

All images are generated in one batch first, so they do not depend on the size of the parts. The comparison itself is
in `lockstep.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ssd_cache.budget import check_count
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.sharding import check_whole
from ssd_cache.evaluation.fidelity.lockstep import parts_of
from ssd_cache.evaluation.fidelity.measure import check_settings, measure_fidelity
from ssd_cache.evaluation.fidelity.result import Fidelity, merge
from ssd_cache.io.untrusted import check_like, checked
from ssd_cache.models import Checkpoint, Generator
from ssd_cache.profiling.measuring import check_prompts, prompts_sha256, weights_sha256
from ssd_cache.runs.run_state import (
    RunState,
    check_same_run,
    check_state_place,
    not_a_state,
    read_state,
    write_state,
)

FORMAT, WHAT = "ssd-cache fidelity state 1", "the measurements of ssd-cache eval fidelity"

Results = dict[str, Fidelity]


def measure_in_parts(
    generator: Generator,
    prompts: Sequence[str],
    caches: Mapping[str, Callable[[], SSDCache]],
    *,
    batch_size: int = 4,
    state_file: str | os.PathLike[str] | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    progress: bool = False,
) -> Results:
    """Like `measure_fidelity`, with at most `batch_size` images compared at once and finished parts saved.

    If all images fit into one part, or a cache labels its heads online, everything is measured at once: online labels
    depend on the whole batch. No state file is written in these cases.

    Args:
        generator: the model.
        prompts: one image is generated for each.
        caches: by name, a function that makes a fresh cache or resets one; called once per part.
        batch_size: images in a part.
        state_file: a file that is written after the images and after every part; when it exists, the run resumes from
            it.
        seed: as for `measure_fidelity`.
        guidance_scale: as for `measure_fidelity`.
        temperature: as for `measure_fidelity`.
        progress: show a bar for every part.

    Raises:
        ProfilingError: the state file is of another run, or cannot be written.
        GeneratorError, HeadMapError, ValueError: as for `measure_fidelity`.
    """
    check_count("batch_size", batch_size, 1)
    settings: dict[str, Any] = {"seed": seed, "guidance_scale": guidance_scale, "temperature": temperature}
    described = {name: _digest(make_cache()) for name, make_cache in caches.items()}
    if len(prompts) <= batch_size or "online" in described.values():
        return measure_fidelity(generator, prompts, caches, progress=progress, **settings)
    check_whole(generator.language_model)
    check_settings(None if generator.default_guidance is None else guidance_scale, temperature, seed)
    check_prompts(generator, prompts)
    parts_of(generator)
    fingerprint = {
        "model": generator.checkpoint.name,
        "weights": weights_sha256(generator.model),
        "dtype": str(generator.model.dtype),
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        "batch_size": batch_size,
        "caches": described,
        **settings,
    }
    path = None if state_file is None else Path(state_file)
    tokens, results = None, None
    if path is not None:
        check_state_place(path)
        tokens, results = _load(path, fingerprint, generator.checkpoint) if path.exists() else (None, None)
    if tokens is None:
        tokens = generator.generate(prompts, **settings).cpu()
        _save(path, fingerprint, tokens, {}, len(prompts))
    num_done = len(next(iter(results.values())).tokens) if results else 0
    for start in range(num_done, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        found = measure_fidelity(generator, prompts[part], caches, tokens=tokens[part], progress=progress, **settings)
        results = {name: merge([results[name], found[name]]) for name in found} if results else found
        _save(path, fingerprint, tokens, results, len(prompts))
    assert results is not None
    return results


def _digest(cache: SSDCache) -> str:
    """A checksum over all settings that determine which tokens a cache keeps; "online" for online labels."""
    if cache.head_map.is_online:
        return "online"
    names = ("buffer", "num_recent", "num_sinks", "score", "kv_dtype")
    facts = [cache.head_map.digest, [list(layer.plan.num_slots) for layer in cache.layers]]
    facts += [getattr(cache, name) for name in names]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


TENSORS = [field.name for field in fields(Fidelity) if field.name not in ("layout", "budget", "tokens")]


def _save(path: Path | None, settings: Mapping[str, Any], tokens: torch.Tensor, results: Results, total: int) -> None:
    if path is None:
        return
    tensors = {"images": tokens}
    tensors |= {f"{name}.{part}": getattr(result, part) for name, result in results.items() for part in TENSORS}
    first = next(iter(results.values()), None)
    counts = {"budgets": [result.budget for result in results.values()]}
    is_finished = first is not None and len(first.tokens) == total
    write_state(path, FORMAT, RunState(tensors, settings, counts, is_finished), WHAT)


def _load(path: Path, settings: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[torch.Tensor, Results]:
    file = read_state(path, FORMAT, WHAT)
    check_same_run(path, file.settings, settings)
    tensors, total = dict(file.tensors), settings["num_prompts"]
    steps, heads = checkpoint.num_visual_tokens - 1, (checkpoint.num_layers, checkpoint.num_kv_heads)
    try:
        images = tensors.pop("images", torch.empty(0))
        check_like({"images": images}, {"images": torch.empty(total, steps + 1, dtype=torch.int64)})
        budgets = checked(list[float], file.counts.get("budgets"), "budgets")
        names = list(settings["caches"]) if budgets else []
        num_done = len(kl) if (kl := tensors.get(f"{names[0]}.kl" if names else "")) is not None and kl.ndim else 0
        if len(budgets) != len(names) or num_done > total:
            raise ValueError("it holds results of other caches or images")
        shapes = {
            "is_spatial": torch.empty(heads, dtype=torch.bool),
            "kl": torch.empty(num_done, steps, dtype=torch.float64),
            "agrees": torch.empty(num_done, steps, dtype=torch.bool),
            "attention_error": torch.empty(steps, heads[0]),
            "retained": torch.empty(steps, *heads),
        }
        check_like(tensors, {f"{name}.{part}": shapes[part] for name in names for part in TENSORS})
    except ValueError as error:
        raise not_a_state(path, WHAT, error) from error
    results = {
        name: Fidelity(
            layout=checkpoint.layout,
            budget=budget,
            tokens=images[:num_done],
            **{part: tensors[f"{name}.{part}"] for part in TENSORS},
        )
        for name, budget in zip(names, budgets, strict=True)
    }
    return images, results
