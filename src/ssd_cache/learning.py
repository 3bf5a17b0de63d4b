"""`learn_score`: teach a map's semantic heads which visual tokens to keep, by what the model says without the others.

Pictures are drawn with a full cache and fed to the decoder again, without what an `SSDCache` would have evicted; the
weights of a `LearnedScore` follow the gradient of the divergence. Labels, slots and the model's weights stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ssd_cache.budget import Budget, check_count
from ssd_cache.cache import SSDCache, default_buffer
from ssd_cache.head_map import HeadMap
from ssd_cache.head_map_checks import MAX_TEXT
from ssd_cache.layer import LayerPlan
from ssd_cache.learned_score import LearnedScore
from ssd_cache.learning_state import LearningState, load_learning, save_learning
from ssd_cache.lessons import Lesson, draw_lesson, log_probabilities_of, taught
from ssd_cache.likelihood import kl_divergence
from ssd_cache.measuring import check_prompts, prompts_sha256, weights_sha256
from ssd_cache.models import Generator, GeneratorError, check_drawing, generator_of
from ssd_cache.pretended import masked_softmax, retained_tokens
from ssd_cache.sharding import check_whole
from ssd_cache.statistics import ProfilingError

DRAWN = 4
"""Batches drawn at once: a few pictures take hardly less time to draw than many."""

NO_SAY = 0.01
"""Guidance scales this near 1 give unconditional rows no say, and they are left out."""

SOFTNESS = 1.0, 0.4
"""Of the cut, at the first step and at the last: wide enough to hear of many tokens, then narrower."""

WARM_UP, CLIP = 10, 0.02
"""Steps until the whole learning rate, and the norm at which gradients are cut: a few pictures diverge the most."""

SAVE_EVERY = 25
"""Steps between two savings."""

LEARNED = ", score learned"
"""What a map's method says then."""

LEAST = 1e-4
"""Attention that counts as none, so that its logarithm is a number."""


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
    processor: ProcessorMixin | None = None,
    batch_size: int = 4,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
    state_file: str | os.PathLike[str] | None = None,
) -> HeadMap:
    """The map with a score that its semantic heads rank tokens by, in the place of the attention received.

    A picture of each prompt is drawn with a full cache. Then, step by step, the tokens of some of them go through the
    decoder at once, twice: with everything, and with what a cache of these settings would hold under the score so far.
    The loss is the KL divergence of the next token's distribution, and its gradient reaches the score through the
    choice itself: forwards the tokens kept are exactly the cache's; backwards the cut is soft, and a token that was
    dropped is credited with what its weight would have changed. So the score learns what pictures turn on, which is not
    what is looked at most. It begins with the attention that a place still receives from a row on, on average.

    Beside the model it holds what went into the decoder for every picture, and for a step every layer's attention
    weights a few times over.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        prompts: of the pictures to learn from; a few hundred, unlike each other.
        head_map: its labels; a learned score that it carries is what learning goes on from.
        budget: of the cache that the score is for, as for `SSDCache`; also the map's new budget.
        buffer: of that cache; a third of a row when not given, as `SSDCache` has it with a learned score.
        num_recent: of that cache, as for `SSDCache`.
        num_sinks: of that cache, as for `SSDCache`.
        num_steps: of `batch_size` pictures each.
        learning_rate: of Adam, for the weights of places; a third of it for those of K and V.
        processor: the model's; loaded from where the model came from when not given.
        batch_size: pictures a step; four times as many are drawn at once.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`, above 0.
        seed: of the first pictures, and of the order in which they are learned from.
        progress: show a bar over pictures, then over steps.
        state_file: where the score is kept now and then; when it exists, the run goes on from there.

    Returns:
        The map, its `learned` the score and its `budget` the one learned for.

    Raises:
        GeneratorError: no prompts, too long ones, an unsupported model, or a drawing setting out of range.
        HeadMapError: a map of another model's shape.
        ProfilingError: numbers that are not finite; a state file of another run, or one that can not be written.
        ValueError: any other setting out of range, or a map under which no head ranks its tokens.
    """
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    checkpoint = generator.checkpoint
    check_whole(generator.language_model)
    checkpoint.check_head_map(head_map)
    plans = check_learning(
        head_map,
        budget,
        buffer=buffer,
        num_recent=num_recent,
        num_sinks=num_sinks,
        num_steps=num_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        guidance_scale=None if generator.default_guidance is None else guidance_scale,
        temperature=temperature,
        seed=seed,
    )
    check_prompts(generator, prompts)
    settings: dict[str, Any] = {
        "guidance_scale": generator.guidance_scale if guidance_scale is None else guidance_scale,
        "temperature": temperature,
    }
    facts = {
        "num_prompts": len(prompts),
        "prompts_sha256": prompts_sha256(prompts),
        "batch_size": batch_size,
        "num_steps": num_steps,
        "learning_rate": learning_rate,
        "buffer": plans[0].buffer,
        "num_recent": num_recent,
        "num_sinks": num_sinks,
        "seed": seed,
        **settings,
    }
    fingerprint = {
        "model": checkpoint.name,
        "weights": weights_sha256(generator.model),
        "dtype": str(generator.model.dtype),
        "head_map": head_map.digest,
        "slots": [list(plan.num_slots) for plan in plans],
        **facts,
    }
    path = None if state_file is None else Path(state_file)
    state = None
    if path is not None and path.exists():
        state = load_learning(path, fingerprint, head_map.is_spatial.shape, head_map.grid)
    if state is None or state.num_steps < num_steps:
        lessons = _draw(generator, prompts, DRAWN * batch_size, seed, settings, progress)
        if state is None:
            learned = _mean_attention(generator, lessons[0], head_map) if head_map.learned is None else head_map.learned
            state = LearningState.beginning(learned)
        student = _Student(generator, plans, state, settings, learning_rate, num_steps)
        bar = tqdm(total=num_steps, initial=state.num_steps, unit=" steps", desc="learning", disable=not progress)
        with bar, torch.enable_grad():
            for lesson in islice(_steps(lessons, batch_size, seed), state.num_steps, num_steps):
                bar.set_postfix(nats=f"{student.step(lesson):.4f}")
                bar.update()
                if path is not None and (state.num_steps % SAVE_EVERY == 0 or state.num_steps == num_steps):
                    save_learning(path, state, fingerprint)
    return replace(
        head_map,
        learned=state.score(),
        budget=head_map.budget if budget is None else budget,
        method=f"{(head_map.method or 'labels given').removesuffix(LEARNED)}{LEARNED}"[:MAX_TEXT],
        profile={**head_map.profile, "learning": facts},
    )


def check_learning(
    head_map: HeadMap,
    budget: Budget | None = None,
    *,
    buffer: int | None = None,
    num_recent: int | float = 0,
    num_sinks: int = 0,
    num_steps: int = 400,
    learning_rate: float = 0.02,
    batch_size: int = 4,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[LayerPlan]:
    """Refuse settings out of range before a model is loaded, all as for `learn_score`; returns what each layer keeps.

    Raises:
        ValueError: value, limit and remedy.
    """
    check_count("num_steps", num_steps, 1)
    check_count("batch_size", batch_size, 1)
    if isinstance(learning_rate, bool) or not 0 < learning_rate < 1:
        raise ValueError(f"learning_rate={learning_rate!r} is out of range: give a number between 0 and 1 (0.02)")
    check_drawing(guidance_scale, temperature, seed)
    if temperature == 0:
        raise GeneratorError("temperature=0 leaves one token that is certain, and nothing to learn from; 1 is usual")
    if head_map.is_online or head_map.previews:
        what = "finds its labels while drawing" if head_map.is_online else "has previews"
        raise ValueError(f"this head map {what}, and a score is learned for the labels and places of a single grid")
    buffer = default_buffer(head_map.grid, "learned") if buffer is None else buffer
    settings: dict[str, Any] = {"buffer": buffer, "num_recent": num_recent, "num_sinks": num_sinks}
    plans = [layer.plan for layer in SSDCache(head_map, budget, score="sum", **settings).layers]
    heads = [head for plan in plans for head in zip(plan.is_spatial, plan.num_slots, strict=True)]
    if all(is_spatial or num_slots >= head_map.num_visual_tokens for is_spatial, num_slots in heads):
        raise ValueError("no head of this map ranks tokens at this budget: all are spatial, or hold everything")
    return plans


def _draw(
    generator: Generator, prompts: Sequence[str], num_at_once: int, seed: int, settings: dict[str, Any], progress: bool
) -> list[Lesson]:
    """A lesson of each batch; without unconditional rows where guidance gives them no say."""
    lessons = []
    starts = range(0, len(prompts), num_at_once)
    for index, start in enumerate(tqdm(starts, unit=" batches", desc="drawing", disable=not progress)):
        lesson = draw_lesson(generator, list(prompts[start : start + num_at_once]), seed=seed + index, **settings)
        lessons.append(lesson.conditional() if abs(settings["guidance_scale"] - 1) < NO_SAY else lesson)
    return lessons


def _steps(lessons: Sequence[Lesson], batch_size: int, seed: int) -> Iterator[Lesson]:
    """Some pictures a step for ever, in an order that only the seed decides; those of a step were drawn together."""
    parts = [
        lesson.part(slice(start, start + batch_size))
        for lesson in lessons
        for start in range(0, lesson.num_pictures, batch_size)
    ]
    order = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(parts), generator=order).tolist():
            yield parts[index]


class _Student:
    """Takes steps; what it has learned is in `state`."""

    def __init__(self, generator, plans, state: LearningState, settings, learning_rate: float, num_steps: int):
        self.generator, self.plans, self.state, self.settings = generator, plans, state, settings
        self.learning_rate, self.num_steps = learning_rate, num_steps
        self.device = generator.model.device
        self.softness = 0.0
        self.score: LearnedScore | None = None  # None while everything is kept

    def step(self, lesson: Lesson) -> float:
        """One step; returns the divergence of a token, in nats, on average over pictures and tokens."""
        done = self.state.num_steps / self.num_steps
        first, last = SOFTNESS
        self.softness = first * (last / first) ** done
        parameters = self.state.parameters(self.device)
        with taught(self.generator, lesson, self._weigh):
            with torch.no_grad():
                full = log_probabilities_of(self.generator, lesson, **self.settings)
            self.score = LearnedScore(**parameters)
            loss = kl_divergence(full, log_probabilities_of(self.generator, lesson, **self.settings)).mean()
            self.score = None
        if not loss.isfinite():
            raise ProfilingError(
                f"{self.generator.checkpoint.name} gives NaN or infinite numbers: its numbers overflow, as they may in "
                "float16; load it in bfloat16 or float32"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        rate = self.learning_rate * min(1.0, (self.state.num_steps + 1) / WARM_UP) * (1 - done) ** 0.5
        self.state.follow({name: _gradient(parameter) for name, parameter in parameters.items()}, rate)
        return loss.item()

    def _weigh(self, layer_idx: int, logits: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if self.score is None:
            return logits.softmax(-1)
        score = self.score.at(layer_idx)
        return masked_softmax(logits, retained_tokens(self.plans[layer_idx], score, keys, values, self.softness))


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None  # every tensor has a say in every rank
    return parameter.grad


@torch.no_grad()
def _mean_attention(generator: Generator, lesson: Lesson, head_map: HeadMap) -> LearnedScore:
    """The score to begin with: the logarithm of the attention that a place still receives from a row on.

    On average over the pictures, taken apart into a part by rows and one by columns and distance; nothing of K and V.
    """
    rows, columns = head_map.grid
    found: dict[int, torch.Tensor] = {}
    dims: dict[str, int] = {}

    def watch(layer_idx: int, logits: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights, num_visual = logits.softmax(-1), keys.shape[2]
        received = weights[..., -num_visual:, -num_visual:].sum(2).mean(0)  # [kv_heads, tokens, tokens]
        received = torch.nn.functional.pad(received, (0, 1, 0, 1))  # the last token of all was never fed
        future = received.unflatten(1, (rows, columns)).sum(2).flip(1).cumsum(1).flip(1)
        found[layer_idx] = (future + LEAST).log().unflatten(2, (rows, columns)).cpu()
        dims.update(key=keys.shape[3], value=values.shape[3])
        return weights

    settings = {"guidance_scale": 1.0, "temperature": 1.0}
    with taught(generator, lesson, watch):
        log_probabilities_of(generator, lesson, **settings)
    table = torch.stack([found[layer] for layer in sorted(found)])  # [layers, kv_heads, rows now, rows, columns]
    row = table.mean(-1)
    rest = table - row[..., None]
    column = torch.stack(
        [torch.stack([rest[:, :, now, now - far] for now in range(far, rows)]).mean(0) for far in range(rows)], 2
    )
    states = {name: torch.zeros(*table.shape[:2], size) for name, size in dims.items()}
    return LearnedScore(row=row, column=column, **states)
