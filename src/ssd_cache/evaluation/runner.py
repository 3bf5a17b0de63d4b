"""What an evaluation draws: every prompt with every policy, budget and seed, as a list of batches in a fixed order.

Each of several processes takes its share of that list and skips what is done, so a run that was stopped goes on where
it stood, with any number of processes. Drawing and judging is a benchmark's own (`shapes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssd_cache.budget import Amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.evaluation.policies import Policy, mean_slots
from ssd_cache.evaluation.records import Key
from ssd_cache.head_map.head_map import HeadMap


@dataclass(frozen=True)
class Plan:
    """What is to be drawn.

    Attributes:
        policies: as `parse_policies` gives them.
        budgets: of every policy but `full`.
        seeds: one sample of every prompt each.
        prompts: (kind, caption).
        batch_size: pictures drawn at once.
        head_map: of the run.
        settings: of every cache, as far as a policy has none of its own.
    """

    policies: Sequence[Policy]
    budgets: Sequence[Amount]
    seeds: Sequence[int]
    prompts: Sequence[tuple[str, str]]
    batch_size: int
    head_map: HeadMap
    settings: Mapping[str, Any]

    def make_cache(self, policy: Policy, budget: Amount) -> SSDCache:
        """A fresh cache of one run; raises ValueError for settings out of range."""
        return policy.make_cache(self.head_map, budget, **self.settings)

    def batches(self) -> list[Batch]:
        """All batches, in the order in which processes share them out: number n belongs to process n modulo count."""
        starts = range(0, len(self.prompts), self.batch_size)
        return [
            Batch(policy, budget, seed, number, range(start, min(start + self.batch_size, len(self.prompts))))
            for policy in self.policies
            for budget in policy.budgets(self.budgets)
            for seed in self.seeds
            for number, start in enumerate(starts)
        ]

    def share(self, process: int, num_processes: int, done: set[Key]) -> tuple[list[Batch], list[Batch]]:
        """One process's batches, and those of them with pictures that are not done."""
        own = self.batches()[process::num_processes]
        return own, [batch for batch in own if not done.issuperset(batch.pictures())]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Every policy's settings, labels and slots for each budget, as `run.json` keeps them.

        Raises:
            ValueError: a setting or budget out of range, or a map that does not fit.
        """
        described: dict[str, dict[str, Any]] = {}
        for policy in self.policies:
            entry: dict[str, Any] = {"settings": self.settings_of(policy), "slots": {}}
            for budget in policy.budgets(self.budgets):
                cache = self.make_cache(policy, budget)
                # what is fitted differs from budget to budget, and follows from the run's own map
                entry["head_map"] = digest_of(self.head_map if policy.name == "fitted" else cache.head_map)
                by_head = [list(layer) for layer in cache.num_slots]
                entry["slots"][str(budget)] = int(mean_slots(cache)) if cache.slots == "uniform" else by_head
            described[policy.label] = entry
        return described

    def settings_of(self, policy: Policy) -> dict[str, Any]:
        """What a policy's cache is made with."""
        return {} if policy.name == "full" else {**self.settings, **policy.settings}


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn at once; `number` counts a seed's batches, `prompts` are indices."""

    policy: Policy
    budget: Amount
    seed: int
    number: int
    prompts: range

    def pictures(self) -> list[Key]:
        """Its pictures' names in a folder of results."""
        return [(self.policy.label, self.budget, self.seed, prompt) for prompt in self.prompts]


def budget_name(budget: Amount) -> str:
    """`20%`, or `115 tokens`."""
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:g}%"


def digest_of(head_map: HeadMap) -> str:
    """The name of a map's labels in results."""
    return "online" if head_map.is_online else head_map.digest
