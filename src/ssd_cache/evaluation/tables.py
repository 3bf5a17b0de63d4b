"""Turns result lines into a summary: a row for every policy and budget, and paired differences.

The summary is written as Markdown and as JSON. `bootstrap.py` has the statistics, `plots.py` the figure.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ssd_cache.budget import Amount
from ssd_cache.evaluation.bootstrap import MIN_PAIRS, NUM_RESAMPLES, Difference, Score, compare, score
from ssd_cache.evaluation.records import Record
from ssd_cache.evaluation.runner import budget_name
from ssd_cache.io.markdown import code_block, escape
from ssd_cache.shapes import KINDS

FULL, OURS = "full", ("fitted:score=learned", "learned", "ssd:slots=fitted", "ssd", "fitted")


@dataclass(frozen=True)
class Row:
    """One policy at one budget; `share` is the budget as a fraction of the grid, `num_slots` the slots of a head."""

    policy: str
    budget: Amount
    share: float
    num_slots: float
    score: Score


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
    """Scores of all policies and budgets in the order of the run; each compared with `full`, `OURS` with all others."""
    verdicts: dict[tuple[str, Amount], dict[str, dict[int, dict[int, bool]]]] = {}
    slots, seeds = {}, set()
    for record in records:
        of_kind = verdicts.setdefault((record.policy, record.budget), {}).setdefault(record.kind, {})
        of_kind.setdefault(record.prompt, {})[record.seed] = record.correct
        slots[record.policy, record.budget] = record.num_slots
        seeds.add(record.seed)
    labels = list(dict.fromkeys([*run["policies"], *(label for label, _ in verdicts)]))
    keys = sorted(verdicts, key=lambda key: (labels.index(key[0]), slots[key], str(key[1])))
    rows, columns = run["conditions"]["grid"]
    pairs = [(key, (FULL, 1.0)) for key in keys if key[0] != FULL and (FULL, 1.0) in verdicts]
    for ours in (name for name in OURS if name in labels):
        others = [key for key in keys if key[0] not in (FULL, ours) and (ours, key[1]) in verdicts]
        pairs += [((ours, key[1]), key) for key in others]
    return Summary(
        rows=[Row(*key, _share(key[1], rows * columns), slots[key], score(verdicts[key], KINDS)) for key in keys],
        comparisons=[
            Comparison(first[0], second[0], first[1], compare(verdicts[first], verdicts[second], KINDS))
            for first, second in pairs
        ],
        run=run,
        seeds=sorted(seeds),
    )


def score_table(summary: Summary) -> str:
    """Markdown table: policies and budgets in rows, the six kinds and their mean in columns."""
    lines = [f"| policy | budget | {' | '.join(KINDS)} | overall | s.e. | pictures |", _rule(len(KINDS) + 5, 2)]
    for row in summary.rows:
        kinds = " | ".join(_number(row.score.kinds[kind], 2) for kind in KINDS)
        overall, error = _number(row.score.overall, 3), _number(row.score.standard_error, 3)
        lines.append(
            f"| {escape(row.policy)} | {budget_name(row.budget)} | {kinds} | **{overall}** | {error} | "
            f"{row.score.num_pictures} |"
        )
    return "\n".join(lines)


def difference_table(summary: Summary) -> str:
    """Markdown table with one paired difference per row."""
    lines = ["| policy | against | budget | difference | 95% interval | p | pairs |", _rule(7, 3)]
    for entry in summary.comparisons:
        found = entry.difference
        lines.append(
            f"| {escape(entry.policy)} | {escape(entry.against)} | {budget_name(entry.budget)} | "
            f"{_number(found.difference, 3, signed=True)} | {interval_text(found, 3)} | {p_text(found.p)} | "
            f"{found.num_pictures} |"
        )
    return "\n".join(lines)


def to_markdown(summary: Summary) -> str:
    """The whole report as Markdown."""
    facts = summary.run["conditions"].items()
    conditions = "\n".join(f"- {escape(name)}: {escape(_plain(value))}" for name, value in facts)
    policies = "\n".join(
        f"- {escape(label)}: head map {escape(entry['head_map'])}, {escape(_slots(entry['slots']))}, "
        f"{escape(_plain(entry['settings']) or 'no settings')}"
        for label, entry in summary.run["policies"].items()
    )
    differences = (
        "## Paired differences\n\n"
        f"Of overall. Paired bootstrap over prompts within kinds, {NUM_RESAMPLES} resamples: 95% percentile interval "
        f"and two-sided p, not corrected for their number; {TOO_FEW}.\n\n{difference_table(summary)}\n\n"
    )
    return (
        "# Shapes: share of correct pictures\n\n"
        "Overall is the mean of the six kinds; s.e. is its standard error, from the spread between prompts.\n\n"
        f"{score_table(summary)}\n\n{differences if summary.comparisons else ''}"
        f"## Conditions\n\n{conditions}\n\nPolicies:\n\n{policies}\n\nTo repeat it:\n\n"
        f"{code_block(chr(10).join(commands(summary)), 'bash')}\n"
    )


def to_json(summary: Summary) -> dict[str, Any]:
    """The numbers of the report; floats have seven digits, missing values are null."""
    return {
        "rows": [_finite(asdict(row)) for row in summary.rows],
        "differences": [_finite(asdict(entry)) for entry in summary.comparisons],
        "num_resamples": NUM_RESAMPLES,
        "seeds": summary.seeds,
        "commands": commands(summary),
        **{name: summary.run[name] for name in ("conditions", "policies")},
    }


def commands(summary: Summary) -> list[str]:
    """Command lines that generate the same images again; policies with the same budgets share one line."""
    conditions, given = summary.run["conditions"], summary.run["command"]
    budgets: dict[str, list[str]] = {}
    for row in summary.rows:
        budgets.setdefault(row.policy, []).extend([] if row.policy == FULL else [str(row.budget)])
    groups: dict[tuple[str, ...], list[str]] = {}
    for label, of_label in budgets.items():
        groups.setdefault(tuple(of_label), []).append(label)
    if () in groups and len(groups) > 1:  # the full cache joins the first group
        full = groups.pop(())
        groups[next(iter(groups))][:0] = full
    options = {
        "model": given["model"],
        "head-map": given["head_map"],
        "num-per-kind": conditions["num_per_kind"],
        "prompt-seed": conditions["prompt_seed"],
        "seeds": ",".join(map(str, summary.seeds)),
        "batch-size": conditions["batch_size"],
        **{name.replace("_", "-"): value for name, value in conditions["settings"].items()},
        "guidance": conditions["guidance_scale"],
        "temperature": conditions["temperature"],
        "dtype": conditions["dtype"],
        "device": conditions["device"].partition(" ")[0],
    }
    return [
        shlex.join(
            [
                *("ssd-cache", "eval", "shapes", "--policies", ",".join(labels)),
                *(["--budgets", ",".join(of_labels)] if of_labels else []),
                *(word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))),
                *("--output", "results"),
            ]
        )
        for of_labels, labels in groups.items()
    ]


TOO_FEW = f"- where there are fewer than {MIN_PAIRS} prompts, or one in a kind: too few to tell"
"""Explanation in tables of a missing interval and p."""


def interval_text(found: Difference, digits: int) -> str:
    """An interval for a table; "-" where there are too few pairs."""
    return "-" if math.isnan(found.low) else f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"


def p_text(value: float) -> str:
    """A p value for a table, with three digits, or "< 0.001"; "-" where there are too few pairs."""
    if math.isnan(value):
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _share(budget: Amount, num_cells: int) -> float:
    return budget / num_cells if isinstance(budget, int) else budget


def _rule(columns: int, words: int) -> str:
    return "|" + "---|" * words + "---:|" * (columns - words)


def _number(value: float, digits: int, signed: bool = False) -> str:
    return "-" if math.isnan(value) else f"{value:{'+' if signed else ''}.{digits}f}"


def _plain(value: Any) -> str:
    return ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else str(value)


def _slots(by_budget: Mapping[str, Any]) -> str:
    is_equal = all(isinstance(slots, int) for slots in by_budget.values())
    return "the same slots in every head" if is_equal else "slots head by head"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.7g}")
    return value
