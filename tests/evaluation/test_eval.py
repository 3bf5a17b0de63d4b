"""`ssd-cache eval shapes` and `report`: names of policies, lines of results, statistics on cases small enough to count.

The images are noise from a small random Janus that generates the palette of shapes. That a run which was killed, or
shared by processes, ends with the lines of an unbroken one is tested with real processes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.children import Forked, run_two
from helpers.models import random_score, tiny_janus
from helpers.tiny_checkpoint import load_example
from transformers import JanusForConditionalGeneration
from typer.testing import CliRunner

from ssd_cache import POLICIES, HeadMap, SSDCache, fit_heads
from ssd_cache.analysis import plotting
from ssd_cache.cache.policies import words_of
from ssd_cache.cli import app
from ssd_cache.evaluation.bootstrap import compare, mean, standard_error
from ssd_cache.evaluation.conditions import hashed_seed, run_conditions
from ssd_cache.evaluation.exact import SHAPES
from ssd_cache.evaluation.exact_run import Plan
from ssd_cache.evaluation.plots import plot_result_by_budget
from ssd_cache.evaluation.policies import parse_policies, parse_policy, random_map, resolve_policies
from ssd_cache.evaluation.results_folder import Record, ResultsError, ResultsFolder, read_records
from ssd_cache.evaluation.tables import command, summarize, to_json
from ssd_cache.models import find_generator
from ssd_cache.shapes import KINDS, PALETTE

HEAD_MAP = HeadMap(
    torch.tensor([[True, False], [False, False]]),
    scores={
        f"retained_{kind}-{slots}": torch.full((2, 2), value)
        for kind, slots, value in (
            ("spatial", 57, 0.9),
            ("spatial", 115, 0.91),
            ("semantic", 57, 0.5),
            ("semantic", 115, 0.6),
            ("spatial", 173, 0.92),
            ("semantic", 173, 0.9),
        )
    },
)


# --- policies


BY_HEAD = [[60, 180], [115, 105]]
LEARNED = random_score(2, 2, 4, HEAD_MAP.grid)


@pytest.mark.parametrize(
    ("carried", "label", "words"),
    [
        ({}, "ssd", "equal slots, attention sum"),
        ({"budget": BY_HEAD}, "ssd:slots=fitted", "fitted slots, attention sum"),
        ({"learned": LEARNED}, "learned", "equal slots, learned score"),
        ({"budget": BY_HEAD, "learned": LEARNED}, "learned", "fitted slots, learned score"),
    ],
)
def test_default_is_the_maps_own_settings_under_their_exact_name(carried, label, words):
    head_map = replace(HEAD_MAP, **carried)
    [policy] = resolve_policies(parse_policies("default"), head_map)
    assert policy.label == label
    for budget in (0.2, 0.5):
        own, named, unresolved = (
            SSDCache(head_map, budget),
            parse_policy(label).make_cache(head_map, budget),
            parse_policy("default").make_cache(head_map, budget),
        )
        for cache in (named, unresolved):
            assert cache.num_slots == own.num_slots
            assert (cache.score, cache.buffer, cache.num_recent) == (own.score, own.buffer, own.num_recent)
        assert words_of(named.slots, named.score) == words


def test_settings_stay_with_the_default_and_the_name_says_them():
    head_map = replace(HEAD_MAP, budget=BY_HEAD, learned=LEARNED)

    def labels(text, **run):
        return [policy.label for policy in resolve_policies(parse_policies(text), head_map, run)]

    assert labels("full,default,learned,h2o") == ["full", "learned", "h2o"]  # each once
    assert labels("default:buffer=8") == ["learned:buffer=8"]
    assert labels("default:slots=uniform") == ["learned:slots=uniform"]
    assert labels("default:score=sum") == labels("default", score="sum") == ["ssd:slots=fitted"]
    assert labels("default:score=mean,slots=uniform") == ["ssd:score=mean"]
    assert labels("default:score=learned") == ["learned"]


def test_other_policies_hold_what_their_names_say_on_a_fitted_map(tmp_path):
    head_map = replace(HEAD_MAP, budget=BY_HEAD, learned=LEARNED)
    by_head, equal = [(60, 180), (115, 105)], [(115, 115), (115, 115)]
    for name in ("ssd", "margin", "h2o", "streaming-llm", "linear", "inverted", "random-1", "online"):
        assert parse_policy(name).make_cache(head_map, 0.2).num_slots == equal, name
    cache = parse_policy(str(head_map.save_pretrained(tmp_path / "map"))).make_cache(HEAD_MAP, 0.2)
    assert (cache.num_slots, cache.score, cache.buffer) == (by_head, "learned", 8)  # a folder: its own settings


def test_the_bundled_maps_default_at_20_percent_is_what_the_results_call_fitted_with_a_learned_score():
    head_map = find_generator("shapes-janus").head_map()
    [policy] = resolve_policies(parse_policies("default"), head_map)
    own, told = (each.make_cache(head_map, 0.2) for each in (policy, parse_policy("fitted:score=learned")))
    assert policy.label == "learned"
    assert own.num_slots == told.num_slots
    assert (own.score, own.buffer, own.num_recent) == (told.score, told.buffer, told.num_recent)
    assert torch.equal(own.head_map.is_spatial, told.head_map.is_spatial)


def test_results_of_equal_slots_are_not_mixed_with_fitted_ones_of_the_same_name(tmp_path):
    head_map = replace(HEAD_MAP, budget=BY_HEAD, learned=LEARNED)

    def described(text):
        plan = Plan(parse_policies(text), [0.2], [0], [("a", "a circle")], 1, head_map, {})
        return run_of() | {"policies": plan.describe()}

    before = described("ssd,learned")
    before["policies"]["learned"]["slots"] = {"0.2": 115}  # as an earlier version wrote it
    ResultsFolder(tmp_path, before).close()
    ResultsFolder(tmp_path, described("ssd")).close()  # which means what it meant
    with pytest.raises(ResultsError, match=r"policy learned: .*slots {'0.2': 115} there, {'0.2': \[\[60, 180\]"):
        ResultsFolder(tmp_path, described("learned"))


@pytest.mark.parametrize("name", [*POLICIES, "inverted", "online", "random-3"])
def test_every_name_makes_a_cache_of_the_budget(name):
    head_map = replace(HEAD_MAP, learned=random_score(2, 2, 4, HEAD_MAP.grid))
    cache = parse_policy(name).make_cache(head_map, 0.2, buffer=24)
    assert cache.mean_slots == (576 if name == "full" else 115)
    spatial = {"streaming-llm": 4, "h2o": 0, "linear": 0, "inverted": 3, "online": 0}.get(name, 1)
    assert cache.head_map.is_spatial.sum() == spatial
    assert cache.head_map.is_online == (name == "online")
    assert (cache.score == "learned") == (name in ("learned", "full"))  # of which a full one makes no use


def test_fitted_slots_are_ranked_by_attention_unless_the_learned_score_is_asked_for():
    head_map = replace(HEAD_MAP, learned=random_score(2, 2, 4, HEAD_MAP.grid))
    scores = {text: parse_policy(text).make_cache(head_map, 0.2).score for text in ("fitted", "fitted:score=learned")}
    assert scores == {"fitted": "sum", "fitted:score=learned": "learned"}


def test_fitted_budgets_may_follow_each_other_into_a_folder(tmp_path):
    levels = {slots: torch.full((2, 2), slots / 999) for slots in (58, 115, 288)}
    kept = {f"retained_{kind}-{slots}": value for kind in ("spatial", "semantic") for slots, value in levels.items()}
    kept["retained_spatial-58"] = torch.tensor([[0.2, 0.0], [0.0, 0.0]])  # a head that changes its kind with the budget
    head_map = HeadMap(torch.zeros(2, 2, dtype=torch.bool), scores=kept)
    plans = [
        Plan(parse_policies("fitted"), budgets, [0], [("a", "a circle")], 1, head_map, {}) for budgets in ([58], [288])
    ]
    assert fit_heads(head_map, 58).is_spatial.any()
    assert not fit_heads(head_map, 288).is_spatial.any()
    for plan in plans:
        with ResultsFolder(tmp_path, run_of() | {"policies": plan.describe()}, 0):
            pass


def test_fitted_shares_the_same_bytes_out():
    # the first head sees all it needs in a short window, the others want more than their share
    curves = {57: 0.5, 115: 0.6, 173: 0.9}
    scores = {f"retained_spatial-{slots}": torch.tensor([[1.0, 0.1], [0.1, 0.1]]) for slots in curves}
    scores |= {f"retained_semantic-{slots}": torch.full((2, 2), value) for slots, value in curves.items()}
    head_map = HeadMap(torch.zeros(2, 2, dtype=torch.bool), scores=scores)
    cache = parse_policy("fitted").make_cache(head_map, 115, buffer=8)
    (first, *others), *rest = cache.budget
    assert first == 57
    assert sorted([*others, *rest[0]]) == [115, 115, 173]  # the square shares what is spared
    assert cache.head_map.is_spatial.tolist() == [[True, False], [False, False]]
    assert cache.mean_slots == 115


def test_a_folder_is_a_policy_with_its_own_map(tmp_path):
    (~HEAD_MAP).save_pretrained(tmp_path / "other")
    policy = parse_policy(f"{tmp_path / 'other'}:buffer=8")
    assert policy.label == f"{tmp_path / 'other'}:buffer=8"
    assert policy.make_cache(HEAD_MAP, 0.2).head_map.digest == (~HEAD_MAP).digest
    HeadMap(torch.ones(3, 2, dtype=torch.bool)).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="has 3 layers x 2 KV heads"):
        parse_policy(str(tmp_path / "large")).make_cache(HEAD_MAP, 0.2)


def test_random_maps_have_as_many_spatial_heads_and_differ():
    head_map = HeadMap(torch.arange(60).view(6, 10) % 3 == 0)
    maps = [random_map(head_map, seed) for seed in range(4)]
    assert all(other.is_spatial.sum() == 20 for other in maps)
    assert len({other.digest for other in [head_map, *maps]}) == 5
    assert random_map(head_map, 2).digest == maps[2].digest


def test_a_list_of_policies_keeps_settings_with_their_policy():
    policies = parse_policies("full, ssd:score=mean,num_recent=0.50,buffer=8,h2o,ssd:buffer=8,score=mean,num_recent=.5")
    assert [policy.label for policy in policies] == ["full", "ssd:buffer=8,num_recent=0.5,score=mean", "h2o"]
    cache = policies[1].make_cache(HEAD_MAP, 0.2, buffer=24, num_sinks=2)
    assert (cache.buffer, cache.num_recent, cache.num_sinks, cache.score) == (8, 0.5, 2, "mean")
    assert policies[0].budgets([0.2, 0.5]) == [1.0]
    assert policies[2].budgets([0.2, 0.5, 0.2]) == [0.2, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("streaming-lm", "unknown policy 'streaming-lm'; did you mean 'streaming-llm'?"),
        ("full,,ssd", "unknown policy ''"),
        ("buffer=8", "'buffer=8' is a setting without a policy: write it as ssd:buffer=8"),
        ("ssd,buffer=8", "'buffer=8' is a setting without a policy"),
        ("ssd:bufer=8", "unknown setting 'bufer' (did you mean 'buffer'?)"),
        ("ssd:buffer=8.5", "buffer=8.5 is out of range: give an int of at least 1"),
        ("ssd:num_recent=much", "num_recent='much' is out of range"),
        ("ssd:score=8", "score=8 is unknown: give one of"),
        ("ssd:num_recent=-1", "num_recent='-1' cannot be read"),
        ("ssd:score=", "score='' cannot be read"),
        ("ssd:buffer=8,buffer=9", "buffer is given twice"),
        ("full:buffer=8", "the full cache keeps everything"),
    ],
)
def test_a_name_that_can_not_be_read_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        for policy in parse_policies(text):
            policy.make_cache(HEAD_MAP, 0.2)


# --- statistics


def results(**kinds):
    """kind="110 01": prompts as words, their samples as digits."""
    return {
        kind: {prompt: word.count("1") / len(word) for prompt, word in enumerate(text.split())}
        for kind, text in kinds.items()
    }


def test_accuracy_is_the_mean_of_kinds_of_unequal_size():
    found = results(a="1 1 1 0", b="10 00")
    assert mean(found) == 0.5
    # variance between prompts: 3/16 over 4 of them, and 1/16 over 2
    assert standard_error(found) == pytest.approx((3 / 64 + 1 / 32) ** 0.5 / 2)
    assert np.isnan(mean(results(a="1", b="")))


def test_the_bootstrap_of_six_prompts_has_the_binomial_distribution():
    # four differences are 1 and two -1, so a resampled mean is (2 X - 6) / 6 with X of the binomial of 6 and 2/3
    found = compare(results(a="1 1 1 1 0 0"), results(a="0 0 0 0 1 1"))
    # P(X <= 1) = 0.018, P(X <= 2) = 0.100, P(X <= 5) = 0.912
    assert (found.difference, found.low, found.high) == pytest.approx((1 / 3, -1 / 3, 1))
    assert found.num_prompts == 6
    # P(X <= 3) = 0.320, doubled; standard error of 10,000 samples 0.0047, doubled, times 4
    assert found.p == pytest.approx(0.639, abs=0.038)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_too_few_prompts_tell_nothing_but_the_difference(number):
    up, down = results(a=" ".join("1" * number)), results(a=" ".join("0" * number))
    for found, difference in ((compare(up, down), 1), (compare(up, up), 0)):
        assert found.difference == difference
        assert np.isnan([found.low, found.high, found.p]).all()


def test_one_prompt_a_kind_shows_no_spread_however_many_kinds():
    kinds = "abcdefgh"
    up, down = ({kind: {0: correct} for kind in kinds} for correct in (1.0, 0.0))
    found = compare(up, down)
    assert found.difference == 1
    assert np.isnan([found.low, found.high, found.p]).all()
    assert np.isnan(standard_error(up))
    assert np.isnan(standard_error({"a": {0: 1.0}, "b": {1: 0.0, 2: 1.0}}))


def test_p_is_never_below_what_as_many_unequal_pairs_can_show():
    def p_of(better, equal):
        first = dict(enumerate([1.0] * better + [0.0] * equal))
        return compare({"a": first}, {"a": dict.fromkeys(first, 0.0)}).p

    assert [p_of(number, 0) for number in (6, 8, 10)] == [2**-5, 2**-7, 2**-9]
    assert p_of(3, 97) == 2**-2  # three that differ, of a hundred: as one toss in four
    assert p_of(1, 99) == p_of(0, 100) == 1
    assert p_of(14, 0) == pytest.approx(2 / 10_001)  # the least that the resamples can show


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_differences_that_are_no_numbers_give_no_numbers(value):
    first = dict(enumerate([0.5] * 9 + [value]))
    found = compare({"a": first}, {"a": dict.fromkeys(first, 0.0)})
    assert np.isnan([found.difference, found.low, found.high, found.p]).all()


def test_the_bootstrap_equals_sampling_prompts_one_by_one():
    rng = np.random.default_rng(3)
    first, second = (
        {kind: {p: float(rng.random() < share) for p in range(30)} for kind in "ab"} for share in (0.8, 0.6)
    )
    found = compare(first, second)
    sampled = np.zeros(20_000)
    for kind in "ab":
        values = np.array([first[kind][p] - second[kind][p] for p in range(30)])
        sampled += values[rng.integers(0, 30, (20_000, 30))].mean(1) / 2
    assert found.difference == pytest.approx(sampled.mean(), abs=0.003)
    # a percentile of 10,000 samples of a sum in steps of 1/60 may be off by one step
    assert [found.low, found.high] == pytest.approx(np.quantile(sampled, [0.025, 0.975]), abs=1 / 60 + 1e-9)
    assert found.p == pytest.approx(2 * (sampled <= 1e-12).mean(), abs=0.01)


def test_equal_policies_differ_by_nothing_and_the_sign_turns_round():
    same = results(a="1 0 1 1", b="01 11")
    found = compare(same, same)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    better, worse = results(a="1 1 1 1 1 1 1 1"), results(a="0 0 1 0 0 0 0 1")
    up, down = compare(better, worse), compare(worse, better)
    assert (up.difference, down.difference) == (0.75, -0.75)
    assert up.low > 0 > down.high
    assert up.p < 0.05


def test_pairs_are_prompts_that_both_have():
    found = compare(results(a="11 1 0"), results(a="0 1"))
    assert (found.difference, found.num_prompts) == (0.5, 2)
    assert np.isnan(compare(results(a="1", b=""), results(a="", b="1")).p)


# --- lines and folders


def record(policy="full", budget=1.0, prompt=0, seed=0, correct=True, kind="single_object", **facts):
    num_slots = round(576 * budget) if isinstance(budget, float) else budget
    facts = {"settings": {}, "num_slots": num_slots, "head_map": "0123", "caption": "a photo of a circle", **facts}
    reason = "" if correct else "expected 1 circle, found nothing"
    return Record(policy, budget=budget, seed=seed, prompt=prompt, kind=kind, correct=correct, reason=reason, **facts)


def run_of(*labels, **conditions):
    entry = {"settings": {}, "slots": {"0.2": 115}, "head_map": "0123"}
    conditions = {
        "bench": "shapes",
        "grid": [24, 24],
        "num_per_kind": 1,
        "prompt_seed": 1,
        "batch_size": 4,
        **conditions,
    }
    conditions |= {"settings": {}, "guidance_scale": 3.0, "temperature": 1.0, "dtype": "float32", "device": "cpu"}
    command = {"model": "shapes-janus", "head_map": None}
    return {"conditions": conditions, "policies": {label: dict(entry) for label in labels}, "command": command}


def test_lines_come_back_as_they_were_and_a_half_one_counts_for_nothing(tmp_path):
    records = [record(prompt=prompt, correct=prompt != 1) for prompt in range(3)]
    with ResultsFolder(tmp_path / "new" / "run", run_of("full")) as folder:
        folder.append(records[:2])
    path = tmp_path / "new" / "run" / "results-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + records[2].line().encode()[:-9])
    assert read_records([path.parent], SHAPES) == (records[:2], [])
    with ResultsFolder(path.parent, run_of("full")) as folder:
        assert path.read_bytes() == whole
        folder.append(records)
    assert path.read_bytes() == whole + records[2].line().encode()


def test_other_conditions_are_refused_by_field_and_more_policies_are_welcome(tmp_path):
    ResultsFolder(tmp_path, run_of("full")).close()
    with pytest.raises(ResultsError, match="other conditions .batch_size 4 there, 8 now.: give another folder"):
        ResultsFolder(tmp_path, run_of("full", batch_size=8))
    more = run_of("ssd")
    more["policies"]["ssd"]["slots"] = {"0.5": 288}
    ResultsFolder(tmp_path, more).close()
    ResultsFolder(tmp_path, run_of("ssd")).close()
    kept = json.loads((tmp_path / "run.json").read_text())["policies"]
    assert list(kept) == ["full", "ssd"]
    assert kept["ssd"]["slots"] == {"0.2": 115, "0.5": 288}
    for field, value, message in (
        ("head_map", "9999", "policy ssd: .*head_map '0123' there, '9999' now"),
        ("slots", {"0.2": 100}, "slots .*'0.2': 115} there, .*'0.2': 100} now"),
    ):
        other = run_of("ssd")
        other["policies"]["ssd"][field] = value
        with pytest.raises(ResultsError, match=message):
            ResultsFolder(tmp_path, other)


def test_a_folder_that_is_in_use_damaged_or_of_unknown_conditions_is_refused(tmp_path):
    with ResultsFolder(tmp_path, run_of("full")) as folder:
        folder.append([record()])
        with pytest.raises(ResultsError, match="another run is writing here"):
            ResultsFolder(tmp_path, run_of("full"))
        with ResultsFolder(tmp_path, run_of("full"), process=1):
            pass
    (tmp_path / "results-1.jsonl").write_text("{}\n")
    with pytest.raises(ResultsError, match="results-1.jsonl, line 1: 'policy' is missing; delete this line"):
        ResultsFolder(tmp_path, run_of("full"))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ResultsError, match="run.json: not a run.json of `ssd-cache eval shapes`"):
        ResultsFolder(tmp_path, run_of("full"))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ResultsError, match="has no run.json: give a folder that"):
        ResultsFolder(tmp_path, run_of("full"))


def test_a_full_disk_keeps_the_lines_before(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultsFolder(tmp_path, run_of("full")) as folder:
        folder.append([record()])
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(
            ResultsError, match="cannot be written .No space left on device.; the lines before are kept"
        ):
            folder.append([record(prompt=1)])
    monkeypatch.undo()
    assert read_records([tmp_path], SHAPES)[0][0] == record()
    with ResultsFolder(tmp_path, run_of("full")) as folder:
        folder.append([record(prompt=1)])
    assert read_records([tmp_path], SHAPES)[0] == [record(), record(prompt=1)]


def test_processes_share_every_batch_and_generate_none_twice():
    prompts = SHAPES.prompts(2, 1)
    assert [kind for kind, _ in prompts] == 2 * list(KINDS)
    plan = Plan(parse_policies("full,ssd"), [0.2, 0.5], [0, 7], prompts, 5, HEAD_MAP, {})
    batches = plan.batches()
    assert [len(batch.prompts) for batch in batches] == [5, 5, 2] * 6
    assert [batch.number for batch in batches] == [0, 1, 2] * 6
    assert len({key for batch in batches for key in batch.image_keys()}) == 12 * 2 * 3
    for count in (1, 2, 5):
        shares = [plan.missing(process, count, set()) for process in range(count)]
        assert sorted(batches.index(batch) for share in shares for batch in share) == list(range(18))
    done = {*batches[0].image_keys(), *batches[1].image_keys()[1:]}
    assert plan.missing(0, 1, done) == batches[1:]


def test_seeds_of_torch_depend_on_sample_and_batch_alone():
    seeds = {hashed_seed(seed, batch) for seed in range(20) for batch in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- the report


def lines_of(shares, num_per_kind=20):
    """Records whose share of correct images is about as asked, spread over the kinds."""
    rng = np.random.default_rng(0)
    prompts = SHAPES.prompts(num_per_kind, 1)
    return [
        record(policy, budget, prompt, correct=bool(rng.random() < share), kind=kind, caption=caption)
        for (policy, budget), share in shares.items()
        for prompt, (kind, caption) in enumerate(prompts)
    ]


SHARES = {("full", 1.0): 0.9, ("ssd", 0.2): 0.8, ("ssd", 0.5): 0.85, ("h2o", 0.2): 0.4, ("h2o", 115): 0.5}


def write_results(folder, records, **conditions):
    with ResultsFolder(folder, run_of(*dict.fromkeys(entry.policy for entry in records), **conditions)) as results:
        results.append(records)


def test_a_summary_compares_with_full_and_ssd_with_the_rest():
    records = lines_of(SHARES)
    summary = summarize(records, run_of("full", "ssd", "h2o"))
    assert [(row.policy, row.budget) for row in summary.rows] == [
        ("full", 1.0), ("ssd", 0.2), ("ssd", 0.5), ("h2o", 0.2), ("h2o", 115),
    ]  # fmt: skip
    for row in summary.rows:
        own = [entry for entry in records if (entry.policy, entry.budget) == (row.policy, row.budget)]
        shares = [np.mean([entry.correct for entry in own if entry.kind == kind]) for kind in KINDS]
        assert row.overall == pytest.approx(np.mean(shares))
        assert list(row.kinds.values()) == pytest.approx(shares)
    assert [(entry.policy, entry.against, entry.budget) for entry in summary.comparisons] == [
        ("ssd", "full", 0.2), ("ssd", "full", 0.5), ("h2o", "full", 0.2), ("h2o", "full", 115), ("ssd", "h2o", 0.2),
    ]  # fmt: skip
    first, *_, last = summary.comparisons
    assert first.difference.difference == pytest.approx(summary.rows[1].overall - summary.rows[0].overall)
    assert last.difference.low > 0
    assert last.difference.p < 0.001
    assert command(summary).startswith("ssd-cache eval shapes --policies full,ssd,h2o --budgets 0.2,0.5,115 --model ")
    json.dumps(to_json(summarize(records[:3], run_of("full"))), allow_nan=False)  # kinds without images


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_report_is_made_from_the_lines_of_several_folders(run):
    records = lines_of(SHARES)
    write_results(Path("a"), records[:400])
    write_results(Path("b"), records[360:])  # some images twice
    result = run("report", "a", "b", "--output", "new/report")
    assert result.exit_code == 0, result.output
    text = Path("new/report/results.md").read_text()
    assert "| ssd | 20% |" in text
    assert "| h2o | 115 tokens |" in text
    assert "| ssd | h2o | 20% | +" in text
    assert result.stdout.splitlines()[0] in text
    numbers = json.loads(Path("new/report/results.json").read_text())
    assert [row["num_images"] for row in numbers["rows"]] == [120] * 5
    assert Path("new/report/score-by-budget.png").read_bytes().startswith(b"\x89PNG")
    write_results(Path("c"), records[:9], batch_size=8)
    result = run("report", "a", "c")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "c beside a: results of other conditions (batch_size 4 there, 8 now)" in result.stderr


def test_damaged_lines_are_named_and_the_rest_is_reported(run):
    write_results(Path("a"), lines_of(SHARES))
    path = Path("a/results-0.jsonl")
    lines = path.read_text().splitlines()
    lines[2], lines[7] = lines[2][:-9], lines[7].replace('"correct": ', '"correct": 1')
    lines.insert(9, lines[8].replace('"kind": "', '"kind": "x'))
    path.write_text("\n".join([*lines, "half of a li"]))
    result = run("report", "a")
    assert result.exit_code == 1
    said = result.stderr.splitlines()
    assert [line.split(": ")[1] for line in said[:-1]] == [f"{path}, line {n}" for n in (3, 8, 10)]
    assert said[-1].startswith("ssd-cache: 3 line(s) of results could not be used")
    assert json.loads(Path("a/results.json").read_text())["rows"][0]["num_images"] == 118


def test_a_report_needs_no_matplotlib_and_says_so(run, monkeypatch):
    write_results(Path("a"), lines_of(SHARES))
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    result = run("report", "a")
    assert result.exit_code == 0, result.output
    assert (
        "no score-by-budget.png: figures and reports need matplotlib, not installed here: pip install" in result.stderr
    )
    assert sorted(path.name for path in Path("a").iterdir()) == [
        "results-0.jsonl", "results.json", "results.md", "run.json",
    ]  # fmt: skip


def test_a_report_is_written_whole_or_not_at_all(run, monkeypatch):
    write_results(Path("a"), lines_of(SHARES))
    Path("b").mkdir()
    Path("b/results.md").write_text("older")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    result = run("report", "a", "-o", "b")
    assert result.exit_code == 1
    assert result.stderr.strip() == "ssd-cache: [Errno 28] No space left on device"
    assert [(path.name, path.read_text()) for path in Path("b").iterdir()] == [("results.md", "older")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "nowhere"), "'nowhere' does not exist"),
        (("report", "empty"), "empty has no run.json"),
        (("report", "bare"), "bare: no readable line of results: run `ssd-cache eval shapes`"),
        (("report", "bare", "-o", "file"), "--output file is a file; give a folder"),
        (("shape",), "Did you mean 'shapes'?"),
        (("shapes", "--policies", "h2"), "did you mean 'h2o'?"),
        (("shapes", "--budgets", "0.2,2.5"), "--budget 2.5: give a fraction"),
        (("shapes", "--budgets", "577"), "--budgets 577: an image has 576 visual tokens"),
        (("shapes", "--seeds", "0,x"), "--seeds 0,x: give whole numbers"),
        (("shapes", "--policies", "ssd:score=man"), "score='man' is unknown"),
        (("shapes", "--num-per-kind", "0"), "Invalid value for '--num-per-kind'"),
        (("shapes", "--budgets", "0.02"), "raise the budget, or lower buffer"),
        (("shapes", "--head-map", "online"), "give the policy online"),
        (("shapes", "--guidance", "0.5"), "guidance_scale=0.5 is out of range"),
        (("shapes", "--output", "file"), "--output file is a file; give a folder"),
        (("shapes", "--output", "bare"), "bare: results of other conditions"),
    ],
)
def test_a_mistake_is_one_line_before_weights_are_loaded(run, arguments, message, monkeypatch):
    monkeypatch.setattr(JanusForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    Path("empty").mkdir()
    Path("file").touch()
    ResultsFolder(Path("bare"), run_of("full")).close()
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("ssd-cache: ")
    assert sorted(path.name for path in Path().iterdir()) == ["bare", "empty", "file"]


@pytest.mark.parametrize("bench", ["shapes", "report", "compare"])
def test_help_fits_80_columns(run, bench):
    result = run(bench, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_plot_stands_many_policies_and_one_budget():
    shares = {("full", 1.0): 0.9, **{(f"random-{number}", 0.2): 0.5 for number in range(12)}}
    assert plot_result_by_budget(summarize(lines_of(shares, 2), run_of("full"))).startswith(b"\x89PNG")


# --- whole runs, with real processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random Janus of two layers that generates 24 x 24 tokens of the palette."""
    folder = tmp_path_factory.mktemp("noise") / "model"
    other = tiny_janus()
    config = other.config
    config.vq_config.num_embeddings = len(PALETTE)
    torch.manual_seed(0)
    janus = JanusForConditionalGeneration(config)
    janus.generation_config = other.generation_config
    janus.generation_config.guidance_scale, janus.generation_config.temperature = 3.0, 0.9
    janus.generation_config.do_sample = True
    janus.save_pretrained(folder)
    load_example().build_processor().save_pretrained(folder)
    HEAD_MAP.save_pretrained(folder / "head_map")
    return folder


def arguments_of(model, output):
    options = {"--model": model, "--policies": "h2o,ssd:num_recent=4", "--budgets": "0.2", "--num-per-kind": 1}
    options |= {"--batch-size": 6, "--buffer": 24, "--device": "cpu", "--output": output}
    return ["shapes", *(str(word) for pair in options.items() for word in pair)]


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("unbroken") / "results"
    result = CliRunner().invoke(app, ["eval", *arguments_of(model, output)])
    assert result.exit_code == 0, result.output
    assert "| ssd:num_recent=4 | 20% |" in result.stdout
    return output


def lines(folder):
    return sorted(line for path in folder.glob("results-*.jsonl") for line in path.read_text().splitlines())


def test_lines_hold_what_repeats_them(unbroken, model):
    records, problems = read_records([unbroken], SHAPES)
    assert problems == []
    assert len(records) == len(lines(unbroken)) == 2 * 6
    for number, (kind, caption) in enumerate(SHAPES.prompts(1, 1)):
        own = [entry for entry in records if entry.prompt == number]
        assert {(entry.kind, entry.caption, entry.num_slots) for entry in own} == {(kind, caption, 115)}
        assert [entry.settings for entry in own] == [{"buffer": 24}, {"buffer": 24, "num_recent": 4}]
        assert own[1].head_map == HEAD_MAP.digest != own[0].head_map
    conditions = json.loads((unbroken / "run.json").read_text())["conditions"]
    generator = find_generator(str(model)).load()
    sampling = generator.sampling()
    assert (conditions["guidance_scale"], conditions["temperature"]) == (sampling.guidance_scale, sampling.temperature)
    assert conditions["torch"] == torch.__version__
    given = {"batch_size": 6, "sampling": sampling, "settings": {}}
    given |= {"dtype": torch.float32, "device": torch.device("cpu")}
    found = run_conditions(generator.checkpoint, [], **given)["model_sha256"]
    assert found == conditions["model_sha256"]
    assert run_conditions(find_generator("shapes-janus"), [], **given)["model_sha256"] != found


def test_a_killed_run_goes_on_to_the_lines_of_an_unbroken_one(model, unbroken, tmp_path, monkeypatch):
    process = Forked("eval", *arguments_of(model, "results"), cwd=tmp_path)
    path = tmp_path / "results" / "results-0.jsonl"
    while process.returncode is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = path.read_text().splitlines(keepends=True)
    assert 0 < len(kept) < 12
    path.write_text(
        "".join(kept[:-2]) + kept[-2][:50]
    )  # as if killed in the midst of a line, of an image within a batch
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["eval", *arguments_of(model, "results")])
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "results") == lines(unbroken)
    assert (tmp_path / "results" / "results.md").read_text() == (unbroken / "results.md").read_text()
    assert "wrote results.md, results.json, score-by-budget.png in results" in result.stdout


def test_two_processes_go_on_where_one_stopped(model, unbroken, tmp_path):
    pytest.importorskip("accelerate")
    results = tmp_path / "results"
    results.mkdir()
    (results / "run.json").write_bytes((unbroken / "run.json").read_bytes())
    done = (unbroken / "results-0.jsonl").read_text().splitlines(keepends=True)[:4]
    (results / "results-0.jsonl").write_text("".join(done))  # four images of the first batch
    answers = run_two(["eval", *arguments_of(model, "results")], cwd=tmp_path)
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert lines(results) == lines(unbroken)
    shares = [len((results / f"results-{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert shares == [6, 6]
    assert any("| ssd:num_recent=4 | 20% |" in stdout for _, stdout, _ in answers)
    assert "visual tokens" not in answers[1][2]


def test_what_is_there_is_not_generated_again(model, unbroken, monkeypatch):
    monkeypatch.setattr(JanusForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    before = lines(unbroken)
    result = CliRunner().invoke(app, ["eval", *arguments_of(model, unbroken)])
    assert result.exit_code == 0, result.output
    assert lines(unbroken) == before
    for option, value, message in (
        ("--guidance", "4", "guidance_scale 3.0 there, 4.0 now"),
        ("--batch-size", "3", "batch_size 6 there, 3 now"),
        ("--num-per-kind", "2", "num_per_kind 1 there, 2 now"),
        ("--dtype", "bfloat16", "dtype 'float32' there, 'bfloat16' now"),
        ("--model", "shapes-janus", "model_sha256"),
    ):
        result = CliRunner().invoke(app, ["eval", *arguments_of(model, unbroken), option, value])
        assert result.exit_code == 2
        assert message in result.stderr


def test_an_interruption_says_how_to_go_on(model, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(JanusForConditionalGeneration, "generate", interrupt)
    result = CliRunner().invoke(app, ["eval", *arguments_of(model, tmp_path / "results")])
    assert result.exit_code == 1
    assert "keeps 0 images: run the same command again to resume" in result.stderr.splitlines()[-1]


def test_models_that_generate_another_world_are_refused(run, tmp_path):
    config = tiny_janus(grid_side=8).config
    config.save_pretrained(tmp_path / "small")
    result = run("shapes", "--model", tmp_path / "small")
    assert result.exit_code == 2
    assert "generates 8 x 8 visual tokens out of 32; the judge of shapes reads 24 x 24 out of 21" in result.stderr
