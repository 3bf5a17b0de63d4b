"""The stages of a preparation, their settings, and which prompts each of them uses.

A stage takes the head map of the stage before it and returns the next one. `preparing.py` runs the stages and keeps
their results; what a stage does is defined in `profiling`, `training` and `check.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssd_cache.budget import Amount, check_count, resolve_amount
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint, Generator, ResolvedSampling
from ssd_cache.preparing.check import check_fidelity, curve_budgets
from ssd_cache.preparing.state import StateFolder
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.profiling.profiling import check_profiling, profile_heads
from ssd_cache.runs.processes import Processes
from ssd_cache.training.learning import check_learning, learn_score

STAGES = ("profile", "fit", "learn", "check")
QUICK = ("profile", "fit", "check")
"""The stages without learning, which takes most of the time."""

NEEDED = ("profile", "fit")
"""Stages that the later ones need."""

NUM_PROFILED, NUM_CHECKED = 48, 8
"""Prompts that `profile` and `check` use. Those of `check` come last, and no other stage uses them."""

LEAST_PROMPTS = 24
"""Different prompts that a preparation needs."""

LEVELS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5)
"""Levels at which `profile` measures each head, as multiples of the budget."""

LEARNED_AT_ONCE, LEARNING_RATE = 4, 0.02
"""Images of a training step, and the learning rate, with which the score of shapes-janus was trained."""


@dataclass(frozen=True)
class Settings:
    """Settings of a preparation, apart from the model and the stages.

    Attributes:
        prompts: all prompts.
        budget: of the cache that the map is for, one number.
        num_steps: training steps.
        batch_size: images at once in `profile` and `check`.
        sampling: of all images.
    """

    prompts: list[str]
    budget: Amount
    num_steps: int
    batch_size: int
    sampling: ResolvedSampling

    @property
    def profiled(self) -> list[str]:
        """The prompts that the heads are measured on."""
        return self.learned[:NUM_PROFILED]

    @property
    def learned(self) -> list[str]:
        """The prompts that the score is trained on."""
        return self.prompts[:-NUM_CHECKED]

    @property
    def checked(self) -> list[str]:
        """The prompts that the finished map is checked on."""
        return self.prompts[-NUM_CHECKED:]

    def profiling(self, cells: int) -> dict[str, Any]:
        """Arguments of `profile_heads`; `cells` is the number of visual tokens of an image."""
        share = resolve_amount("budget", self.budget, cells) / cells
        return {"budget": self.budget, "levels": [min(1.0, share * times) for times in LEVELS]}

    @property
    def learning(self) -> dict[str, Any]:
        """Arguments of `learn_score` and `check_learning`.

        Slots are learned too, and no head stays a window: on emoji-janus most heads that were labelled spatial also
        need tokens from far back.
        """
        steps = {"num_steps": self.num_steps, "learning_rate": LEARNING_RATE, "batch_size": LEARNED_AT_ONCE}
        return {"learn_slots": True, **steps}


@dataclass(frozen=True)
class Stage:
    """One stage: its name, the images that it generates, and the function from the map so far to the next map."""

    name: str
    num_images: int
    run: Callable[[HeadMap | None], HeadMap]


def make_stages(
    names: Sequence[str],
    generator: Generator,
    settings: Settings,
    folder: StateFolder,
    processes: Processes,
    progress: bool,
) -> list[Stage]:
    """The stages of these names, and those that they need, in order."""
    shared = {**asdict(settings.sampling), "progress": progress and processes.is_main}

    def profile(before: HeadMap | None) -> HeadMap:
        return run_profile(generator, settings, settings.profiled, folder.file("profile"), **shared)

    def fit(before: HeadMap | None) -> HeadMap:
        assert before is not None
        return fit_heads(before, settings.budget)

    def learn(before: HeadMap | None) -> HeadMap:
        assert before is not None
        state_file = folder.file("learn")
        return learn_score(generator, settings.learned, before, state_file=state_file, **settings.learning, **shared)

    def check(before: HeadMap | None) -> HeadMap:
        assert before is not None
        budgets = curve_budgets(before, settings.budget)
        how = {"batch_size": settings.batch_size, "folder": folder, "processes": processes, **shared}
        return check_fidelity(generator, settings.checked, before, budgets, **how)

    stages = [
        Stage("profile", len(settings.profiled), profile),
        Stage("fit", 0, fit),
        Stage("learn", len(settings.learned), learn),
        Stage("check", len(settings.checked), check),
    ]
    wanted = {*names, *NEEDED}
    last = max(number for number, stage in enumerate(stages) if stage.name in names)
    return [stage for stage in stages[: last + 1] if stage.name in wanted]


def run_profile(
    generator: Generator, settings: Settings, prompts: list[str], state_file: Path | None, **shared: Any
) -> HeadMap:
    """Label the heads on these prompts, the first ones of the stage or all; a longer list extends an earlier run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # levels too small for a cache are raised, as intended
        levels = settings.profiling(generator.checkpoint.num_visual_tokens)
        batch_size = settings.batch_size
        return profile_heads(generator, prompts, batch_size=batch_size, state_file=state_file, **levels, **shared)


def check_stages(names: Sequence[str], checkpoint: Checkpoint, settings: Settings) -> None:
    """Refuse, before any work, stages and settings that would fail later; raises ValueError. Needs no weights."""
    if unknown := [name for name in names if name not in STAGES]:
        raise ValueError(f"stage {unknown[0]!r} is unknown: give some of {', '.join(STAGES)}")
    if not names:
        raise ValueError(f"stages is empty: give some of {', '.join(STAGES)}")
    _check_prompts_differ(settings.prompts)
    check_count("batch_size", settings.batch_size, 1)
    settings.sampling.check_random()
    heads = (checkpoint.num_layers, checkpoint.num_kv_heads)
    profiling = settings.profiling(checkpoint.num_visual_tokens)
    check_profiling(checkpoint.layout, fit=True, batch_size=settings.batch_size, **profiling)
    if "learn" in names:
        labels = HeadMap.uniform("semantic", num_layers=heads[0], num_kv_heads=heads[1]).with_layout(checkpoint.layout)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_learning(labels, settings.budget, **settings.learning)
        except ValueError as error:
            raise ValueError(f"{error}; --quick (stages={QUICK}) leaves learning out") from error


def _check_prompts_differ(prompts: Sequence[str]) -> None:
    """Refuse prompts that are too few or all alike; raises ValueError."""
    number = len({" ".join(prompt.lower().split()) for prompt in prompts})
    if number < LEAST_PROMPTS:
        raise ValueError(
            f"{len(prompts)} prompts, {number} of them different: give at least {LEAST_PROMPTS} different ones, a few "
            "hundred for learning, or none for the captions that come with ssd-cache"
        )
