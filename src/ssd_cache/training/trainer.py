"""The trainer of a learned score: takes gradient steps on images, and measures the divergence of held-out images.

It accesses no files and generates no images: `learning.py` provides recordings, and `learning_state.py` stores results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import torch

from ssd_cache.cache.plans import LayerPlan
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.models import Generator
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.run_state import ProfilingError
from ssd_cache.training.learning_state import LearningState
from ssd_cache.training.moving_slots import MOVE_STEPS, SETTLED, limit_sizes, move_slots
from ssd_cache.training.pretended import RetainedTokens, masked_softmax, retained_tokens
from ssd_cache.training.teacher_forcing import Recording, Weigh, WeighBlock, divergence_of_states, teacher_forced

SOFTNESS = 1.0, 0.4
"""Initial and final temperature of the soft eviction threshold."""

WARM_UP, CLIP = 10, 0.02
"""Steps of learning-rate warm-up, and the norm at which gradients are clipped: a few images have large divergences."""

LEAST = 1e-4
"""Added to the attention before the logarithm, so that zero attention gives a finite number."""


class Trainer:
    """Takes gradient steps of a score, on a schedule of `num_steps`; `plans` are those of the cache it is for.

    A state with slots has its own, and these move on the same schedule (`moving_slots.py`).

    The images of a step go through the decoder `num_at_once` at a time, so memory does not depend on their number.
    The processes of a run take these parts in turn and all get the same result.
    """

    def __init__(
        self,
        generator: Generator,
        plans: Sequence[LayerPlan],
        guidance_scale: float,
        temperature: float,
        learning_rate: float,
        num_steps: int,
        num_at_once: int,
        processes: Processes,
    ):
        self.generator, self.plans = generator, plans
        self.sampling = {"guidance_scale": guidance_scale, "temperature": temperature}
        self.learning_rate, self.num_steps = learning_rate, num_steps
        self.num_at_once, self.processes = num_at_once, processes

    def step(self, state: LearningState, recording: Recording) -> tuple[LearningState, float]:
        """The state after a step, and the mean divergence per token before it, in nats, over images and tokens."""
        done = state.num_steps / self.num_steps
        first, last = SOFTNESS
        softness = first * (last / first) ** done
        parameters, own_loss = state.parameters(self.generator.model.device), 0.0
        extra = None
        if state.slots is not None:  # the gradient of zero further slots is the change of the loss for a slot
            extra = torch.zeros(state.slots.shape, device=self.generator.model.device, requires_grad=True)
        for part in self._own_parts(recording):
            share = len(part.is_unconditional) / len(recording.is_unconditional)
            with teacher_forced(self.generator, part) as run, torch.enable_grad():
                mean = self._divergence(run, part, state, LearnedScore.of(parameters), softness, extra).mean() * share
                mean.backward()
            own_loss += mean.item()
        loss = sum(self.processes.gather_all(own_loss))
        self._check(torch.tensor(loss))
        for value in [*parameters.values(), *([] if extra is None else [extra])]:
            own = torch.zeros_like(value) if value.grad is None else value.grad
            value.grad = torch.stack(self.processes.gather_all(own.cpu())).sum(0).to(value.device)
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        rate = self.learning_rate * min(1.0, (state.num_steps + 1) / WARM_UP) * (1 - done) ** 0.5
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        state = state.follow(gradients, rate)
        return (state if extra is None else self._value_slots(state, extra)), loss

    def _value_slots(self, state: LearningState, extra: torch.Tensor) -> LearningState:
        """The state with the values of this step added; slots move every `MOVE_STEPS`, and end with few sizes."""
        torch.nn.utils.clip_grad_norm_(extra, CLIP)
        assert state.slots is not None
        assert extra.grad is not None
        slots, values = state.slots, state.tensors["slot_values"] - extra.grad.cpu()
        done = state.num_steps / self.num_steps
        if state.num_steps % MOVE_STEPS == 0:
            slots = move_slots(slots, values, done, self.plans[0])
            values = torch.zeros_like(values)
        if done > SETTLED:
            slots = limit_sizes(slots, self.plans[0].buffer)
        return state.with_slots(slots, values)

    @torch.no_grad()
    def divergences(self, state: LearningState, recording: Recording) -> torch.Tensor:
        """The mean divergence per token of each image, in nats, float64 `[images]`; takes no step."""
        score, own = LearnedScore.of(state.parameters(self.generator.model.device)), []
        for part in self._own_parts(recording):
            with teacher_forced(self.generator, part) as run:
                own.append(self._divergence(run, part, state, score, SOFTNESS[-1]).double().mean(1).cpu())
        rounds = zip_longest(*self.processes.gather_all(own))
        found = torch.cat([part for parts in rounds for part in parts if part is not None])
        self._check(found)
        return found

    def _own_parts(self, recording: Recording) -> list[Recording]:
        """The images of this process, `num_at_once` in each part."""
        return recording.split(self.num_at_once)[self.processes.index :: self.processes.count]

    def _divergence(
        self,
        run: Callable[[Weigh], torch.Tensor],
        recording: Recording,
        state: LearningState,
        score: LearnedScore,
        softness: float,
        extra: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """KL divergence of the next token, full cache against evicted cache, `[images, cells]`."""
        plans = self.plans
        if state.slots is not None:
            slots = state.slots.tolist()
            plans = [replace(plan, num_slots=tuple(held)) for plan, held in zip(plans, slots, strict=True)]

        def weigh_retained(
            layer_idx: int, keys: torch.Tensor, values: torch.Tensor
        ) -> tuple[WeighBlock, Sequence[torch.Tensor]]:
            of_layer = None if extra is None else extra[layer_idx]
            retained = retained_tokens(plans[layer_idx], score.at(layer_idx), keys, values, softness, of_layer)
            return partial(_weigh_held, retained.parts), retained.tensors

        with torch.no_grad():
            full = run(lambda *_: (lambda logits, _: logits.softmax(-1), ()))
        evicted = run(weigh_retained)
        return divergence_of_states(self.generator, recording.is_unconditional, full, evicted, **self.sampling)

    def _check(self, divergences: torch.Tensor) -> None:
        if not divergences.isfinite().all():
            raise ProfilingError(
                f"{self.generator.checkpoint.name} gives NaN or infinite numbers: its numbers overflow, as they may in "
                "float16; load it in bfloat16 or float32"
            )


def _weigh_held(
    parts: list[tuple[list[int], torch.Tensor]], logits: torch.Tensor, arriving: slice, *tensors: torch.Tensor
) -> torch.Tensor:
    """A `WeighBlock` over the tokens that are held; parts and tensors are those of `RetainedTokens`."""
    return masked_softmax(logits, RetainedTokens(parts, tensors).at(arriving))


@torch.no_grad()
def mean_attention(generator: Generator, recording: Recording, head_map: HeadMap, num_at_once: int) -> LearnedScore:
    """The initial score: the logarithm of the attention that each position still receives from a given row on.

    The attention is averaged over images, `num_at_once` of which go through the decoder at a time. The logarithm is
    split into a row part and a part by column and row distance. The weights of K and V are zero.
    """
    rows, columns = head_map.grid
    received = torch.zeros(*head_map.is_spatial.shape, rows, rows * columns)
    dims: dict[str, int] = {}

    def record(layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[WeighBlock, tuple[()]]:
        dims.update(key=keys.shape[3], value=values.shape[3])
        num_visual = keys.shape[2]  # the last visual token is never fed to the decoder, and receives nothing

        def weigh(logits: torch.Tensor, arriving: slice) -> torch.Tensor:
            weights, numbers = logits.softmax(-1), torch.arange(arriving.start, arriving.stop)
            visual = weights[..., weights.shape[-2] - len(numbers) :, -num_visual:].sum((0, 2)).cpu()
            received[layer_idx, ..., :num_visual].index_add_(1, numbers // columns, visual)
            return weights

        return weigh, ()

    for part in recording.split(num_at_once):
        with teacher_forced(generator, part) as run:
            run(record)
    future = (received / len(recording.is_unconditional)).flip(2).cumsum(2).flip(2)
    table = (future + LEAST).log().unflatten(3, (rows, columns))  # [layers, kv_heads, rows now, rows, columns]
    row = table.mean(-1)
    rest = table - row[..., None]
    column = torch.stack(
        [torch.stack([rest[:, :, now, now - far] for now in range(far, rows)]).mean(0) for far in range(rows)], 2
    )
    states = {name: torch.zeros(*table.shape[:2], size) for name, size in dims.items()}
    return LearnedScore.of({**states, "row": row, "column": column})
