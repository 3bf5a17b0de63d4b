"""`analyze`: generates images with a full cache and under every policy, and measures all phenomena of the paper.

It checks the settings, fixes the order of work and records the conditions. The other files of this package measure and
plot; `report.py` writes the report.
"""

from __future__ import annotations

import dataclasses
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
from ssd_cache.analysis.retention import Retention, read_retention
from ssd_cache.analysis.scores import HeadScores, choose_heads, head_scores
from ssd_cache.budget import Budget, check_count, is_amount
from ssd_cache.cache.cache import MemoryStats, SSDCache
from ssd_cache.cache.policies import own_policy, policy_label, words_of
from ssd_cache.cache.sharding import check_whole
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.head_map.head_map import HeadMap, HeadMapError
from ssd_cache.models import Checkpoint, Generator, generator_of
from ssd_cache.profiling.measuring import generate_recorded
from ssd_cache.profiling.recorder import RecordingCache

BASELINES = ("h2o", "streaming-llm")
"""Policies that are measured in addition to the head map with its default settings."""

NUM_IMAGES = 4


@dataclass(frozen=True)
class Analysis:
    """All measurements of `analyze`.

    Attributes:
        conditions: the model, settings and versions of the measurement, as JSON types.
        scores: labels of the head map and the statistics behind them.
        attention: attention of the most spatial and the most semantic head, during generation with a full cache.
        concentration: semantic concentration over all images of the full cache.
        retention: by policy, the tokens of the first image that each head held; the head map's policy comes first.
        memory: by policy, bytes at the end, for all images together.
        images: the first image by policy, "full" first.
    """

    conditions: dict[str, Any]
    scores: HeadScores
    attention: tuple[HeadAttention, ...]
    concentration: Concentration
    retention: dict[str, Retention]
    memory: dict[str, MemoryStats]
    images: dict[str, Image.Image]


def analyze(
    model: PreTrainedModel | Generator,
    prompt: str,
    head_map: HeadMap,
    *,
    processor: ProcessorMixin | None = None,
    budget: Budget | None = None,
    buffer: int | None = None,
    num_images: int = NUM_IMAGES,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Measure where a model's heads attend, which tokens they hold, and at which tokens the prompt affects K and V.

    It generates `4 * num_images` images of one prompt: with a full cache, with the head map's own settings (its slots
    and its learned score, if it has them), and under H2O and StreamingLLM. The tokens that heads hold are read when
    three quarters of an image are generated.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        prompt: the text prompt of all images.
        head_map: the map with the labels.
        processor: the processor of the model. Default: loaded from the same source as the model.
        budget: as for `SSDCache`, for every policy.
        buffer: as for `SSDCache`, for every policy.
        num_images: images per batch; the margin test needs several (see `margin_test`).
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`.
        seed: as for `Generator.generate`.
        progress: show a progress bar that counts visual tokens.

    Raises:
        ValueError: a setting is out of range, the model or the map does not fit, or attention is not finite.
    """
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    checkpoint, prompts = generator.checkpoint, [prompt] * num_images
    caches = make_caches(checkpoint, head_map, budget, buffer, num_images)
    sampling = dataclasses.asdict(generator.sampling(guidance_scale, temperature, seed))
    check_whole(generator.language_model)
    generator.check_prompts([prompt])
    scores, step = head_scores(head_map), head_map.num_visual_tokens * 3 // 4
    is_unconditional = generator.is_unconditional(num_images)
    row = int(is_unconditional.long().argmin())  # the conditional row of the first image
    tokens: dict[str, torch.Tensor] = {}  # of the first image, by policy
    retention: dict[str, Retention] = {}
    memory: dict[str, MemoryStats] = {}
    num_tokens = (1 + len(caches)) * num_images * checkpoint.num_visual_tokens
    with (
        ssd_attention(generator.language_model),
        tqdm(total=num_tokens, unit=" visual tokens", desc="full", disable=not progress) as bar,
    ):
        recorder = AttentionRecorder(choose_heads(scores), checkpoint.grid, row=row)
        full = RecordingCache(checkpoint.layout, checkpoint.num_layers, checkpoint.num_kv_heads, recorder)
        tokens["full"] = generate_recorded(generator, prompts, full, on_tokens=bar.update, **sampling)[:1]
        concentration = semantic_concentration(full, head_map, is_unconditional, seed)
        full.reset()  # frees its memory
        for policy, cache in caches.items():

            def on_tokens(number: int, policy: str = policy, cache: SSDCache = cache) -> None:
                bar.update(number)
                # called after a forward pass: the token just fed is stored, the next one is not generated yet
                if cache.layers[-1].num_visual == step:
                    retention[policy] = read_retention(cache, row=row)

            bar.set_description(policy)
            tokens[policy] = generator.generate(prompts, cache, on_tokens=on_tokens, **sampling)[:1]
            memory[policy] = cache.memory_stats()
        images = dict(zip(tokens, generator.to_images(torch.cat(list(tokens.values()))), strict=True))
    own_name, own = next(iter(caches.items()))
    device = generator.model.device
    conditions = {
        "model": checkpoint.name,
        "revision": getattr(checkpoint.config, "_commit_hash", None),
        "layers": checkpoint.num_layers,
        "kv_heads": checkpoint.num_kv_heads,
        "grid": list(checkpoint.grid),
        "num_images": num_images,
        "head_map_digest": head_map.digest,
        "head_map_method": head_map.method,
        "head_map_threshold": head_map.threshold,
        "policy": f"{own_name}: {words_of(own.slots, own.score)}",
        "budget": own.budget if is_amount(own.budget) else own.mean_slots,
        "buffer": own.buffer,
        "step": step,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ssd_cache": ssd_cache.__version__,
        "prompt": prompt,
        **sampling,
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    return Analysis(conditions, scores, recorder.result(), concentration, retention, memory, images)


def make_caches(
    checkpoint: Checkpoint, head_map: HeadMap, budget: Budget | None, buffer: int | None, num_images: int
) -> dict[str, SSDCache]:
    """Check the settings of `analyze`, before the model is loaded, and make one cache per policy.

    The policy of the head map's default settings comes first. Raises the same errors as `analyze`.
    """
    if head_map.is_online:
        raise HeadMapError("an online map has no labels to analyze: give a head map, or profile the model first")
    others = "`ssd-cache profile` and `eval fidelity` support it"
    if checkpoint.layout.draft_grids:
        raise ValueError(f"{checkpoint.name} generates a draft grid first; the analysis plots one grid. {others}")
    if checkpoint.family.default_guidance is None:
        raise ValueError(f"{checkpoint.name} has no guidance, whose rows the analysis compares. {others}")
    checkpoint.check_head_map(head_map)
    check_count("num_images", num_images, 1)
    policy, settings = own_policy(head_map)
    label = policy_label(policy, settings)
    if not (budget is None or is_amount(budget)):  # this form of budget already sets the slots per head
        settings = {}
    own = SSDCache.from_policy(policy, head_map, budget, buffer=buffer, **settings)
    return {label: own} | {name: SSDCache.from_policy(name, head_map, budget, buffer=buffer) for name in BASELINES}
