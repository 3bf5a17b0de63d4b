"""The images of an evaluation: every prompt with every policy, budget and seed, as a list of batches in a fixed order.

Each process takes its share of the list and skips finished batches. A stopped run therefore resumes where it stopped,
with any number of processes. Generating and judging belong to the benchmark (`shapes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssd_cache.budget import Amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.evaluation.policies import Policy
from ssd_cache.evaluation.records import Key
from ssd_cache.head_map.head_map import HeadMap


@dataclass(frozen=True)
class Plan:
    """The images to generate: one of every (kind, caption) in `prompts` for each policy, budget and seed.

    `settings` are those of every cache; a policy's own settings take precedence.
    """

    policies: Sequence[Policy]
    budgets: Sequence[Amount]
    seeds: Sequence[int]
    prompts: Sequence[tuple[str, str]]
    batch_size: int
    head_map: HeadMap
    settings: Mapping[str, Any]

    def make_cache(self, policy: Policy, budget: Amount) -> SSDCache:
        """A fresh cache for one run; raises ValueError for settings out of range."""
        return policy.make_cache(self.head_map, budget, **self.settings)

    def batches(self) -> list[Batch]:
        """All batches, in a fixed order; batch number n belongs to process n modulo the number of processes."""
        starts = range(0, len(self.prompts), self.batch_size)
        return [
            Batch(policy, budget, seed, number, range(start, min(start + self.batch_size, len(self.prompts))))
            for policy in self.policies
            for budget in policy.budgets(self.budgets)
            for seed in self.seeds
            for number, start in enumerate(starts)
        ]

    def share(self, process: int, num_processes: int, done: set[Key]) -> tuple[list[Batch], list[Batch]]:
        """The batches of one process, and those among them with unfinished images."""
        own = self.batches()[process::num_processes]
        return own, [batch for batch in own if not done.issuperset(batch.image_keys())]

    def describe(self) -> dict[str, dict[str, Any]]:
        """The settings, labels and slots per budget of every policy, as stored in `run.json`; raises ValueError."""
        described: dict[str, dict[str, Any]] = {}
        for policy in self.policies:
            entry: dict[str, Any] = {"settings": self.settings_of(policy), "slots": {}}
            for budget in policy.budgets(self.budgets):
                cache = self.make_cache(policy, budget)
                # fitted labels depend on the budget but are derived from the run's map, so its digest identifies them
                entry["head_map"] = digest_of(self.head_map if policy.name == "fitted" else cache.head_map)
                by_head = [list(layer) for layer in cache.num_slots]
                entry["slots"][str(budget)] = int(cache.mean_slots) if cache.slots == "uniform" else by_head
            described[policy.label] = entry
        return described

    def settings_of(self, policy: Policy) -> dict[str, Any]:
        """The settings that a policy's cache is made with."""
        return {} if policy.name == "full" else {**self.settings, **policy.settings}


@dataclass(frozen=True)
class Batch:
    """Images that are generated at once; `number` counts the batches of a seed, `prompts` are prompt indices."""

    policy: Policy
    budget: Amount
    seed: int
    number: int
    prompts: range

    def image_keys(self) -> list[Key]:
        """The keys of its images in a results folder."""
        return [(self.policy.label, self.budget, self.seed, prompt) for prompt in self.prompts]


def budget_name(budget: Amount) -> str:
    """`20%`, or `115 tokens`."""
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:g}%"


def digest_of(head_map: HeadMap) -> str:
    """The identifier of a map's labels in results: its digest, or "online"."""
    return "online" if head_map.is_online else head_map.digest
