"""`measure_heads`: generate images with a full cache and sum up the attention of every head.

The recorder uses the attention "ssd" (`profiling/recorder.py`), so no attention matrix is ever stored. Processes can
share the batches. An interrupted run can resume (`profiling/state.py`). Nothing here labels heads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ssd_cache.budget import Amount, check_count
from ssd_cache.cache.sharding import check_whole
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.models import Generator, generator_of
from ssd_cache.profiling.observing import HeadObserver
from ssd_cache.profiling.recorder import RecordingCache
from ssd_cache.profiling.state import load_state, recorded_batch_size, save_state
from ssd_cache.profiling.statistics import HeadStatistics, Level, resolve_levels
from ssd_cache.runs.batching import default_batch_size
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.progress import progress_bar
from ssd_cache.runs.run_state import ProfilingError, check_state_place

DEFAULT_BATCH_SIZE = 4
"""Images at once if memory suffices; attention statistics need memory in addition to the full cache."""

SAMPLED_FROM_NAN = ("probability tensor", "device-side assert")
"""Parts of torch's error messages on a CPU and on a GPU. After the error on a GPU, all further GPU calls fail."""


def measure_heads(
    model: PreTrainedModel | Generator,
    prompts: Sequence[str],
    *,
    budget: Amount = 0.2,
    buffer: int | None = None,
    num_recent: Amount = 0.25,
    num_sinks: int = 0,
    levels: Sequence[Amount] | None = None,
    processor: ProcessorMixin | None = None,
    batch_size: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
    state_file: str | os.PathLike[str] | None = None,
) -> HeadStatistics:
    """Generate images with a full cache and sum up the attention of every head.

    In addition to the memory of generation, a run holds the queries of one grid row for every layer, row and KV head,
    and 4 bytes for each of their levels and cells. For short times it also holds a few copies of some softmax weights
    (see `recorder.CHUNK`). With the default buffer and one level, the total is under a tenth of the full cache's K and
    V, except in small batches (docs/profiling.md).

    Under `accelerate launch` or `torchrun`, the processes take the batches in turn. Each batch has the same seed as in
    a single process. Every process gets the sums of all batches; only the main process writes the state file.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        prompts: one image is generated for each.
        budget: budget of the cache that will use the results, one number as for `SSDCache`.
        buffer: eviction interval of that cache.
        num_recent: newest tokens that semantic heads of that cache keep.
        num_sinks: first tokens that every head of that cache keeps.
        levels: further budgets at which retained attention is measured, for `fit_heads`.
        processor: the model's processor; loaded from the model's source when not given.
        batch_size: images at once. When not given, the batch size of the state file, else 4, or fewer if free memory
            is too small for 4 (with a warning).
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`.
        seed: seed of the first batch; batch `i` uses `seed + i`.
        progress: show a progress bar over visual tokens.
        state_file: file that stores the sums after every batch. If it exists, the run resumes from it. A longer list of
            prompts extends a finished run if it begins with that run's prompts and those filled all batches.

    Returns:
        The sums, and in `run` the settings that they depend on.

    Raises:
        GeneratorError: no prompts, prompts that are too long, an unsupported model, or a generation setting out of
            range.
        ProfilingError: attention that is NaN; a state file of another run, or one that cannot be written.
        ValueError: any other setting out of range.
    """
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    checkpoint, processes = generator.checkpoint, Processes()
    shape = checkpoint.layout, checkpoint.num_layers, checkpoint.num_kv_heads
    check_whole(generator.language_model)
    found = resolve_levels(checkpoint.layout, budget, levels, buffer=buffer, num_recent=num_recent, num_sinks=num_sinks)
    generator.check_prompts(prompts)
    prompts, path = list(prompts), Path(state_file) if state_file else None
    if batch_size is None:
        kept = processes.gather_all(path and recorded_batch_size(path))[0]
        batch_size = kept or default_batch_size(generator, prompts, DEFAULT_BATCH_SIZE, processes=processes)
    check_count("batch_size", batch_size, 1)
    batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    sampling = asdict(generator.sampling(guidance_scale, temperature, seed))
    fingerprint = {
        **model_facts(generator),
        "revision": getattr(checkpoint.config, "_commit_hash", None),
        **checkpoint.layout.as_json(),
        "heads": list(shape[1:]),
        "levels": [list(astuple(level)) for level in found],
        "batch_size": batch_size,
        **sampling,
    }

    def facts_of(num_batches: int) -> dict[str, Any]:
        """Number and hash of the prompts in the first batches, so that a longer list that begins with them resumes."""
        part = prompts[: num_batches * batch_size]
        return {"num_prompts": len(part), "prompts_sha256": prompts_sha256(part)}

    statistics, done = HeadStatistics(*shape, found), 0
    if path is not None and processes.is_main:
        check_state_place(path)
        if path.exists():
            done = load_state(path, statistics, lambda number: fingerprint | facts_of(number))
    processes.check_agreement(fingerprint | facts_of(len(batches)))
    statistics, done = processes.gather_all((statistics, done))[0]
    own = range(done + processes.index, len(batches), processes.count)
    num_tokens = checkpoint.num_visual_tokens * sum(len(batches[index]) for index in own)
    shows = progress and processes.is_main
    with (
        ssd_attention(generator.language_model),
        progress_bar(desc="profiling", total=num_tokens, unit=" tokens", disable=not shows) as bar,
    ):
        for first in range(done, len(batches), processes.count):
            mine, batch = first + processes.index, statistics.empty()
            if mine < len(batches):
                batch = _measure_batch(generator, batches[mine], found, bar.update, **sampling | {"seed": seed + mine})
            # added in batch order, so that the sums do not depend on the number of processes
            for part in processes.gather_all(batch):
                statistics = statistics + part
            if path is not None and processes.is_main:
                finished = min(first + processes.count, len(batches))
                save_state(path, statistics, finished, fingerprint | facts_of(finished), finished == len(batches))
    statistics.run = {
        "budget": budget,
        "num_slots": [level.num_slots for level in found],
        "buffer": found[0].buffer,
        "num_recent": num_recent,
        "num_sinks": num_sinks,
        **facts_of(len(batches)),
        "batch_size": batch_size,
        **sampling,
    }
    return statistics


def _measure_batch(
    generator: Generator, prompts: list[str], levels: Sequence[Level], on_tokens: Callable, **settings
) -> HeadStatistics:
    """Generate one batch and return its statistics."""
    checkpoint = generator.checkpoint
    shape = checkpoint.layout, checkpoint.num_layers, checkpoint.num_kv_heads
    observer = HeadObserver(*shape, levels, generator.is_unconditional(len(prompts)))
    generate_recorded(generator, prompts, RecordingCache(*shape, observer), on_tokens=on_tokens, **settings)
    return observer.finish()


def generate_recorded(generator: Generator, prompts: Sequence[str], cache: RecordingCache, **settings) -> torch.Tensor:
    """Generate with a recording full cache and call its `finish`; returns tokens, as `Generator.generate`.

    Raises ProfilingError for NaN or infinite numbers, and for an image that does not have the grid's size.
    """
    checkpoint = generator.checkpoint
    try:
        tokens = generator.generate(prompts, cache, **settings)
    except RuntimeError as error:
        # sampling from NaN fails at once; the attention recorded so far shows the layer and head with the first NaN
        with suppress(RuntimeError):
            cache.finish()
        if any(text in str(error) for text in SAMPLED_FROM_NAN):
            raise ProfilingError(
                f"{checkpoint.name} gives NaN or infinite numbers, and its attention so far does not show where: its "
                "numbers overflow, as they may in float16; load it in bfloat16 or float32 (temperature 0 may show the "
                "head)"
            ) from error
        raise
    if tokens.shape[-1] != checkpoint.num_visual_tokens:
        raise ProfilingError(
            f"{checkpoint.name} generated {tokens.shape[-1]} visual tokens, but its grid is "
            f"{checkpoint.layout.text()}: a map would not fit; load the model with the configuration it was trained "
            "with"
        )
    cache.finish()
    return tokens


def model_facts(generator: Generator) -> dict[str, Any]:
    """Name, weights and dtype of a model, for the fingerprint of a run."""
    return {
        "model": generator.checkpoint.name,
        "weights": weights_sha256(generator.model),
        "dtype": str(generator.model.dtype),
    }


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Hash of the prompts, for a map's profile."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def weights_sha256(model: PreTrainedModel) -> str:
    """Hash of a few values of every parameter; a few suffice, because training changes all of them."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].cpu().contiguous()
        found.update(f"{name} {list(parameter.shape)}".encode() + sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
