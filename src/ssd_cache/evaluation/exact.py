"""The exact benchmarks: captions of several kinds for a bundled model, and a judge that checks every image exactly.

A benchmark only says what is generated and how it is judged. `exact_run.py` generates the images, and
`results_folder.py` keeps their results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ssd_cache import emoji, shapes
from ssd_cache.layout import Grid
from ssd_cache.models import BUNDLED, Checkpoint, GeneratorError


class Verdict(Protocol):
    """The judgement on one image; `reason` is empty when it is correct."""

    @property
    def correct(self) -> bool: ...

    @property
    def reason(self) -> str: ...


@dataclass(frozen=True)
class ExactBenchmark:
    """Captions of several kinds, and a judge of the images that a small model generates.

    Attributes:
        name: the name of the command.
        model: the bundled model that generates such images.
        kinds: the kinds of captions.
        grid, num_tokens: rows and columns of an image, and the number of different visual tokens.
        make_prompts: makes captions, a number of every kind, from a seed, as (kind, caption), one kind after another.
        judge: decides whether an image, tokens in any shape, shows what a caption names.
    """

    name: str
    model: str
    kinds: tuple[str, ...]
    grid: Grid
    num_tokens: int
    make_prompts: Callable[[int, int], list[tuple[str, str]]]
    judge: Callable[[np.ndarray, str], Verdict]

    def prompts(self, num_per_kind: int, seed: int) -> list[tuple[str, str]]:
        """Captions in an order that alternates the kinds, so that each batch contains all of them."""
        prompts, num_kinds = self.make_prompts(num_per_kind, seed), len(self.kinds)
        return [prompts[kind * num_per_kind + number] for number in range(num_per_kind) for kind in range(num_kinds)]

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Refuse a model whose images the judge cannot read.

        Raises:
            GeneratorError: the grid or the number of visual tokens differs from the judge's.
        """
        num_tokens = getattr(getattr(checkpoint.config, "vq_config", None), "num_embeddings", None)
        if checkpoint.grid != self.grid or num_tokens != self.num_tokens:
            found = f"{checkpoint.layout.text()} visual tokens" + (f" out of {num_tokens}" if num_tokens else "")
            raise GeneratorError(
                f"{checkpoint.name} generates {found}; the judge of {self.name} reads {self.grid[0]} x {self.grid[1]} "
                f"out of {self.num_tokens}: give {self.model}, or a model trained on the same images"
            )


SHAPES = ExactBenchmark(
    name="shapes",
    model=BUNDLED,
    kinds=shapes.KINDS,
    grid=shapes.GRID,
    num_tokens=len(shapes.PALETTE),
    make_prompts=shapes.make_prompts,
    judge=shapes.judge,
)

EMOJI = ExactBenchmark(
    name="emoji",
    model="emoji-janus",
    kinds=emoji.KINDS,
    grid=emoji.GRID,
    num_tokens=emoji.NUM_TOKENS,
    make_prompts=emoji.make_prompts,
    judge=emoji.judge,
)

BENCHMARKS = {benchmark.name: benchmark for benchmark in (SHAPES, EMOJI)}
"""The exact benchmarks by name."""
