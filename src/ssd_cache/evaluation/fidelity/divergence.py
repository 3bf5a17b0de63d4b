"""`measure_divergence`: how much the output changes when one head alone is compressed, for every head and budget.

It uses teacher forcing, because lost attention need not change the output. `fit_heads` distributes slots by these
scores. This module chooses no slots; it generates only a few images with the full cache.
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
"""Nats per image: a head below this is not measured at larger budgets, where it would cost no more."""

CACHES = 8
"""Maximum number of compressed caches beside the full one; each needs almost as much memory as the full cache."""

PASS_SECONDS = 20
"""Target maximum duration of a pass, to limit the work lost when a run is killed."""


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
    """Add scores to the map that measure how much each head, compressed alone, changes the model's output.

    Images are generated with the full cache. Then, for every level and head, the same tokens go through a cache in
    which this head has that many slots and all other heads keep everything. The score `divergence-<slots>`
    `[layers, kv_heads]` is the KL divergence of the next-token distribution, summed over the steps of an image and
    averaged over the images. By the chain rule, this is the divergence between the two distributions over whole
    images, in nats. The head uses the retention rule of the kind that retains more of its attention at that level,
    with the profile's eviction interval, recents and sinks.

    The cost is one pass over the images for every head and level, with up to `CACHES` of them at once. Heads below
    `NEGLIGIBLE` at a lower level are skipped, and their score is repeated.

    Args:
        generator: the model.
        prompts: one image is generated for each.
        head_map: a map from `profile_heads(..., levels=...)`.
        levels: slots per head, each a level of the map; all levels when not given.
        batch_size: images at once.
        seed: seed of the first batch; batch `i` uses `seed + i`.
        guidance_scale: as for `Generator.generate`.
        temperature: temperature of the distribution, above 0.
        state_file: a file that is written after every batch of images and every pass of a batch; when it exists, the
            run resumes from it.
        progress: show a bar over batches, then over passes: one for every level, head and batch.

    Raises:
        GeneratorError: there are no prompts, a prompt is too long, or a generation setting is out of range.
        HeadMapError: the map has another model's shape.
        ProfilingError: the state file is of another run, or cannot be written.
        ValueError: the map has no levels, a level was not measured, or numbers are not finite.
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
    num_caches = 1  # until the duration of a pass is known
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows shorter than a row are intended here
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
    """The levels to measure, in ascending order; each is checked against the map and the limits of its caches.

    Raises:
        ValueError: the map or `levels` is empty, a level was not measured, or `SSDCache` refuses it.
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
    """Refuse, before any measurement, a budget that `fit_heads` would refuse after `measure_divergence`.

    It calls `fit_heads` on the map with zeros in place of the scores to be measured.

    Raises:
        ValueError: as for `check_levels` and `fit_heads`.
    """
    zeros = {divergence_name(level): torch.zeros(head_map.is_spatial.shape) for level in check_levels(head_map, levels)}
    fit_heads(replace(head_map, scores={**head_map.scores, **zeros}), budget)


def _lone(head_map: HeadMap, kinds: torch.Tensor, layer: int, head: int, slots: int) -> SSDCache:
    """A cache in which one head has `slots` slots and all others keep everything."""
    budget = [[head_map.num_visual_tokens] * head_map.num_kv_heads for _ in range(head_map.num_layers)]
    budget[layer][head] = slots
    return _cache(head_map, kinds, budget)


def _cache(head_map: HeadMap, kinds: torch.Tensor, budget: Budget) -> SSDCache:
    """A cache with the map's settings and the given labels."""
    return SSDCache(HeadMap(kinds).with_layout(head_map.layout), budget, **_profiled(head_map))


def _caches_in(seconds: float, num_caches: int, took: float) -> int:
    """How many caches can run beside the full one in `seconds`, given that `num_caches` of them took `took` seconds."""
    each = took / (num_caches + 1)
    return max(1, min(CACHES, int(seconds / each) - 1 if each > 0 else CACHES))


def _profiled(head_map: HeadMap) -> dict[str, Any]:
    """The cache settings that the map was profiled for."""
    return {name: head_map.profile[name] for name in ("buffer", "num_recent", "num_sinks") if name in head_map.profile}


def _digest(head_map: HeadMap, levels: Sequence[int]) -> str:
    """A checksum over the kind of every head at every level; with the profiled settings it identifies the map."""
    kinds = torch.stack([best_kinds(head_map, level) for level in levels])
    return hashlib.sha256(bytes(kinds.flatten().tolist())).hexdigest()[:12]
