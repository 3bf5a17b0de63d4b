"""`analyze`: generates images with a full cache and under every policy, and measures all phenomena of the paper.

It fixes the order of work and records the conditions. The other files of this package measure; `report.py` writes the
report.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

import ssd_cache
from ssd_cache.analysis.attention import AttentionRecorder, HeadAttention
from ssd_cache.analysis.concentration import Concentration, semantic_concentration
from ssd_cache.analysis.plan import NUM_IMAGES, Plan, plan_analysis
from ssd_cache.analysis.retention_map import Retention, RetentionProbe
from ssd_cache.analysis.scores import HeadScores, head_scores
from ssd_cache.budget import Budget, is_amount
from ssd_cache.cache.cache import MemoryStats
from ssd_cache.cache.policies import words_of
from ssd_cache.cache.sharding import check_whole
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Generator, Sampling, generator_of
from ssd_cache.profiling.measuring import check_prompts, draw_watched
from ssd_cache.profiling.recorder import RecordingCache


@dataclass(frozen=True)
class Analysis:
    """All measurements of `analyze`.

    Attributes:
        conditions: the model, settings and versions of the measurement, as JSON types.
        scores: labels and scores of the head map.
        attention: attention of the most spatial and the most semantic head, during generation with a full cache.
        concentration: semantic concentration over all images of the full cache.
        retention: by policy, the tokens of the first image that each head held.
        memory: by policy, bytes at the end, for all images together.
        pictures: the first image by policy, "full" first.
    """

    conditions: dict[str, Any]
    scores: HeadScores
    attention: tuple[HeadAttention, ...]
    concentration: Concentration
    retention: dict[str, Retention]
    memory: dict[str, MemoryStats]
    pictures: dict[str, Image.Image]


def analyze(
    model: PreTrainedModel | Generator,
    prompt: str,
    head_map: HeadMap,
    *,
    processor: ProcessorMixin | None = None,
    budget: Budget | None = None,
    slots: str | None = None,
    buffer: int | None = None,
    step: int | None = None,
    head: tuple[int, int] | None = None,
    num_images: int = NUM_IMAGES,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Measure where a model's heads look, what they hold, and at which tokens the prompt affects K and V.

    It generates `4 * num_images` images of one prompt: with a full cache, with the head map's own settings (its slots
    and its learned score, if it has them), and under H2O and StreamingLLM.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        prompt: the text prompt of all images.
        head_map: the map with the labels.
        processor: the processor of the model. Default: loaded from the same source as the model.
        budget: visual tokens that a head may hold, as for `SSDCache`. Default: the map's own budget, or 0.2.
        slots: as for `SSDCache`, for the head map's own policy.
        buffer: as for `SSDCache`.
        step: number of visual tokens seen when the retention map is read. Default: three quarters of the grid.
        head: a (layer, head) to plot. It replaces the most spatial or the most semantic head, depending on its kind.
        num_images: images per batch; the margin test needs several (see `margin_test`).
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`.
        seed: as for `Generator.generate`.
        progress: show a progress bar that counts visual tokens.

    Raises:
        ValueError: a setting is out of range, the model or the map does not fit, or attention is not finite.
    """
    Sampling(guidance_scale, temperature, seed)
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    plan = plan_analysis(
        generator.checkpoint,
        head_map,
        budget=budget,
        slots=slots,
        buffer=buffer,
        step=step,
        head=head,
        num_images=num_images,
    )
    return run_plan(
        generator, prompt, plan, guidance_scale=guidance_scale, temperature=temperature, seed=seed, progress=progress
    )


def run_plan(
    generator: Generator,
    prompt: str,
    plan: Plan,
    *,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Generate the images and measure them by the plan; see `analyze`."""
    check_whole(generator.language_model)
    check_prompts(generator, [prompt])
    checkpoint, head_map = generator.checkpoint, plan.head_map
    is_unconditional = generator.is_unconditional(plan.num_images)
    row = int(is_unconditional.long().argmin())  # the conditional row of the first image
    recorder = AttentionRecorder(plan.heads, checkpoint.grid, row=row)
    watching = RecordingCache(checkpoint.layout, checkpoint.num_layers, checkpoint.num_kv_heads, recorder)
    probes = {policy: RetentionProbe(cache, plan.step, row=row) for policy, cache in plan.caches.items()}
    retention: dict[str, Retention] = {}
    memory: dict[str, MemoryStats] = {}
    drawn: dict[str, torch.Tensor] = {}
    total = (1 + len(probes)) * plan.num_images * head_map.num_visual_tokens
    with (
        ssd_attention(generator.language_model),
        tqdm(
            total=total,
            unit=" visual tokens",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # write few lines to a log file
            disable=not progress,
        ) as bar,
    ):
        prompts = [prompt] * plan.num_images
        settings: dict[str, Any] = {"guidance_scale": guidance_scale, "temperature": temperature, "seed": seed}
        bar.set_description("full")
        drawn["full"] = draw_watched(generator, prompts, watching, on_tokens=bar.update, **settings)[:1]
        attention = recorder.result()
        concentration = semantic_concentration(watching, head_map, is_unconditional=is_unconditional, seed=seed)
        dtype, device = watching.layers[0].dtype, watching.layers[0].device
        del watching  # free the memory of the full cache
        for policy, probe in probes.items():
            cache = plan.caches[policy]
            cache.reset()

            def on_tokens(number: int, probe: RetentionProbe = probe) -> None:
                bar.update(number)
                probe(number)

            bar.set_description(policy)
            drawn[policy] = generator.generate(prompts, cache, on_tokens=on_tokens, **settings)[:1]
            assert probe.result is not None
            retention[policy], memory[policy] = probe.result, cache.memory_stats()
            cache.reset()
        pictures = generator.to_images(torch.cat(list(drawn.values())))
    conditions = _conditions(generator, plan) | {
        "prompt": prompt,
        "seed": seed,
        "guidance_scale": generator.guidance_scale if guidance_scale is None else guidance_scale,
        "temperature": generator.temperature if temperature is None else temperature,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    return Analysis(
        conditions,
        head_scores(head_map),
        attention,
        concentration,
        retention,
        memory,
        dict(zip(drawn, pictures, strict=True)),
    )


def _conditions(generator: Generator, plan: Plan) -> dict[str, Any]:
    checkpoint, head_map, cache = generator.checkpoint, plan.head_map, plan.caches[plan.own]
    return {
        "model": checkpoint.name,
        "revision": getattr(checkpoint.config, "_commit_hash", None),
        "layers": checkpoint.num_layers,
        "kv_heads": checkpoint.num_kv_heads,
        "grid": list(checkpoint.grid),
        "num_images": plan.num_images,
        "head_map_digest": head_map.digest,
        "head_map_method": head_map.method,
        "head_map_threshold": head_map.threshold,
        "policy": f"{plan.own}: {words_of(cache.slots, cache.score)}",
        "budget": cache.budget if is_amount(cache.budget) else cache.mean_slots,
        "buffer": cache.buffer,
        "step": plan.step,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ssd_cache": ssd_cache.__version__,
    }
