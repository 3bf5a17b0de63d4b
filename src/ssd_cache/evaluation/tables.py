"""Turns result lines into a summary: a row for every policy and budget, and paired differences.

The summary is written as Markdown and as JSON. `bootstrap.py` has the statistics, `plots.py` the figure.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ssd_cache.budget import Amount
from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES, TOO_FEW, Difference, cell
from ssd_cache.evaluation.records import Record
from ssd_cache.evaluation.runner import budget_name
from ssd_cache.io.markdown import code_block, escape, table
from ssd_cache.shapes import KINDS

FULL, OURS = "full", ("fitted:score=learned", "learned", "ssd:slots=fitted", "ssd", "fitted")


@dataclass(frozen=True)
class Accuracy:
    """Share of correct images of each kind, the mean of the kinds, its standard error, and the number of images."""

    kinds: dict[str, float]
    overall: float
    standard_error: float
    num_pictures: int


@dataclass(frozen=True)
class Row:
    """One policy at one budget; `share` is the budget as a fraction of the grid, `num_slots` the slots of a head."""

    policy: str
    budget: Amount
    share: float
    num_slots: float
    score: Accuracy


@dataclass(frozen=True)
class Comparison:
    """The result of `policy` minus that of `against`; both at `budget`, unless one is the full cache."""

    policy: str
    against: str
    budget: Amount
    difference: Difference


@dataclass(frozen=True)
class Summary:
    """The content of a report; `run` is the content of `run.json`, `seeds` are the seeds with results."""

    rows: list[Row]
    comparisons: list[Comparison]
    run: Mapping[str, Any]
    seeds: list[int]


def summarize(records: Iterable[Record], run: Mapping[str, Any]) -> Summary:
    """Accuracy of each policy and budget in the order of the run; compares each with `full`, and `OURS` with all."""
    of_case: dict[tuple[str, Amount], list[Record]] = {}
    for record in records:
        of_case.setdefault((record.policy, record.budget), []).append(record)
    labels = list(dict.fromkeys([*run["policies"], *(label for label, _ in of_case)]))
    cases = sorted(of_case, key=lambda case: (labels.index(case[0]), of_case[case][0].num_slots, str(case[1])))
    results = {case: _results(of_case[case]) for case in cases}
    pairs = [(case, (FULL, 1.0)) for case in cases if case[0] != FULL and (FULL, 1.0) in results]
    for ours in (name for name in OURS if name in labels):
        others = [case for case in cases if case[0] not in (FULL, ours) and (ours, case[1]) in results]
        pairs += [((ours, case[1]), case) for case in others]
    rows, columns = run["conditions"]["grid"]
    return Summary(
        rows=[
            Row(
                *(policy, budget, budget / (rows * columns) if isinstance(budget, int) else budget),
                *(of_case[policy, budget][0].num_slots, _accuracy(found, len(of_case[policy, budget]))),
            )
            for (policy, budget), found in results.items()
        ],
        comparisons=[
            Comparison(first[0], second[0], first[1], bootstrap.compare(results[first], results[second]))
            for first, second in pairs
        ],
        run=run,
        seeds=sorted({record.seed for of_one in of_case.values() for record in of_one}),
    )


def _results(records: Iterable[Record]) -> dict[str, dict[int, float]]:
    """Share of correct samples of each prompt, by kind."""
    samples: dict[str, dict[int, list[bool]]] = {kind: {} for kind in KINDS}
    for record in records:
        samples[record.kind].setdefault(record.prompt, []).append(record.correct)
    return {kind: {prompt: sum(of) / len(of) for prompt, of in prompts.items()} for kind, prompts in samples.items()}


def _accuracy(results: bootstrap.Results, num_images: int) -> Accuracy:
    kinds = {kind: bootstrap.mean({kind: prompts}) for kind, prompts in results.items()}
    return Accuracy(kinds, bootstrap.mean(results), bootstrap.standard_error(results), num_images)


def accuracy_table(summary: Summary) -> str:
    """Markdown table: policies and budgets in rows, the six kinds and their mean in columns."""
    rows = []
    for row in summary.rows:
        found = row.score
        kinds = [cell(found.kinds[kind], 2) for kind in KINDS]
        overall = [cell(found.overall, 3), cell(found.standard_error, 3), str(found.num_pictures)]
        rows.append([row.policy, budget_name(row.budget), *kinds, *overall])
    return table(["policy", "budget", *KINDS, "overall", "s.e.", "images"], rows, num_left=2)


def difference_table(summary: Summary) -> str:
    """Markdown table with one paired difference per row."""
    rows = []
    for entry in summary.comparisons:
        cells = (*entry.difference.cells(3), str(entry.difference.num_prompts))
        rows.append([entry.policy, entry.against, budget_name(entry.budget), *cells])
    heads = ["policy", "against", "budget", "difference", "95% interval", "p", "prompts"]
    return table(heads, rows, num_left=3)


def to_markdown(summary: Summary) -> str:
    """The whole report as Markdown."""
    conditions = [f"- {escape(name)}: {escape(_plain(value))}" for name, value in summary.run["conditions"].items()]
    policies = [
        f"- {escape(label)}: head map {escape(entry['head_map'])}, {escape(_plain(entry['settings']) or 'no settings')}"
        for label, entry in summary.run["policies"].items()
    ]
    differences = [
        "## Paired differences",
        f"Of overall. Paired bootstrap over prompts within kinds, {NUM_RESAMPLES} resamples: 95% percentile interval "
        f"and two-sided p, not corrected for their number; {TOO_FEW}.",
        difference_table(summary),
    ]
    parts = [
        "# Shapes: share of correct images",
        "Overall is the mean of the six kinds; s.e. is its standard error, from the spread between prompts.",
        accuracy_table(summary),
        *(differences if summary.comparisons else []),
        "## Conditions",
        "\n".join(conditions),
        "Policies:",
        "\n".join(policies),
        "To repeat it:",
        code_block(command(summary), "bash"),
    ]
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)


def to_json(summary: Summary) -> dict[str, Any]:
    """The numbers of the report; missing values are null."""
    return {
        "rows": [bootstrap.to_json(row) for row in summary.rows],
        "differences": [bootstrap.to_json(entry) for entry in summary.comparisons],
        "num_resamples": NUM_RESAMPLES,
        "seeds": summary.seeds,
        "command": command(summary),
        **{name: summary.run[name] for name in ("conditions", "policies")},
    }


def command(summary: Summary) -> str:
    """A command line that generates the images again: every policy with every budget."""
    conditions = summary.run["conditions"]
    options = {
        "policies": ",".join(dict.fromkeys(row.policy for row in summary.rows)),
        "budgets": ",".join(dict.fromkeys(str(row.budget) for row in summary.rows if row.policy != FULL)) or None,
        **summary.run["command"],
        "seeds": ",".join(map(str, summary.seeds)),
        **{name: conditions[name] for name in ("num_per_kind", "prompt_seed", "batch_size", "temperature", "dtype")},
        **conditions["settings"],
        "guidance": conditions["guidance_scale"],
        "device": conditions["device"].partition(" ")[0],
        "output": "results",
    }
    words = ["ssd-cache", "eval", "shapes"]
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
