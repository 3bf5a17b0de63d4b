"""`profile_heads`: generate images with a full cache, record attention, and label each head spatial or semantic.

It records the settings in the map. `profiling/measuring.py` generates and records attention,
`profiling/statistics.py` defines the statistics, and `profiling/labels.py` derives labels from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from ssd_cache.budget import check_count
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.layout import ImageLayout
from ssd_cache.models import Generator, generator_of
from ssd_cache.profiling.allocation import check_levels
from ssd_cache.profiling.labels import Method, check_labelling, label_heads, map_scores, resolve_window
from ssd_cache.profiling.measuring import measure_heads
from ssd_cache.profiling.statistics import resolve_levels


def profile_heads(
    model: PreTrainedModel | Generator,
    prompts: Sequence[str],
    *,
    method: Method = "coverage",
    window: int | None = None,
    threshold: float | None = None,
    processor: ProcessorMixin | None = None,
    **measuring: Any,
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
        window: visual tokens that count as near. The default is one grid row plus one, which includes "right above".
        threshold: between 0 and 1, for "window"; chosen from the data when not given.
        processor: the model's processor; loaded from the model's source when not given.
        measuring: budget, buffer, num_recent, num_sinks, levels, batch_size, guidance_scale, temperature, seed,
            progress and state_file, as for `measure_heads`.

    Returns:
        The map with its scores, threshold, model and profile, ready for `save_pretrained`.

    Raises:
        GeneratorError, ProfilingError, ValueError: as for `measure_heads`, or a labelling setting out of range.
    """
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    checkpoint = generator.checkpoint
    check_labelling(checkpoint.layout, method, window, threshold)
    statistics = measure_heads(generator, prompts, **measuring)
    is_spatial, cut = label_heads(statistics, method=method, window=window, threshold=threshold)
    chosen = ", threshold from the data" if threshold is None else ""
    return HeadMap(
        is_spatial,
        checkpoint.grid,
        previews=checkpoint.layout.draft_grids,
        scores=map_scores(statistics, window),
        threshold=cut,
        model_id=checkpoint.name,
        revision=getattr(checkpoint.config, "_commit_hash", None),
        model_type=checkpoint.config.model_type,
        method="coverage" if method == "coverage" else f"window mass{chosen}",
        profile={"window": resolve_window(checkpoint.layout, window), **statistics.run},
    )


def check_profiling(
    layout: ImageLayout,
    *,
    method: str = "coverage",
    window: int | None = None,
    threshold: float | None = None,
    batch_size: int | None = None,
    fit: bool = False,
    **cache_settings,
) -> None:
    """Check settings of `profile_heads`, and of `fit_heads` if `fit` is True, before a model is loaded.

    Raises:
        ValueError: as those functions do.
    """
    check_labelling(layout, method, window, threshold)
    if batch_size is not None:
        check_count("batch_size", batch_size, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `profile_heads` emits the same warnings
        levels = resolve_levels(layout, **cache_settings)
    if fit:
        check_levels([level.num_slots for level in levels])
