"""`learn_score`: train token scores by minimising the KL divergence between full-cache and evicted-cache outputs.

Images are generated with a full cache. Their tokens go through the decoder again, without the tokens that an `SSDCache`
would have evicted, and a `LearnedScore` is trained by gradient descent on the divergence. The model's weights do not
change, and labels and slots only with `learn_slots`.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ssd_cache.budget import Budget, check_count, is_amount
from ssd_cache.cache.cache import SSDCache, default_buffer
from ssd_cache.cache.plans import LayerPlan
from ssd_cache.cache.sharding import check_whole
from ssd_cache.head_map.checks import MAX_TEXT
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Generator, generator_of
from ssd_cache.profiling.measuring import model_facts, prompts_sha256
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.progress import progress_bar
from ssd_cache.training.learning_state import LearningRun, LearningState
from ssd_cache.training.memory import images_at_once
from ssd_cache.training.moving_slots import initial_slots
from ssd_cache.training.recording import check_trainable, make_recordings, training_batches
from ssd_cache.training.teacher_forcing import Recording
from ssd_cache.training.trainer import Trainer, mean_attention

SAVE_SECONDS = 30
"""Seconds between two writes of the state file during the steps."""

SMOOTHED = 20
"""Steps whose mean divergence the progress bar shows; the divergence of one batch varies with its images."""

LEARNED = ", score learned"
"""Suffix of the `method` of a map with a learned score."""


def learn_score(
    model: PreTrainedModel | Generator,
    prompts: Sequence[str],
    head_map: HeadMap,
    *,
    budget: Budget | None = None,
    buffer: int | None = None,
    num_recent: int | float = 0,
    num_sinks: int = 0,
    num_steps: int = 400,
    learning_rate: float = 0.02,
    learn_slots: bool = False,
    processor: ProcessorMixin | None = None,
    batch_size: int = 4,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    progress: bool = True,
    state_file: str | os.PathLike[str] | None = None,
) -> HeadMap:
    """Train a score for a map; its semantic heads then rank tokens by this score instead of the attention received.

    First, an image is generated for each prompt with a full cache. Each step then feeds the tokens of some images
    through the decoder twice, all tokens at once: with all tokens, and with the tokens that a cache of these settings
    would hold under the current score. The loss is the KL divergence of the next-token distributions.

    The gradient reaches the score with a straight-through estimator. In the forward pass, the kept tokens are exactly
    those of the cache. In the backward pass, the eviction threshold is soft, and a dropped token receives the change
    of the loss that its attention weight would have caused. So the score learns which tokens the outputs depend on;
    these are not always the tokens that receive the most attention. The initial score is the mean attention that each
    position still receives from a given row on.

    Memory, in addition to the model: the decoder inputs of every image, in the memory of the CPU; and at most 4 GiB,
    unless one image needs more. A step keeps the input of each layer and computes the rest again in the backward
    pass. It takes as many images through the decoder at once as fit, and adds up their gradients.

    Under `accelerate launch` or `torchrun`, the processes take the batches in turn when images are generated, and the
    images of each step. The score is that of one process, up to rounding. Every process returns it; only the main
    process writes the state file.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        prompts: prompts of the training images; a few hundred different ones.
        head_map: gives the labels; if it has a learned score, training continues from it, and if that ranks the tokens
            of all heads, so does the new one.
        budget: budget of the cache that the score is for, as for `SSDCache`; also the map's new budget.
        buffer: eviction interval of that cache; by default a third of a row, as in `SSDCache` with a learned score.
        num_recent: newest tokens that semantic heads of that cache always keep, as for `SSDCache`.
        num_sinks: first visual tokens that every head of that cache keeps, as for `SSDCache`.
        num_steps: total number of steps, of `batch_size` images each. A larger number than in the state file extends
            its run: from its last step on, the schedule (learning rate, softness of the threshold) is that of the new
            total, so the score differs from that of a run with this total.
        learning_rate: learning rate of Adam for the position weights; those of K and V use a third of it.
        learn_slots: also move slots between heads, all of which then rank their tokens by the score: a window is a
            special case of a learned score, which knows positions. The budget is rounded to multiples of `buffer`. The
            gradient of the loss by the slots of each head is averaged over 20 steps; then `buffer` slots move from each
            of the heads with the least value of a slot to those with the most. The total does not grow, and every head
            keeps at least 2 * `buffer`, in addition to recents and sinks. In the last quarter of the steps, no slots
            move, and the heads of a layer have at most three different numbers of slots.
        processor: the model's processor; by default loaded from the same source as the model.
        batch_size: images per step, shared by the processes; four times as many are generated together, or fewer if
            their K and V would take more than 2.8 GiB.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`, above 0.
        seed: seed of the first images, and of the order of the training batches.
        progress: show a progress bar over images, then over steps.
        state_file: a file that is written after every batch of images, every `SAVE_SECONDS` of steps, and when the run
            is interrupted. If it exists, the run resumes from it and gives the same score, bit for bit, with the same
            number of processes.

    Returns:
        The map with the score as `learned` and the budget that it was trained for as `budget`; with `learn_slots`, the
        score ranks the tokens of all heads, and the budget is a list of the learned slots. Labels stay, for other
        policies. Its `profile["learning"]["held_out"]` compares the divergence before and after on `HELD_OUT`
        additional images of the same prompts.

    Raises:
        GeneratorError: no prompts, too long prompts, an unsupported model, or a generation setting out of range.
        HeadMapError: the map was made for a model of another shape.
        ProfilingError: numbers that are not finite, a state file of another run, or one that cannot be written.
        ValueError: any other setting out of range, a map under which no head ranks its tokens, or a budget that is too
            small for `learn_slots`.
    """
    generator, processes = model if isinstance(model, Generator) else generator_of(model, processor), Processes()
    check_whole(generator.language_model)
    generator.checkpoint.check_head_map(head_map)
    settings: dict[str, Any] = {"learning_rate": learning_rate, "batch_size": batch_size, "learn_slots": learn_slots}
    cache_settings: dict[str, Any] = {"buffer": buffer, "num_recent": num_recent, "num_sinks": num_sinks}
    plans = check_learning(head_map, budget, num_steps=num_steps, **settings, **cache_settings)
    resolved = generator.sampling(guidance_scale, temperature, seed)
    resolved.check_random()
    generator.check_prompts(prompts)
    check_trainable(generator)
    sampling: dict[str, Any] = {"guidance_scale": resolved.guidance_scale, "temperature": resolved.temperature}
    facts = {
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        **settings,
        **cache_settings,
        "buffer": plans[0].buffer,
        "seed": seed,
        **sampling,
    }
    fingerprint = {
        **model_facts(generator),
        "head_map": head_map.digest,
        "slots": [list(plan.num_slots) for plan in plans],
        **facts,
    }
    if learn_slots:
        budget = [list(plan.num_slots) for plan in plans]
    elif budget is None:
        budget = head_map.budget
    elif head_map.slots and is_amount(budget):  # one number scales the slots of the map
        budget = [list(plan.num_slots) for plan in plans]
    result = replace(  # made before the first step, so that an invalid result fails early
        head_map,
        budget=budget,
        method=f"{(head_map.method or 'labels given').removesuffix(LEARNED)}{LEARNED}"[:MAX_TEXT],
        profile={**head_map.facts_of_labels, "learning": {"num_steps": num_steps, **facts}},
    )
    path = Path(state_file) if state_file is not None and processes.is_main else None
    run = LearningRun.open(path, fingerprint, result)
    run.begin_stage(num_steps)
    processes.check_agreement({**fingerprint, "num_steps": num_steps})
    run = replace(processes.gather_all(run)[0], path=path)
    if run.after is None:
        shows = progress and processes.is_main
        *recordings, held_out = make_recordings(generator, prompts, batch_size, seed, sampling, run, processes, shows)
        num_at_once = images_at_once(generator, [*recordings, held_out], -(-batch_size // processes.count), buffer)
        if run.learning is None:
            first = head_map.learned or mean_attention(generator, recordings[0], head_map, num_at_once)
            run.learning = LearningState.beginning(
                processes.gather_all(first)[0], [plan.num_slots for plan in plans] if learn_slots else None
            )
        schedule: dict[str, Any] = {"learning_rate": learning_rate, "num_steps": num_steps, "num_at_once": num_at_once}
        trainer = Trainer(generator, plans, **sampling, **schedule, processes=processes)
        if run.before is None:
            run.before = trainer.divergences(run.learning, held_out)
            run.save()
        _take_steps(
            run, trainer, islice(training_batches(recordings, batch_size, seed), run.num_steps, num_steps), shows
        )
        run.after = trainer.divergences(run.learning, held_out)
        run.save()
    assert run.learning is not None
    learning = {**result.profile["learning"], "held_out": run.compared()}
    if len(run.stages) > 1:
        learning["stages"] = run.stages
    if run.learning.slots is not None:
        result = replace(result, budget=run.learning.slots.tolist())
    learned = replace(run.learning.score(), ranks_all=learn_slots or head_map.ranks_all)
    return replace(result, learned=learned, profile={**result.profile, "learning": learning})


def check_learning(
    head_map: HeadMap,
    budget: Budget | None = None,
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
    learn_slots: bool = False,
    buffer: int | None = None,
    **cache_settings: Any,
) -> list[LayerPlan]:
    """The plan of each layer; raises ValueError for settings of `learn_score` that are out of range."""
    check_count("num_steps", num_steps, 1)
    check_count("batch_size", batch_size, 1)
    if isinstance(learning_rate, bool) or not 0 < learning_rate < 1:
        raise ValueError(f"learning_rate={learning_rate!r} is out of range: give a number between 0 and 1 (0.02)")
    if head_map.is_online or head_map.layout.draft_grids:
        what = "has no labels" if head_map.is_online else "has draft grids"
        raise ValueError(f"this head map {what}, and a score is learned for the labels and places of a single grid")
    buffer = default_buffer(head_map.layout, "learned") if buffer is None else buffer
    cache_settings = {"num_recent": 0, **cache_settings, "score": "sum", "buffer": buffer}
    if learn_slots:
        check_count("num_recent", cache_settings["num_recent"], 0)  # a fraction would change with the slots
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no head keeps its window
            budget = initial_slots([layer.plan for layer in SSDCache(head_map, budget, **cache_settings).layers])
    if learn_slots or head_map.ranks_all:
        head_map = replace(head_map, is_spatial=torch.zeros_like(head_map.is_spatial))
    plans = [layer.plan for layer in SSDCache(head_map, budget, **cache_settings).layers]
    heads = [head for plan in plans for head in zip(plan.is_spatial, plan.num_slots, strict=True)]
    if all(is_spatial or num_slots >= head_map.num_visual_tokens for is_spatial, num_slots in heads):
        raise ValueError("no head of this map ranks tokens at this budget: all are spatial, or hold everything")
    return plans


def _take_steps(run: LearningRun, trainer: Trainer, recordings: Iterator[Recording], progress: bool) -> None:
    """Take a step on each recording; the run is saved every `SAVE_SECONDS` and at the end, also after an exception."""
    assert run.learning is not None
    recent: deque[float] = deque(maxlen=SMOOTHED)
    saved = time.monotonic()
    steps: dict[str, Any] = {"total": trainer.num_steps, "initial": run.num_steps, "unit": " steps"}
    bar = progress_bar(desc="learning", **steps, disable=not progress)
    try:
        with bar:
            for recording in recordings:
                run.learning, divergence = trainer.step(run.learning, recording)
                recent.append(divergence)
                bar.set_postfix_str(f"mean of {len(recent)} steps: {sum(recent) / len(recent):.4f} nats", refresh=False)
                bar.update()
                if time.monotonic() - saved >= SAVE_SECONDS:
                    run.save()
                    saved = time.monotonic()
    finally:
        run.save()
