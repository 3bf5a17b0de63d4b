"""Reports on results folders: rows for every policy and budget, paired differences, and their files.

It uses only the result lines. `bootstrap.py` has the statistics, `plots.py` the figure. All files are written, or none.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_cache.budget import Amount
from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES, TOO_FEW, Difference, cell
from ssd_cache.evaluation.plots import plot_result_by_budget
from ssd_cache.evaluation.policies import budget_name
from ssd_cache.evaluation.results_folder import (
    Record,
    ResultsError,
    benchmark_of,
    merge_runs,
    read_records,
    read_run,
)
from ssd_cache.io.markdown import code_block, escape, table
from ssd_cache.io.writing import write_files

FULL, OURS = "full", ("fitted:score=learned", "learned", "ssd:slots=fitted", "ssd", "fitted")
TABLE, NUMBERS, PLOT = "results.md", "results.json", "score-by-budget.png"


@dataclass(frozen=True)
class Row:
    """One policy at one budget.

    Attributes:
        policy, budget: as in the records.
        share: the budget as a fraction of the grid.
        num_slots: the slots of a head, mean over heads.
        kinds: share of correct images of each kind.
        overall, standard_error: the mean of the kinds.
        num_images: images with a result.
    """

    policy: str
    budget: Amount
    share: float
    num_slots: float
    kinds: dict[str, float]
    overall: float
    standard_error: float
    num_images: int


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


def read_summary(folders: Sequence[Path]) -> tuple[Summary, list[str]]:
    """The summary of one or several folders, and a message for each line that cannot be read.

    Raises:
        ResultsError: there are no results, or the conditions of the folders differ.
    """
    first, *others = folders
    run = read_run(first)
    for folder in others:
        run = merge_runs(f"{folder} beside {first}", run, read_run(folder))
    benchmark = benchmark_of(run)
    records, problems = read_records(folders, benchmark)
    if not records:
        raise ResultsError(
            f"{', '.join(map(str, folders))}: no readable line of results: run `ssd-cache eval "
            f"{benchmark.name}` with this folder as --output"
        )
    return summarize(records, run), problems


def summarize(records: Iterable[Record], run: Mapping[str, Any]) -> Summary:
    """Accuracy of each policy and budget in the order of the run; compares each with `full`, and `OURS` with all."""
    of_case: dict[tuple[str, Amount], list[Record]] = {}
    for record in records:
        of_case.setdefault((record.policy, record.budget), []).append(record)
    labels = list(dict.fromkeys([*run["policies"], *(label for label, _ in of_case)]))
    cases = sorted(of_case, key=lambda case: (labels.index(case[0]), of_case[case][0].num_slots, str(case[1])))
    kinds = benchmark_of(run).kinds
    results = {case: _results(of_case[case], kinds) for case in cases}
    pairs = [(case, (FULL, 1.0)) for case in cases if case[0] != FULL and (FULL, 1.0) in results]
    for ours in (name for name in OURS if name in labels):
        others = [case for case in cases if case[0] not in (FULL, ours) and (ours, case[1]) in results]
        pairs += [((ours, case[1]), case) for case in others]
    rows, columns = run["conditions"]["grid"]
    return Summary(
        rows=[
            Row(
                policy,
                budget,
                share=budget / (rows * columns) if isinstance(budget, int) else budget,
                num_slots=of_case[policy, budget][0].num_slots,
                kinds={kind: bootstrap.mean({kind: prompts}) for kind, prompts in found.items()},
                overall=bootstrap.mean(found),
                standard_error=bootstrap.standard_error(found),
                num_images=len(of_case[policy, budget]),
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


def _results(records: Iterable[Record], kinds: Sequence[str]) -> dict[str, dict[int, float]]:
    """Share of correct samples of each prompt, by kind."""
    samples: dict[str, dict[int, list[bool]]] = {kind: {} for kind in kinds}
    for record in records:
        samples[record.kind].setdefault(record.prompt, []).append(record.correct)
    return {kind: {prompt: sum(of) / len(of) for prompt, of in prompts.items()} for kind, prompts in samples.items()}


def write_report(summary: Summary, folder: Path) -> tuple[list[Path], str]:
    """Write results.md, results.json and the plot; returns their paths, and a remedy if the plot cannot be made."""
    numbers = json.dumps(to_json(summary), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {folder / TABLE: to_markdown(summary).encode(), folder / NUMBERS: numbers.encode()}
    remedy = ""
    try:
        contents[folder / PLOT] = plot_result_by_budget(summary)
    except ImportError as error:
        remedy = f"no {PLOT}: {error}"
    folder.mkdir(parents=True, exist_ok=True)
    write_files(contents)
    return list(contents), remedy


def accuracy_table(summary: Summary) -> str:
    """Markdown table: policies and budgets in rows, the kinds of captions and their mean in columns."""
    names, rows = benchmark_of(summary.run).kinds, []
    for row in summary.rows:
        kinds = [cell(row.kinds[kind], 2) for kind in names]
        overall = [cell(row.overall, 3), cell(row.standard_error, 3), str(row.num_images)]
        rows.append([row.policy, budget_name(row.budget), *kinds, *overall])
    return table(["policy", "budget", *names, "overall", "s.e.", "images"], rows, num_left=2)


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
        f"# {benchmark_of(summary.run).name.capitalize()}: share of correct images",
        "Overall is the mean of the kinds; s.e. is its standard error, from the spread between prompts.",
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
    """The report's values as JSON types; missing ones are null."""
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
    words = ["ssd-cache", "eval", benchmark_of(summary.run).name]
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
