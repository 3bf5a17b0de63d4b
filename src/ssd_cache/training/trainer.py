"""The trainer of a learned score: takes gradient steps on images, and measures the divergence of held-out images.

It accesses no files and generates no images: `learning.py` provides recordings, and `learning_state.py` stores results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssd_cache.cache.plans import LayerPlan
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.models import Generator
from ssd_cache.runs.run_state import ProfilingError
from ssd_cache.training.learning_state import LearningState
from ssd_cache.training.likelihood import kl_divergence
from ssd_cache.training.pretended import masked_softmax, retained_tokens
from ssd_cache.training.teacher_forcing import Recording, log_probabilities_of, teacher_forced

SOFTNESS = 1.0, 0.4
"""Initial and final temperature of the soft eviction threshold."""

WARM_UP, CLIP = 10, 0.02
"""Steps of learning-rate warm-up, and the norm at which gradients are clipped: a few images have large divergences."""

LEAST = 1e-4
"""Added to the attention before the logarithm, so that zero attention gives a finite number."""


class Trainer:
    """Takes gradient steps of a score, on a schedule of `num_steps`; `plans` are those of the cache it is for."""

    def __init__(
        self,
        generator: Generator,
        plans: Sequence[LayerPlan],
        guidance_scale: float,
        temperature: float,
        learning_rate: float,
        num_steps: int,
    ):
        self.generator, self.plans = generator, plans
        self.sampling = {"guidance_scale": guidance_scale, "temperature": temperature}
        self.learning_rate, self.num_steps = learning_rate, num_steps
        self.softness = SOFTNESS[-1]
        self.score: LearnedScore | None = None  # None while everything is kept

    def step(self, state: LearningState, recording: Recording) -> tuple[LearningState, float]:
        """The state after a step, and the mean divergence per token before it, in nats, over images and tokens."""
        done = state.num_steps / self.num_steps
        first, last = SOFTNESS
        self.softness = first * (last / first) ** done
        parameters = state.parameters(self.generator.model.device)
        with torch.enable_grad():
            loss = self._divergence(recording, LearnedScore(**parameters)).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        rate = self.learning_rate * min(1.0, (state.num_steps + 1) / WARM_UP) * (1 - done) ** 0.5
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        return state.follow(gradients, rate), loss.item()

    @torch.no_grad()
    def divergences(self, state: LearningState, recording: Recording, batch_size: int) -> torch.Tensor:
        """The mean divergence per token of each image, in nats, float64 `[images]`; takes no step."""
        score = LearnedScore(**state.parameters(self.generator.model.device))
        parts = [self._divergence(part, score) for part in recording.split(batch_size)]
        return torch.cat([part.double().mean(1).cpu() for part in parts])

    def _divergence(self, recording: Recording, score: LearnedScore) -> torch.Tensor:
        """KL divergence of the next token, full cache against evicted cache, `[images, cells]`."""
        with teacher_forced(self.generator, recording, self._weigh):
            with torch.no_grad():
                full = log_probabilities_of(self.generator, recording, **self.sampling)
            self.score = score
            try:
                found = kl_divergence(full, log_probabilities_of(self.generator, recording, **self.sampling))
            finally:
                self.score = None
        if not found.isfinite().all():
            raise ProfilingError(
                f"{self.generator.checkpoint.name} gives NaN or infinite numbers: its numbers overflow, as they may in "
                "float16; load it in bfloat16 or float32"
            )
        return found

    def _weigh(self, layer_idx: int, logits: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if self.score is None:
            return logits.softmax(-1)
        score = self.score.at(layer_idx)
        return masked_softmax(logits, retained_tokens(self.plans[layer_idx], score, keys, values, self.softness))


@torch.no_grad()
def mean_attention(generator: Generator, recording: Recording, head_map: HeadMap) -> LearnedScore:
    """The initial score: the logarithm of the attention that each position still receives from a given row on.

    The attention is averaged over images. The logarithm is split into a row part and a part by column and row distance.
    The weights of K and V are zero.
    """
    rows, columns = head_map.grid
    found: dict[int, torch.Tensor] = {}
    dims: dict[str, int] = {}

    def record(layer_idx: int, logits: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        weights, num_visual = logits.softmax(-1), keys.shape[2]
        received = weights[..., -num_visual:, -num_visual:].sum(2).mean(0)  # [kv_heads, tokens, tokens]
        received = torch.nn.functional.pad(received, (0, 1, 0, 1))  # the last token is never fed to the decoder
        future = received.unflatten(1, (rows, columns)).sum(2).flip(1).cumsum(1).flip(1)
        found[layer_idx] = (future + LEAST).log().unflatten(2, (rows, columns)).cpu()
        dims.update(key=keys.shape[3], value=values.shape[3])
        return weights

    with teacher_forced(generator, recording, record):
        log_probabilities_of(generator, recording, guidance_scale=1.0, temperature=1.0)
    table = torch.stack([found[layer] for layer in sorted(found)])  # [layers, kv_heads, rows now, rows, columns]
    row = table.mean(-1)
    rest = table - row[..., None]
    column = torch.stack(
        [torch.stack([rest[:, :, now, now - far] for now in range(far, rows)]).mean(0) for far in range(rows)], 2
    )
    states = {name: torch.zeros(*table.shape[:2], size) for name, size in dims.items()}
    return LearnedScore(row=row, column=column, **states)
