"""How far learning a score has come: the score, what Adam remembers of its gradients, and the number of steps.

It follows gradients and is kept in a file, safetensors with the run's settings in its header. Where gradients come from
is `learning.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ssd_cache.head_map_checks import checked_learned
from ssd_cache.learned_score import LearnedScore
from ssd_cache.profiling_state import check_same_run
from ssd_cache.statistics import ProfilingError
from ssd_cache.untrusted import check_like, checked, parse_json, read_count, read_tensors
from ssd_cache.writing import write_files

FORMAT = "ssd-cache learning 1"

PARTS = ("score", "mean", "square")

BETAS, TINY = (0.9, 0.98), 1e-8
"""Of Adam (Kingma and Ba, arXiv 1412.6980)."""

OF_STATES = 1 / 3
"""Share of the learning rate for the weights of K and V, of which each token has many."""


@dataclass
class LearningState:
    """The tensors of the score, means of their gradients and of the squares of these, and the steps taken."""

    score_tensors: dict[str, torch.Tensor]
    means: dict[str, torch.Tensor]
    squares: dict[str, torch.Tensor]
    num_steps: int

    @classmethod
    def beginning(cls, learned: LearnedScore) -> LearningState:
        """Before the first step."""
        tensors = {name: tensor.clone() for name, tensor in learned.tensors().items()}
        means, squares = ({name: torch.zeros_like(tensor) for name, tensor in tensors.items()} for _ in range(2))
        return cls(tensors, means, squares, num_steps=0)

    def score(self) -> LearnedScore:
        """What was learned so far."""
        return LearnedScore(**self.score_tensors)

    def parameters(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of the score on a device, to be asked for gradients."""
        return {name: tensor.to(device, copy=True).requires_grad_(True) for name, tensor in self.score_tensors.items()}

    def follow(self, gradients: Mapping[str, torch.Tensor], learning_rate: float) -> None:
        """One step of Adam."""
        self.num_steps += 1
        for name, tensor in self.score_tensors.items():
            gradient = gradients[name].to(tensor.device)
            self.means[name].lerp_(gradient, 1 - BETAS[0])
            self.squares[name].lerp_(gradient.square(), 1 - BETAS[1])
            mean, square = (
                held[name] / (1 - beta**self.num_steps)
                for held, beta in zip((self.means, self.squares), BETAS, strict=True)
            )
            rate = learning_rate * (OF_STATES if name in ("key", "value") else 1)
            tensor -= rate * mean / (square.sqrt() + TINY)


def save_learning(path: Path, state: LearningState, settings: Mapping[str, Any]) -> None:
    """Write it, whole or not at all.

    Raises:
        ProfilingError: it can not be written; an older file is as it was.
    """
    parts = dict(zip(PARTS, (state.score_tensors, state.means, state.squares), strict=True))
    tensors = {f"{part}.{name}": tensor for part, held in parts.items() for name, tensor in held.items()}
    header = {"format": FORMAT, "num_steps": str(state.num_steps), "settings": json.dumps(settings)}
    try:
        write_files({path: safetensors.torch.save(tensors, metadata=header)})
    except OSError as error:
        raise ProfilingError(
            f"{path}: what was learned in {state.num_steps} steps can not be written ({error.strerror}); make room, or "
            "give another file"
        ) from error


def load_learning(path: Path, settings: Mapping[str, Any], shape: torch.Size, grid: tuple[int, int]) -> LearningState:
    """What `save_learning` wrote in a run with the same settings, for a map of this shape and grid.

    Raises:
        ProfilingError: another file, or one of a run with other settings.
    """
    try:
        header, tensors = read_tensors(path)
        if header.get("format") != FORMAT:
            raise ValueError("it is of another kind or version")
        found = checked(dict, parse_json(header.get("settings", "")), "settings")
        num_steps = read_count(header, "num_steps")
        check_same_run(path, found, settings)
        score = {name: tensors[f"score.{name}"] for name in sorted(LearnedScore.NAMES) if f"score.{name}" in tensors}
        like = {f"{part}.{name}": score.get(name, torch.empty(0)) for part in PARTS for name in LearnedScore.NAMES}
        check_like(tensors, like)
        checked_learned(LearnedScore(**score), shape, grid, ())
        parts = {part: {name: tensors[f"{part}.{name}"] for name in score} for part in PARTS}
        if any((square < 0).any() for square in parts["square"].values()):
            raise ValueError("squares of gradients are below 0")
    except ProfilingError:
        raise
    except (OSError, ValueError) as error:
        raise ProfilingError(
            f"{path}: not what learning a score keeps ({error}); give another file, or delete it to begin anew"
        ) from error
    return LearningState(parts["score"], parts["mean"], parts["square"], num_steps)
