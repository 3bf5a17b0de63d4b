"""The state of a training run: images, the score with the optimizer's moments, and the held-out divergence.

This module takes optimizer steps, and saves the state in a file of `runs/run_state.py`. `trainer.py` computes the
gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ssd_cache.head_map.checks import checked_learned
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.io.untrusted import check_like, checked, checked_fields
from ssd_cache.runs.run_state import (
    ProfilingError,
    RunState,
    check_images,
    check_same_run,
    check_state_place,
    not_a_state,
    read_state,
    write_state,
)

FORMAT, WHAT = "ssd-cache learning 3", "the state of learning a score"
"""Format 1 held no images, and format 2 no slots."""

PARTS = ("score", "mean", "square")

HELD_OUT = 8
"""Images that are not trained on; the divergence before and after training is measured on them."""

BETAS, TINY = (0.9, 0.98), 1e-8
"""Decay rates and epsilon of Adam (Kingma and Ba, arXiv 1412.6980)."""

OF_STATES = 1 / 3
"""Factor on the learning rate for the weights of K and V, since many of them act on each token."""


@dataclass(frozen=True)
class LearningState:
    """The score, the running means of its gradients and of their squares, and the number of steps.

    `tensors` holds `score.NAME`, `mean.NAME` and `square.NAME` for each name of a `LearnedScore`. Where slots are
    learned too, it also holds `slots`, int64 `[layers, kv_heads]`, and `slot_values`, the value of a slot in each head,
    added up since the last multiple of `MOVE_STEPS`.
    """

    tensors: dict[str, torch.Tensor]
    num_steps: int = 0

    @classmethod
    def beginning(cls, learned: LearnedScore, slots: Sequence[Sequence[int]] | None = None) -> LearningState:
        """The state before the first step, with the score `learned`, and with slots if these are learned too."""
        score = learned.tensors()
        zeros = {f"{part}.{name}": torch.zeros_like(tensor) for part in PARTS for name, tensor in score.items()}
        state = cls(zeros | {f"score.{name}": tensor.clone() for name, tensor in score.items()})
        return state if slots is None else state.with_slots(torch.tensor(slots), torch.zeros(score["row"].shape[:2]))

    @property
    def slots(self) -> torch.Tensor | None:
        """The current slots, `[layers, kv_heads]`; None if they are not learned."""
        return self.tensors.get("slots")

    def with_slots(self, slots: torch.Tensor, values: torch.Tensor) -> LearningState:
        """The state with other slots and values of a slot."""
        return replace(self, tensors={**self.tensors, "slots": slots, "slot_values": values})

    def score(self) -> LearnedScore:
        """The current score."""
        return LearnedScore.of({name: self.tensors[f"score.{name}"] for name in LearnedScore.NAMES})

    def parameters(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Copies of the score's tensors on a device, which require gradients."""
        tensors = self.score().tensors()
        return {name: tensor.to(device, copy=True).requires_grad_(True) for name, tensor in tensors.items()}

    def follow(self, gradients: Mapping[str, torch.Tensor], learning_rate: float) -> LearningState:
        """The state after one more step of Adam."""
        num_steps = self.num_steps + 1
        tensors = dict(self.tensors)
        for name, gradient in gradients.items():
            score, mean, square = (self.tensors[f"{part}.{name}"] for part in PARTS)
            gradient = gradient.to(score.device)
            mean = mean.lerp(gradient, 1 - BETAS[0])
            square = square.lerp(gradient.square(), 1 - BETAS[1])
            rate = learning_rate * (OF_STATES if name in ("key", "value") else 1)
            unbiased = mean / (1 - BETAS[0] ** num_steps), square / (1 - BETAS[1] ** num_steps)
            score = score - rate * unbiased[0] / (unbiased[1].sqrt() + TINY)
            tensors |= {f"score.{name}": score, f"mean.{name}": mean, f"square.{name}": square}
        return LearningState(tensors, num_steps)


@dataclass
class LearningRun:
    """Everything that a run has completed so far, and the file that keeps it.

    Attributes:
        path: the state file, or None.
        settings: everything that the results depend on, as JSON values.
        images: visual tokens of the generated batches, int64 `[images, cells]` each; the held-out batch last.
        learning: score and optimizer state; None before the first score.
        before: divergence of each held-out image under the initial score, float64 `[held-out images]`.
        after: the same under the current score, once all steps are done.
        stages: `[first step, total]` of each schedule used; more than one after an extension.
    """

    path: Path | None
    settings: Mapping[str, Any]
    images: list[torch.Tensor] = field(default_factory=list)
    learning: LearningState | None = None
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    stages: list[list[int]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path | None, settings: Mapping[str, Any], head_map: HeadMap) -> LearningRun:
        """A new run, or the one in the file if it exists; `head_map` will get the score.

        Raises:
            ProfilingError: the file has other contents, belongs to a run with other settings, or cannot be written.
        """
        if path is None:
            return cls(path, settings)
        check_state_place(path)
        if not path.exists():
            return cls(path, settings)
        file = read_state(path, FORMAT, WHAT)
        check_same_run(path, file.settings, settings)
        tensors = dict(file.tensors)
        try:
            counts = checked_fields({"num_steps": int, "stages": list[tuple[int, int]]}, file.counts, "counts")
            num_steps, stages = counts["num_steps"], checked(list[list[int]], counts["stages"], "stages")
            if num_steps < 0 or any(not 0 <= first <= last for first, last in stages):
                raise ValueError("its numbers of steps are out of order")
            images = check_images(tensors, head_map.num_visual_tokens)
            before, after = tensors.pop("before", None), tensors.pop("after", None)
            for held in (before, after):
                if held is not None:
                    check_like({"held-out": held}, {"held-out": torch.empty(HELD_OUT, dtype=torch.float64)})
            learning = _learning_of(tensors, num_steps, head_map, settings)
            if after is not None and (before is None or learning is None):
                raise ValueError("it ends without a beginning")
        except ValueError as error:
            raise not_a_state(path, WHAT, error) from error
        return cls(path, settings, images, learning, before, after, stages)

    def save(self) -> None:
        """Write the run to its file, completely or not at all; raises ProfilingError."""
        if self.path is None:
            return
        tensors = {f"images.{index}": tokens for index, tokens in enumerate(self.images)}
        tensors |= {name: held for name in ("before", "after") if (held := getattr(self, name)) is not None}
        tensors |= {} if self.learning is None else self.learning.tensors
        counts = {"num_steps": self.num_steps, "stages": self.stages}
        write_state(self.path, FORMAT, RunState(tensors, self.settings, counts, self.after is not None), WHAT)

    @property
    def num_steps(self) -> int:
        """Number of steps taken."""
        return 0 if self.learning is None else self.learning.num_steps

    def begin_stage(self, num_steps: int) -> None:
        """Follow the schedule for `num_steps` total steps from the current step on; raises ProfilingError for fewer."""
        if self.num_steps > num_steps:
            raise ProfilingError(
                f"{self.path}: {self.num_steps} steps were taken, but num_steps={num_steps}: give at least "
                f"{self.num_steps}, or another file"
            )
        if self.stages and self.stages[-1][1] == num_steps:
            return
        self.after = None
        self.stages = [stage for stage in self.stages if stage[0] < self.num_steps]  # drop stages without a step
        if not self.stages or self.stages[-1][1] != num_steps:
            self.stages.append([self.num_steps, num_steps])

    def compared(self) -> dict[str, Any]:
        """Held-out divergence before and after, in nats per token, with the standard error of the mean difference."""
        assert self.before is not None
        assert self.after is not None
        difference = self.after - self.before
        return {
            "num_images": len(difference),
            "before": self.before.mean().item(),
            "after": self.after.mean().item(),
            "standard_error": (difference.std() / len(difference) ** 0.5).item(),
        }


def _learning_of(
    tensors: Mapping[str, torch.Tensor], num_steps: int, head_map: HeadMap, settings: Mapping[str, Any]
) -> LearningState | None:
    """The score, Adam's moments and the slots, checked; None where there are no tensors. Raises ValueError."""
    if not tensors:
        return None
    empty = torch.empty(0)
    like = {name: tensors.get(f"score.{name}", empty) for name in LearnedScore.NAMES}
    expected = {f"{part}.{name}": tensor for part in PARTS for name, tensor in like.items()}
    if settings["learn_slots"]:
        expected |= {"slots": torch.tensor(settings["slots"]), "slot_values": torch.zeros(head_map.is_spatial.shape)}
    check_like(tensors, expected)
    if settings["learn_slots"]:
        slots, is_finite = tensors["slots"], tensors["slot_values"].isfinite().all()
        is_whole = slots.min() > 0 and not (slots % settings["buffer"]).any()
        if not is_whole or slots.sum() > expected["slots"].sum() or not is_finite:
            raise ValueError("its slots are not those of this budget")
    checked_learned(LearnedScore.of(like), head_map.is_spatial.shape, head_map.layout)
    if any((tensors[f"square.{name}"] < 0).any() for name in like):
        raise ValueError("squares of gradients are below 0")
    return LearningState(dict(tensors), num_steps)
