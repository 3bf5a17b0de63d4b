"""`measure_fidelity`: compare compressed caches with the full cache at every step of a few images.

It checks the settings and saves finished parts in a state file. The comparison itself is in `lockstep.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ssd_cache.budget import check_count
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.sharding import check_whole
from ssd_cache.evaluation.conditions import cache_facts
from ssd_cache.evaluation.fidelity.lockstep import compare_caches, parts_of
from ssd_cache.evaluation.fidelity.result import MEASURED, Fidelity
from ssd_cache.models import Checkpoint, Generator, GeneratorError, ResolvedSampling
from ssd_cache.profiling.measuring import model_facts, prompts_sha256
from ssd_cache.runs.run_state import ResumableState

FORMAT, WHAT = "ssd-cache fidelity state 3", "the measurements of ssd-cache eval fidelity"


def measure_fidelity(
    generator: Generator,
    prompts: Sequence[str],
    caches: Mapping[str, Callable[[], SSDCache]],
    *,
    batch_size: int | None = None,
    state_file: str | os.PathLike[str] | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    tokens: torch.Tensor | None = None,
    progress: bool = False,
) -> dict[str, Fidelity]:
    """Measure how much compressed caches change a model's next-token distribution and attention.

    The images are generated with a full cache, all in one batch. At every step the same token is also fed through
    every other cache. All caches see the same tokens, so any difference is caused by the caches. The compared
    distribution is the one that is sampled from, with guidance and temperature, over all visual tokens (a
    checkpoint's `top_k` is not applied).

    Memory: the K and V of the full cache and of all other caches at once, one step's attention weights, and
    `layers * (kv_heads + 1)` floats per step and cache.

    Args:
        generator: the model.
        prompts: one image is generated for each.
        caches: by name, a function that makes a fresh cache; called once.
        batch_size: images compared at once; all of them when not given.
        state_file: a file that is written after the images and after every `batch_size` of them; when it exists, the
            run resumes from it. A run in one part writes no file.
        seed: seed of the batch; `Generator.generate` with this seed generates the same tokens.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`, above 0.
        tokens: integers `[images, cells]`: visual tokens to feed instead of generated ones (teacher forcing).
        progress: show a bar over the visual tokens of every part.

    Raises:
        GeneratorError: a setting is out of range, there is no prompt, or the tokens do not fit.
        HeadMapError: a cache's map does not fit the model.
        ProfilingError: the state file is of another run, or cannot be written.
        ValueError: there is no cache, one is not a new `SSDCache`, or the model's outputs are not finite.
    """
    sampling = generator.sampling(guidance_scale, temperature, seed)
    sampling.check_random()
    check_run(generator, prompts)
    prompts = list(prompts)
    made = _make(generator.checkpoint, caches)
    total, shape = len(prompts), (len(prompts), generator.checkpoint.num_visual_tokens)
    if tokens is not None and (tokens.dtype.is_floating_point or tokens.dtype == torch.bool or tokens.shape != shape):
        raise GeneratorError(f"tokens are {tokens.dtype} {list(tokens.shape)}: give integers {list(shape)}")
    batch_size = total if batch_size is None else batch_size
    if total <= check_count("batch_size", batch_size, 1):
        return compare_caches(generator, prompts, made, sampling, tokens, progress)
    settings = fingerprint(generator, prompts, batch_size, sampling) | {
        "caches": {name: cache_facts(cache) for name, cache in made.items()},
        "tokens": None if tokens is None else hashlib.sha256(tokens.cpu().long().numpy().tobytes()).hexdigest(),
    }
    images = torch.zeros(shape, dtype=torch.int64)
    num_done = torch.zeros(1, dtype=torch.int64)
    results = {name: Fidelity.empty(generator.checkpoint, cache, images) for name, cache in made.items()}
    tensors = {"images": images, "num_done": num_done}
    tensors |= {f"{name}.{part}": getattr(result, part) for name, result in results.items() for part in MEASURED}
    state = ResumableState(state_file, FORMAT, WHAT, settings, tensors)
    if not state.is_resumed:
        images.copy_(generator.generate(prompts, **vars(sampling)) if tokens is None else tokens)
        state.save()
    for start in range(int(num_done), total, batch_size):
        for cache in made.values():
            cache.reset()
        part = slice(start, start + batch_size)
        for name, found in compare_caches(generator, prompts[part], made, sampling, images[part], progress).items():
            results[name].put(start, found)
        num_done.fill_(min(start + batch_size, total))
        state.save()
    state.save(is_finished=True)
    return results


def check_run(generator: Generator, prompts: Sequence[str]) -> None:
    """Refuse, before any image is generated, a model that cannot be compared, and prompts that do not fit."""
    check_whole(generator.language_model)
    generator.check_prompts(prompts)
    parts_of(generator)


def fingerprint(
    generator: Generator, prompts: Sequence[str], batch_size: int, sampling: ResolvedSampling
) -> dict[str, Any]:
    """The settings that a state file records; a run resumes from the file only if they are equal."""
    return {
        **model_facts(generator),
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        "batch_size": batch_size,
        **asdict(sampling),
    }


def _make(checkpoint: Checkpoint, caches: Mapping[str, Callable[[], SSDCache]]) -> dict[str, SSDCache]:
    if not caches:
        raise ValueError("caches is empty: give at least one, as {'ssd 20%': lambda: SSDCache(head_map, 0.2)}")
    made = {name: make_cache() for name, make_cache in caches.items()}
    for name, cache in made.items():
        if not isinstance(cache, SSDCache):
            raise ValueError(f"caches[{name!r}] makes a {type(cache).__name__}: make an SSDCache")
        checkpoint.check_head_map(cache.head_map)
    if len({id(cache) for cache in made.values()}) < len(made) or any(map(SSDCache.get_seq_length, made.values())):
        raise ValueError("caches makes the same cache twice, or a used one: each function must make a new SSDCache")
    return made
