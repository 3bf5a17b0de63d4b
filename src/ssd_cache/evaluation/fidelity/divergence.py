"""`measure_divergence`: how much the output changes when one head alone is compressed, for every head and budget.

It uses teacher forcing, because lost attention need not change the output. `fit_heads` distributes slots by these
scores. This module chooses no slots; it generates only a few images with the full cache.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from ssd_cache.budget import Amount, Budget, check_count
from ssd_cache.cache.cache import SSDCache
from ssd_cache.evaluation.fidelity.lockstep import compare_caches
from ssd_cache.evaluation.fidelity.measure import check_run, fingerprint
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Generator
from ssd_cache.profiling.allocation import best_kinds, divergence_name, fit_heads, measured_levels
from ssd_cache.runs.run_state import ResumableState

FORMAT, WHAT = "ssd-cache fit 3", "the measurements of ssd-cache fit"

NEGLIGIBLE = 0.005
"""Nats per image: a head below this is not measured at larger budgets, where it would cost no more."""

NUM_CACHES = 8
"""Compressed caches that run together with the full one; each takes almost as much memory as the full cache."""


def measure_divergence(
    generator: Generator,
    prompts: Sequence[str],
    head_map: HeadMap,
    *,
    levels: Sequence[int] | None = None,
    batch_size: int = 4,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
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

    The cost is one pass over the images for every head and level, with up to `NUM_CACHES` of them at once. Heads below
    `NEGLIGIBLE` at a lower level are skipped, and their score is repeated.

    Args:
        generator: the model.
        prompts: one image is generated for each.
        head_map: a map from `profile_heads(..., levels=...)`.
        levels: slots per head, each a level of the map; all levels when not given.
        batch_size: images at once.
        seed: seed of the first batch; batch `i` uses `seed + i`.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`, above 0.
        state_file: a file that is written after every batch of images and every pass of a batch; when it exists, the
            run resumes from it.
        progress: show a bar over batches, then over passes: one for every level, head and batch.

    Raises:
        GeneratorError: there are no prompts, a prompt is too long, or a generation setting is out of range.
        HeadMapError: the map has another model's shape.
        ProfilingError: the state file is of another run, or cannot be written.
        ValueError: the map has no levels, a level was not measured, or a measured value is not finite.
    """
    generator.checkpoint.check_head_map(head_map)
    sampling = generator.sampling(guidance_scale, temperature, seed)
    sampling.check_random()
    check_count("batch_size", batch_size, 1)
    wanted = check_levels(head_map, levels)
    check_run(generator, prompts)
    prompts = list(prompts)
    run = fingerprint(generator, prompts, batch_size, sampling)
    settings = {**run, "levels": wanted, "kinds": _digest(head_map, wanted), **_profiled(head_map)}
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    images = torch.zeros(len(prompts), head_map.num_visual_tokens, dtype=torch.int64)
    num_generated = torch.zeros(1, dtype=torch.int64)  # batches
    # by level, `[layers, kv_heads]`: the KL divergence, summed over the images of finished batches, and their number
    shape = head_map.is_spatial.shape
    sums = {level: torch.zeros(shape, dtype=torch.float64) for level in wanted}
    num_done = {level: torch.zeros(shape, dtype=torch.int64) for level in wanted}
    tensors = {"images": images, "num_generated": num_generated}
    tensors |= {f"sum.{level}": tensor for level, tensor in sums.items()}
    tensors |= {f"done.{level}": tensor for level, tensor in num_done.items()}
    state = ResumableState(state_file, FORMAT, WHAT, settings, tensors)
    left = range(int(num_generated), len(batches))
    for index in tqdm(left, unit=" batches", desc="generating", disable=not progress):
        seeded = replace(sampling, seed=seed + index)
        images[batches[index]] = generator.generate(prompts[batches[index]], **vars(seeded)).cpu()
        num_generated += 1
        state.save()
    bar = tqdm(total=len(wanted) * shape.numel() * len(batches), unit=" passes", disable=not progress)
    bar.update(sum(int(count.sum()) for count in num_done.values()))
    with bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows shorter than a row are intended here
        for below, level in zip([None, *wanted], wanted, strict=False):
            bar.set_description(f"{level} slots")
            kinds = best_kinds(head_map, level)
            if below is not None:
                cheap = (num_done[level] < len(batches)) & (sums[below] / len(prompts) < NEGLIGIBLE)
                bar.update(int((len(batches) - num_done[level])[cheap].sum()))
                sums[level][cheap], num_done[level][cheap] = sums[below][cheap], len(batches)
            for layer, (index, part) in product(range(head_map.num_layers), enumerate(batches)):
                done = num_done[level][layer]
                while heads := (done == index).nonzero().flatten().tolist()[:NUM_CACHES]:
                    caches = {str(head): _lone(head_map, kinds, layer, head, level) for head in heads}
                    results = compare_caches(generator, prompts[part], caches, sampling, images[part])
                    sums[level][layer, heads] += torch.stack([result.kl.sum() for result in results.values()])
                    done[heads] += 1
                    state.save()
                    bar.update(len(heads))
    state.save(is_finished=True)
    scores = {divergence_name(level): (sums[level] / len(prompts)).float() for level in wanted}
    facts = {name: run[name] for name in run if name not in ("model", "weights", "dtype")}
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


def _profiled(head_map: HeadMap) -> dict[str, Any]:
    """The cache settings that the map was profiled for."""
    return {name: head_map.profile[name] for name in ("buffer", "num_recent", "num_sinks") if name in head_map.profile}


def _digest(head_map: HeadMap, levels: Sequence[int]) -> str:
    """A checksum over the kind of every head at every level; with the profiled settings it identifies the map."""
    kinds = torch.stack([best_kinds(head_map, level) for level in levels])
    return hashlib.sha256(bytes(kinds.flatten().tolist())).hexdigest()[:12]
