"""`measure_divergence`: what a picture loses when one head alone is compressed, for every head at several budgets.

Attention that a head no longer sees may matter or not; this asks the model itself, by teacher forcing. `fit_heads`
shares slots out by it. It chooses nothing, and draws nothing but a few pictures with the full cache.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ssd_cache.allocation import best_kinds, divergence_name, measured_levels
from ssd_cache.budget import check_count
from ssd_cache.cache import SSDCache
from ssd_cache.evaluation.fidelity.measure import check_settings, measure_fidelity
from ssd_cache.head_map import HeadMap
from ssd_cache.measuring import check_prompts, prompts_sha256, weights_sha256
from ssd_cache.models import Generator
from ssd_cache.profiling_state import check_same_run
from ssd_cache.statistics import ProfilingError
from ssd_cache.untrusted import checked, parse_json
from ssd_cache.writing import write_files

NEGLIGIBLE = 0.005
"""Nats a picture: a head that costs less is not asked again at a greater budget, which could cost no more."""

CACHES = 8
"""Compressed caches that run beside the full one at once; each holds almost as much as that does."""

Grid = list[list[float | None]]


@dataclass(frozen=True)
class State:
    """What a state file holds: the run's settings, and the divergence by level, layer and head, None where unknown."""

    run: dict[str, Any]
    divergence: dict[str, Grid]


def measure_divergence(
    generator: Generator,
    prompts: Sequence[str],
    head_map: HeadMap,
    *,
    levels: Sequence[int] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    state_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> HeadMap:
    """The map, with scores that say how far each head, compressed alone, moves the model from its full cache.

    Pictures are drawn with the full cache. Then, for every level and head, the same tokens go through a cache in which
    this head has that many slots and all others keep everything. The score `divergence-<slots>` `[layers, kv_heads]` is
    the KL divergence of the next token's distribution, summed over a picture's steps and averaged over the pictures:
    by the chain rule, the divergence between the two distributions over whole pictures, in nats. The head keeps tokens
    as the kind that retains more of its attention at that level, with the buffer, recents and sinks of the profile.

    It takes a pass over the pictures for every head and level, `CACHES` of them at once, less those of heads that cost
    less than `NEGLIGIBLE` at a lower level, whose score is repeated.

    Args:
        generator: the model.
        prompts: one picture is drawn of each.
        head_map: as `profile_heads(..., levels=...)` made it.
        levels: slots a head, each a level of the map; all of them when not given.
        batch_size: pictures at once.
        seed: of the first batch; batch `i` is drawn with `seed + i`.
        guidance_scale: as for `Generator.generate`.
        temperature: of the distribution, above 0.
        state_file: where scores are kept after every layer; when it exists, the run goes on from there.
        progress: show a bar over layers and levels.

    Raises:
        GeneratorError: no prompts, too long ones, or a drawing setting out of range.
        HeadMapError: a map of another model's shape.
        ProfilingError: a state file of another run, or one that can not be written.
        ValueError: a map without levels, a level that was not measured, or numbers that are not finite.
    """
    checkpoint = generator.checkpoint
    checkpoint.check_head_map(head_map)
    check_count("batch_size", batch_size, 1)
    check_settings(guidance_scale, temperature, seed)
    known = measured_levels(head_map)
    wanted = sorted(known if levels is None else set(levels))
    if unknown := [level for level in wanted if level not in known]:
        raise ValueError(f"level {unknown[0]} was not measured: the map's levels are {known}")
    check_prompts(generator, prompts)
    settings = {
        "seed": seed,
        "guidance_scale": generator.guidance_scale if guidance_scale is None else guidance_scale,
        "temperature": temperature,
    }
    facts = {
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        "batch_size": batch_size,
        **settings,
    }
    fingerprint = {
        "model": checkpoint.name,
        "weights": weights_sha256(generator.model),
        "dtype": str(generator.model.dtype),
        "head_map": head_map.digest,
        "levels": wanted,
        **facts,
    }
    path = None if state_file is None else Path(state_file)
    found = _load(path, fingerprint, wanted, head_map)
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    drawn = [
        generator.generate(batch, **{**settings, "seed": seed + index})  # type: ignore[arg-type]
        for index, batch in enumerate(batches)
    ]
    bar = tqdm(total=len(wanted) * head_map.num_layers, unit=" layers", disable=not progress)
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a window shorter than a row is what is being measured
        for number, level in enumerate(wanted):
            kinds = best_kinds(head_map, level)
            for layer in range(head_map.num_layers):
                bar.set_description(f"{level} slots, layer {layer}")
                row = found[level][layer]
                before = found[wanted[number - 1]][layer] if number else [None] * head_map.num_kv_heads
                for head, least in enumerate(before):
                    if row[head] is None and least is not None and least < NEGLIGIBLE:
                        row[head] = least
                asked = [head for head, value in enumerate(row) if value is None]
                for start in range(0, len(asked), CACHES):
                    part = asked[start : start + CACHES]
                    makers = {str(head): partial(_lone, head_map, kinds, layer, head, level) for head in part}
                    totals = dict.fromkeys(makers, 0.0)
                    for batch, tokens in zip(batches, drawn, strict=True):
                        results = measure_fidelity(generator, batch, makers, tokens=tokens, **settings)  # type: ignore[arg-type]
                        for name, result in results.items():
                            totals[name] += result.kl.sum().item()
                    for head in part:
                        row[head] = totals[str(head)] / len(prompts)
                if asked:
                    _save(path, fingerprint, found)
                bar.update()
    scores = {divergence_name(level): torch.tensor(found[level], dtype=torch.float32) for level in wanted}
    return replace(head_map, scores={**head_map.scores, **scores}, profile={**head_map.profile, "divergence": facts})


def _lone(head_map: HeadMap, kinds: torch.Tensor, layer: int, head: int, slots: int) -> SSDCache:
    """A cache in which one head has few slots and all others keep everything."""
    budget = [[head_map.num_visual_tokens] * head_map.num_kv_heads for _ in range(head_map.num_layers)]
    budget[layer][head] = slots
    profile = {
        name: head_map.profile[name] for name in ("buffer", "num_recent", "num_sinks") if name in head_map.profile
    }
    return SSDCache(HeadMap(kinds, head_map.grid, previews=head_map.previews), budget, **profile)


def _load(path: Path | None, fingerprint: Mapping[str, Any], levels: Sequence[int], like: HeadMap) -> dict[int, Grid]:
    """What a run before this one has measured, level by level; None where nothing was."""
    if path is None or not path.exists():
        return {level: [[None] * like.num_kv_heads for _ in range(like.num_layers)] for level in levels}
    try:
        state = checked(State, parse_json(path.read_bytes()))
        check_same_run(path, state.run, fingerprint)
        measured = {level: state.divergence.get(str(level), []) for level in levels}
        for level, grid in measured.items():
            if [len(row) for row in grid] != [like.num_kv_heads] * like.num_layers:
                raise ValueError(f"level {level} is not of {like.num_layers} layers x {like.num_kv_heads} KV heads")
    except ProfilingError:
        raise
    except (OSError, ValueError) as error:
        raise ProfilingError(
            f"{path}: not what a run of this kind keeps ({error}); give another file, or delete it to begin anew"
        ) from error
    return measured


def _save(path: Path | None, fingerprint: Mapping[str, Any], found: Mapping[int, Grid]) -> None:
    if path is None:
        return
    try:
        write_files({path: json.dumps({"run": fingerprint, "divergence": found}).encode()})
    except OSError as error:
        raise ProfilingError(
            f"{path}: what was measured can not be written ({error.strerror}); make room, or give another file"
        ) from error
