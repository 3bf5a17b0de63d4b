"""Settings of a reproduction: model, benchmarks, policies and budgets, checked before weights are loaded.

A cell is one policy at one budget, as in the paper's tables. Every benchmark has a folder of images for each cell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ssd_cache.bench.cases import Case, choose_cases
from ssd_cache.bench.roofline import COPY_BYTES
from ssd_cache.bench.running import choose_windows
from ssd_cache.budget import Amount, check_count
from ssd_cache.cache.cache import SSDCache
from ssd_cache.evaluation.conditions import digest_of, image_settings, run_conditions, sha256_of_prompts
from ssd_cache.evaluation.policies import Policy, budget_name, resolve_policies
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint, ResolvedSampling
from ssd_cache.reproducing.benchmarks import NUM_SAMPLES, Benchmark

POLICIES = "full,ssd:buffer=1,learned,h2o:buffer=1,streaming-llm:buffer=1"
"""The paper's methods, which evict at every step, and our learned score with its own settings."""

BUDGETS = "0.2,0.5"

BUFFERED = "ssd"
"""The paper's speed table also has SSD with a buffer, which is our default for SSD."""

LEAST_TOKENS = 8
"""Visual tokens of an image that `choose_windows` needs."""


@dataclass(frozen=True)
class Cell:
    """A policy at a budget."""

    policy: Policy
    budget: Amount

    @property
    def name(self) -> str:
        """The policy's exact name and the budget: "ssd:buffer=1 20%"."""
        return self.policy.label if self.policy.name == "full" else f"{self.policy.label} {budget_name(self.budget)}"

    @property
    def folder(self) -> str:
        """The name with characters that every file system allows: "ssd-buffer=1-20"."""
        return re.sub(r"[^\w.=-]+", "-", self.name).strip("-.")


@dataclass(frozen=True)
class Settings:
    """Everything that the results depend on.

    Attributes:
        checkpoint: the model.
        benchmarks: with the prompts that are used.
        labels: the head map of all policies that need one.
        cells: in the order of the tables.
        left_out: parts of the tables that are left out, with the reason.
        sampling: of all images; its seed is that of the run.
        batch_size: images at once; a multiple of `NUM_SAMPLES`.
        dtype, device: of the model.
        sample: share of the prompts, and of the visual tokens that are timed.
        speed_batch_sizes: batch sizes of the speed tables.
        is_compiled: whether compiled steps are timed too.
    """

    checkpoint: Checkpoint
    benchmarks: Sequence[Benchmark]
    labels: HeadMap
    cells: Sequence[Cell]
    left_out: Sequence[str]
    sampling: ResolvedSampling
    batch_size: int
    dtype: torch.dtype
    device: torch.device
    sample: float
    speed_batch_sizes: Sequence[int]
    is_compiled: bool

    def check(self) -> None:
        """Refuse settings that would fail later; raises ValueError."""
        if not 0 < self.sample <= 1:
            raise ValueError(f"sample={self.sample:g} is out of range: give a share of the prompts above 0 and up to 1")
        if not self.benchmarks:
            raise ValueError("no benchmark: give --geneval, --dpg, or both")
        if check_count("batch_size", self.batch_size, 1) % NUM_SAMPLES:
            raise ValueError(
                f"batch_size={self.batch_size}: a prompt has {NUM_SAMPLES} images; give a multiple of {NUM_SAMPLES}"
            )
        if not self.cells:
            raise ValueError(f"no policy is left ({'; '.join(self.left_out)}); give others")
        if self.device.type not in COPY_BYTES:
            raise ValueError(f"device {self.device.type}: give {' or '.join(COPY_BYTES)}, where speed can be measured")
        self.checkpoint.check_decodable()
        self.checkpoint.check_head_map(self.labels)
        for cell in self.cells:
            self.make_cache(cell)
        self.cases()
        for benchmark in self.benchmarks:
            benchmark.check_judges()

    def omissions(self) -> list[str]:
        """Statements of what is left out."""
        return [f"left out: {reason}" for reason in self.left_out]

    def make_cache(self, cell: Cell) -> SSDCache:
        """A fresh cache."""
        return cell.policy.make_cache(self.labels, cell.budget)

    def cases(self) -> list[Case]:
        """The caches to time: transformers' full caches, and every policy at every budget."""
        labels = list(dict.fromkeys(cell.policy.label for cell in self.cells if cell.policy.name != "full"))
        if any(cell.policy.name == BUFFERED for cell in self.cells) and BUFFERED not in labels:
            labels.append(BUFFERED)
        budgets = list(dict.fromkeys(cell.budget for cell in self.cells if cell.policy.name != "full"))
        policies = ",".join(labels) or "full"
        return choose_cases(self.labels, policies=policies, budgets=budgets or None, is_compiled=self.is_compiled)

    def windows(self) -> list[range]:
        """The visual tokens that are generated to time steps: a whole image, or a sample of it."""
        cells = self.labels.num_visual_tokens
        number = max(LEAST_TOKENS, round(self.sample * cells))
        return choose_windows(cells, number if self.sample < 1 and number < cells else None)

    @property
    def rounds(self) -> int:
        """Measured rounds of the speed tables."""
        return 2 if self.sample == 1 else 1

    @cached_property
    def conditions(self) -> dict[str, Any]:
        """The conditions of all images, with the prompts of all benchmarks."""
        return run_conditions(
            self.checkpoint,
            [caption for benchmark in self.benchmarks for caption in benchmark.captions],
            dtype=self.dtype,
            device=self.device,
            batch_size=self.batch_size,
            sampling=self.sampling,
            settings={},
        )

    def facts(self) -> dict[str, Any]:
        """The settings as JSON values."""
        conditions = {name: value for name, value in self.conditions.items() if name != "settings"}
        return {
            "model": self.checkpoint.name,
            **conditions,
            "seed": self.sampling.seed,
            "sample": self.sample,
            "head_map": digest_of(self.labels),
            "policies": [cell.name for cell in self.cells],
            "left_out": list(self.left_out),
            **{
                benchmark.name: {"num_prompts": len(benchmark.captions), **benchmark.judges, **benchmark.facts}
                for benchmark in self.benchmarks
            },
            "speed": {"batch_sizes": list(self.speed_batch_sizes), "compiled": self.is_compiled},
        }

    def image_settings(self, benchmark: Benchmark, cell: Cell) -> dict[str, Any]:
        """The settings of one folder of images, as `eval ... export` records them."""
        return image_settings(
            benchmark.name,
            self.make_cache(cell),
            cell.policy.label,
            cell.budget,
            model=self.checkpoint.name,
            seed=self.sampling.seed,
            num_prompts=len(benchmark.captions),
            num_samples=NUM_SAMPLES,
            conditions={**self.conditions, "prompts_sha256": sha256_of_prompts(benchmark.captions)},
        )


def choose_cells(
    policies: Sequence[Policy], labels: HeadMap, budgets: Sequence[Amount]
) -> tuple[list[Cell], list[str]]:
    """Every policy at every budget, and the reasons for those that are left out."""
    cells, left_out = [], []
    for policy in resolve_policies(policies, labels):
        if policy.name == "learned" and labels.learned is None:
            left_out.append(f"{policy.label}, because the head map has no learned score (ssd-cache prepare trains one)")
        else:
            cells += [Cell(policy, budget) for budget in policy.budgets(budgets)]
    return cells, left_out
