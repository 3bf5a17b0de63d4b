"""`profile_heads`: generate images with a full cache, record attention, and label each head spatial or semantic.

It combines three modules and records the settings in the map: `profiling/measuring.py` generates and records
attention, `profiling/statistics.py` defines the statistics, `profiling/labels.py` derives labels from them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ssd_cache.budget import KINDS, Amount, check_count
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.layout import ImageLayout
from ssd_cache.models import Generator, generator_of
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.profiling.labels import Method, check_labelling, label_heads, map_scores, resolve_window
from ssd_cache.profiling.measuring import measure_heads, prompts_sha256, resolve_batch_size
from ssd_cache.profiling.statistics import resolve_levels
from ssd_cache.runs.run_state import ProfilingError


def profile_heads(
    model: PreTrainedModel | Generator,
    prompts: Sequence[str],
    *,
    method: Method = "coverage",
    budget: Amount = 0.2,
    buffer: int | None = None,
    num_recent: Amount = 0.25,
    num_sinks: int = 0,
    levels: Sequence[Amount] | None = None,
    window: int | None = None,
    threshold: float | None = None,
    processor: ProcessorMixin | None = None,
    batch_size: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
    state_file: str | os.PathLike[str] | None = None,
) -> HeadMap:
    """Label a model's heads from images that it generates with a full cache (SSD's "sparsity profiling").

    The paper gives no formula. With "coverage", the default, each head gets the kind whose rules retain more of its
    attention at the intended budget. With "window", a head is spatial if the share of its attention on its newest
    tokens is above a threshold, which is chosen from the data. `label_heads` defines both methods; `HeadStatistics`
    defines the statistics that they use.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        prompts: one image is generated for each.
        method: "coverage" or "window".
        budget: budget of the cache that will use the map, as for `SSDCache`, but one number.
        buffer: eviction interval of that cache, as for `SSDCache`.
        num_recent: of that cache, as for `SSDCache`.
        num_sinks: of that cache, as for `SSDCache`.
        levels: further budgets at which retained attention is measured, for `allocate_budgets`.
        window: visual tokens that count as near. The default is one grid row plus one, which includes "right above".
        threshold: between 0 and 1, for "window"; chosen from the data when not given.
        processor: the model's processor; loaded from the model's source when not given.
        batch_size: images at once. When not given, the batch size of the state file, else 4, or fewer if free memory
            is too small for 4 (with a warning).
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`.
        seed: seed of the first batch; batch `i` uses `seed + i`.
        progress: show a progress bar over visual tokens.
        state_file: file that stores the sums after every batch. If it exists, the run resumes from it; a finished run
            only computes labels. A longer list of prompts extends a finished run if it begins with that run's prompts
            and those filled all batches.

    Returns:
        The map with its scores, threshold, model and profile, ready for `save_pretrained`.

    Raises:
        GeneratorError: no prompts, prompts that are too long, an unsupported model, or a generation setting out of
            range.
        ProfilingError: attention that is NaN; a state file of another run, or one that cannot be written.
        ValueError: any other setting out of range.
    """
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    checkpoint = generator.checkpoint
    check_labelling(checkpoint.layout, method, window, threshold)
    batch_size = resolve_batch_size(generator, prompts, batch_size, state_file)
    statistics = measure_heads(
        generator,
        prompts,
        budget=budget,
        buffer=buffer,
        num_recent=num_recent,
        num_sinks=num_sinks,
        levels=levels,
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        temperature=temperature,
        seed=seed,
        progress=progress,
        state_file=state_file,
    )
    is_spatial, cut = label_heads(statistics, method=method, window=window, threshold=threshold)
    scores = map_scores(statistics, window)
    if bad := [name for name, score in scores.items() if not score.isfinite().all()]:
        raise ProfilingError(
            f"{checkpoint.name if state_file is None else state_file}: the sums give no finite {bad[0]}; profile again "
            "without this state"
        )
    from_data = method == "window" and threshold is None
    return HeadMap(
        is_spatial,
        checkpoint.grid,
        previews=checkpoint.layout.draft_grids,
        scores=scores,
        threshold=cut,
        model_id=checkpoint.name,
        revision=getattr(checkpoint.config, "_commit_hash", None),
        model_type=checkpoint.config.model_type,
        method="window mass, threshold from the data" if from_data else {"window": "window mass"}.get(method, method),
        profile={
            "window": resolve_window(checkpoint.layout, window),
            "budget": budget,
            "num_slots": [level.num_slots for level in statistics.levels],
            "buffer": statistics.levels[0].buffer,
            "num_recent": num_recent,
            "num_sinks": num_sinks,
            "num_prompts": len(prompts),
            "prompts_sha256": prompts_sha256(prompts),
            "batch_size": batch_size,
            "guidance_scale": generator.guidance_scale if guidance_scale is None else guidance_scale,
            "temperature": generator.temperature if temperature is None else temperature,
            "seed": seed,
        },
    )


def check_profiling(
    layout: ImageLayout,
    *,
    method: str = "coverage",
    window: int | None = None,
    threshold: float | None = None,
    batch_size: int | None = None,
    fit: tuple[int, int] | None = None,
    **cache_settings,
) -> None:
    """Check settings before a model is loaded; arguments as for `profile_heads`.

    Args:
        fit: the model's layers and KV heads, if `fit_heads` will allocate the slots. It is then called with zeros
            instead of measurements.

    Raises:
        ValueError: a setting out of range; the message gives value, limit and remedy.
    """
    check_labelling(layout, method, window, threshold)
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `profile_heads` emits the same warnings
        levels = resolve_levels(layout, **cache_settings)
    if fit is not None:
        names = [f"retained_{kind}-{level.num_slots}" for level in levels for kind in KINDS]
        zeros = {name: torch.zeros(fit) for name in names}
        unmeasured = HeadMap(torch.zeros(fit, dtype=torch.bool), scores=zeros).with_layout(layout)
        fit_heads(unmeasured, cache_settings.get("budget", 0.2))
