"""`measure_divergence`: what a picture loses when one head alone is compressed, for every head at several budgets.

Attention that a head no longer sees may matter or not; this asks the model itself, by teacher forcing. `fit_heads`
shares slots out by it. It chooses nothing, and draws nothing but a few pictures with the full cache.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ssd_cache.budget import Amount, Budget, check_count
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.sharding import check_whole
from ssd_cache.evaluation.fidelity.divergence_state import DivergenceState
from ssd_cache.evaluation.fidelity.lockstep import parts_of
from ssd_cache.evaluation.fidelity.measure import check_settings, measure_fidelity
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Generator
from ssd_cache.profiling.allocation import best_kinds, divergence_name, fit_heads, measured_levels
from ssd_cache.profiling.measuring import check_prompts, prompts_sha256, weights_sha256
from ssd_cache.runs.run_state import check_state_place

NEGLIGIBLE = 0.005
"""Nats a picture: a head that costs less is not asked again at a greater budget, which could cost no more."""

CACHES = 8
"""Compressed caches that run beside the full one at once, at most; each holds almost as much as that does."""

PASS_SECONDS = 20
"""Time that a pass should take at most, so that little is lost when a run is killed."""


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

    It takes a pass over the pictures for every head and level, up to `CACHES` of them at once, less those of heads that
    cost less than `NEGLIGIBLE` at a lower level, whose score is repeated.

    Args:
        generator: the model.
        prompts: one picture is drawn of each.
        head_map: as `profile_heads(..., levels=...)` made it.
        levels: slots a head, each a level of the map; all of them when not given.
        batch_size: pictures at once.
        seed: of the first batch; batch `i` is drawn with `seed + i`.
        guidance_scale: as for `Generator.generate`.
        temperature: of the distribution, above 0.
        state_file: a file that is written after every batch of images and every pass of a batch; when it exists, the
            run resumes from it.
        progress: show a bar over batches, then over passes: one for every level, head and batch.

    Raises:
        GeneratorError: no prompts, too long ones, or a drawing setting out of range.
        HeadMapError: a map of another model's shape.
        ProfilingError: a state file of another run, or one that can not be written.
        ValueError: a map without levels, a level that was not measured, or numbers that are not finite.
    """
    checkpoint = generator.checkpoint
    check_whole(generator.language_model)
    checkpoint.check_head_map(head_map)
    check_count("batch_size", batch_size, 1)
    check_settings(None if generator.default_guidance is None else guidance_scale, temperature, seed)
    wanted = check_levels(head_map, levels)
    check_prompts(generator, prompts)
    parts_of(generator)
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
        "levels": wanted,
        "kinds": _digest(head_map, wanted),
        **_profiled(head_map),
        **facts,
    }
    shape = head_map.num_layers, head_map.num_kv_heads
    path = None if state_file is None else Path(state_file)
    state = DivergenceState.empty(wanted, shape)
    if path is not None:
        check_state_place(path)
        if path.exists():
            state = DivergenceState.load(path, fingerprint, wanted, shape, head_map.num_visual_tokens)
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]

    def save() -> None:
        if path is not None:
            state.save(path, fingerprint, len(batches))

    left = range(len(state.images), len(batches))
    for index in tqdm(left, unit=" batches", desc="generating", disable=not (progress and left)):
        drawn = generator.generate(batches[index], **{**settings, "seed": seed + index})  # type: ignore[arg-type]
        state.images.append(drawn.cpu())
        save()
    bar = tqdm(total=len(wanted) * head_map.is_spatial.numel() * len(batches), unit=" passes", disable=not progress)
    bar.update(sum(int(count.sum()) for count in state.num_done.values()))
    num_caches = 1  # until the time of a pass is known
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a window shorter than a row is what is being measured
        for number, level in enumerate(wanted):
            kinds, below = best_kinds(head_map, level), wanted[number - 1] if number else None
            for layer in range(head_map.num_layers):
                bar.set_description(f"{level} slots, layer {layer}")
                sums, num_done = state.sums[level][layer], state.num_done[level][layer]
                if below is not None:
                    cheap = (num_done < len(batches)) & (state.sums[below][layer] / len(prompts) < NEGLIGIBLE)
                    bar.update(int((len(batches) - num_done)[cheap].sum()))
                    sums[cheap], num_done[cheap] = state.sums[below][layer][cheap], len(batches)
                asked = (num_done < len(batches)).nonzero()[:, 0].tolist()
                for index, batch in enumerate(batches):
                    while part := [head for head in asked if num_done[head] == index][:num_caches]:
                        makers = {str(head): partial(_lone, head_map, kinds, layer, head, level) for head in part}
                        started = time.monotonic()
                        results = measure_fidelity(generator, batch, makers, tokens=state.images[index], **settings)  # type: ignore[arg-type]
                        num_caches = _caches_in(PASS_SECONDS, len(part), time.monotonic() - started)
                        for head in part:
                            sums[head] += results[str(head)].kl.sum()
                            num_done[head] += 1
                        save()
                        bar.update(len(part))
    scores = {divergence_name(level): (state.sums[level] / len(prompts)).float() for level in wanted}
    return replace(head_map, scores={**head_map.scores, **scores}, profile={**head_map.profile, "divergence": facts})


def check_levels(head_map: HeadMap, levels: Sequence[int] | None = None) -> list[int]:
    """The levels to measure, in order, each of them known to the map and possible for its caches.

    Raises:
        ValueError: a map without levels, no level, one that was not measured, or one that `SSDCache` refuses.
    """
    known = measured_levels(head_map)
    wanted = sorted(known if levels is None else set(levels))
    if not wanted:
        raise ValueError(f"levels is empty: give some of the map's levels, {known}")
    if unknown := [level for level in wanted if level not in known]:
        raise ValueError(f"level {unknown[0]} was not measured: the map's levels are {known}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for level in wanted:
            _cache(head_map, best_kinds(head_map, level), level)
    return wanted


def check_fitting(head_map: HeadMap, budget: Amount, levels: Sequence[int] | None = None) -> None:
    """Refuse, before anything is measured, a budget that `fit_heads` would refuse after `measure_divergence`.

    It calls `fit_heads` itself, on the map with zeros in the place of the scores to be measured.

    Raises:
        ValueError: as for `check_levels` and `fit_heads`.
    """
    zeros = {divergence_name(level): torch.zeros(head_map.is_spatial.shape) for level in check_levels(head_map, levels)}
    fit_heads(replace(head_map, scores={**head_map.scores, **zeros}), budget)


def _lone(head_map: HeadMap, kinds: torch.Tensor, layer: int, head: int, slots: int) -> SSDCache:
    """A cache in which one head has few slots and all others keep everything."""
    budget = [[head_map.num_visual_tokens] * head_map.num_kv_heads for _ in range(head_map.num_layers)]
    budget[layer][head] = slots
    return _cache(head_map, kinds, budget)


def _cache(head_map: HeadMap, kinds: torch.Tensor, budget: Budget) -> SSDCache:
    """A cache with the map's settings and other labels."""
    return SSDCache(HeadMap(kinds, head_map.grid, previews=head_map.previews), budget, **_profiled(head_map))


def _caches_in(seconds: float, num_caches: int, took: float) -> int:
    """How many caches run beside the full one in `seconds`, when `num_caches` of them took another time."""
    each = took / (num_caches + 1)
    return max(1, min(CACHES, int(seconds / each) - 1 if each > 0 else CACHES))


def _profiled(head_map: HeadMap) -> dict[str, Any]:
    """The settings of the cache that the map was profiled for."""
    return {name: head_map.profile[name] for name in ("buffer", "num_recent", "num_sinks") if name in head_map.profile}


def _digest(head_map: HeadMap, levels: Sequence[int]) -> str:
    """A checksum over the kind of every head at every level; with the profiled settings it stands for the map."""
    kinds = torch.stack([best_kinds(head_map, level) for level in levels])
    return hashlib.sha256(bytes(kinds.flatten().tolist())).hexdigest()[:12]
