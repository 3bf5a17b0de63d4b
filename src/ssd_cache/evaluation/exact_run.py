"""Runs of an exact benchmark: a model generates images of its captions, and the judge checks them.

A plan lists the images of every prompt, policy, budget and seed as batches in a fixed order. Each process takes its
share and skips finished batches, so a stopped run resumes with any number of processes, and writes one line per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from ssd_cache.budget import Amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.evaluation.conditions import digest_of, hashed_seed
from ssd_cache.evaluation.exact import ExactBenchmark
from ssd_cache.evaluation.policies import Policy, budget_name
from ssd_cache.evaluation.results_folder import Key, Record, ResultsFolder
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Generator, ResolvedSampling
from ssd_cache.runs.processes import Processes


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

    def missing(self, process: int, num_processes: int, done: set[Key]) -> list[Batch]:
        """The batches of one process with unfinished images."""
        own = self.batches()[process::num_processes]
        return [batch for batch in own if not done.issuperset(batch.image_keys())]

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
    """Images that are generated at once.

    Attributes:
        policy, budget, seed: those of the images.
        number: index of the batch among those of the same policy, budget and seed; torch's seed depends on it.
        prompts: indices in `Plan.prompts`.
    """

    policy: Policy
    budget: Amount
    seed: int
    number: int
    prompts: range

    def image_keys(self) -> list[Key]:
        """The keys of its images in a results folder."""
        return [(self.policy.label, self.budget, self.seed, prompt) for prompt in self.prompts]


def run_benchmark(
    benchmark: ExactBenchmark,
    generator: Generator,
    plan: Plan,
    folder: ResultsFolder,
    sampling: ResolvedSampling,
    processes: Processes,
) -> None:
    """Generate and judge this process's share of the images that have no line yet, one line per image.

    Args:
        benchmark: the benchmark, whose judge reads the images.
        generator: a model that its `check_model` accepts.
        plan: the images to generate.
        folder: the folder to write the lines to.
        sampling: guidance and temperature; the seeds are those of the plan.
        processes: the processes that share the plan; the main one shows a bar.

    Raises:
        ResultsError: a line cannot be written.
    """
    missing = plan.missing(processes.index, processes.count, folder.done)
    num_tokens = plan.head_map.num_visual_tokens * sum(len(batch.prompts) for batch in missing)
    with tqdm(
        total=num_tokens, unit=" visual tokens", unit_scale=True, mininterval=5, disable=not processes.is_main
    ) as bar:
        for batch in missing:
            bar.set_description(f"{batch.policy.label} {budget_name(batch.budget)}", refresh=False)
            cache = plan.make_cache(batch.policy, batch.budget)
            prompts = [(index, *plan.prompts[index]) for index in batch.prompts]
            seeded = replace(sampling, seed=hashed_seed(batch.seed, batch.number))
            captions = [caption for _, _, caption in prompts]
            tokens = generator.generate(captions, cache, **vars(seeded), on_tokens=bar.update).cpu().numpy()
            verdicts = [benchmark.judge(image, caption) for image, caption in zip(tokens, captions, strict=True)]
            folder.append(
                Record(
                    policy=batch.policy.label,
                    settings=plan.settings_of(batch.policy),
                    budget=batch.budget,
                    num_slots=cache.mean_slots,
                    head_map=digest_of(cache.head_map),
                    seed=batch.seed,
                    prompt=index,
                    kind=kind,
                    caption=caption,
                    correct=verdict.correct,
                    reason=verdict.reason,
                )
                for (index, kind, caption), verdict in zip(prompts, verdicts, strict=True)
            )
