"""What each head alone is worth, and slots shared out by it: against single measurements, brute force, and the command.

Small models with random weights. What the trained model gains by it is told in docs/profiling.md, not tested.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.tiny_checkpoint import SIDE, write_checkpoint
from typer.testing import CliRunner

from ssd_cache import HeadMap, SSDCache, profile_heads
from ssd_cache.cli import app
from ssd_cache.evaluation.fidelity import divergence, measure_divergence, measure_fidelity
from ssd_cache.models import find_generator
from ssd_cache.profiling.allocation import best_kinds, fit_heads, measured_levels
from ssd_cache.runs.run_state import ProfilingError

PROMPTS = ["a photo of a red circle", "a photo of a circle left of a blue square", "a photo of two triangles"]
LEVELS = (16, 24, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), guidance_scale=2.0)


@pytest.fixture(scope="module")
def generator(checkpoint):
    return find_generator(str(checkpoint)).load("float32", "cpu")


@pytest.fixture(scope="module")
def profiled(generator):
    return profile_heads(generator, PROMPTS, budget=24, levels=LEVELS, num_recent=0.5, progress=False)


@pytest.fixture(scope="module")
def measured(generator, profiled):
    return measure_divergence(generator, PROMPTS, profiled, batch_size=2, progress=False)


def test_a_score_is_the_divergence_of_a_cache_with_that_head_alone_compressed(generator, profiled, measured):
    level, layer, head = 16, 1, 0
    budget = [[SIDE * SIDE] * 2, [level, SIDE * SIDE]]
    kinds = best_kinds(profiled, level)
    total = 0.0
    for seed, prompts in ((0, PROMPTS[:2]), (1, PROMPTS[2:])):
        cache = SSDCache(HeadMap(kinds, profiled.grid), budget, num_recent=0.5)
        total += (
            measure_fidelity(generator, prompts, {"one": lambda cache=cache: cache}, seed=seed)["one"].kl.sum().item()
        )
    found = measured.scores[f"divergence-{level}"][layer, head].item()
    assert found > 0
    # generated tokens are fed back by another road, so that sampling's rounding is all that may differ
    assert found == pytest.approx(total / len(PROMPTS), rel=1e-5)


def test_the_map_keeps_all_else_and_says_how_it_was_measured(profiled, measured):
    assert torch.equal(measured.is_spatial, profiled.is_spatial)
    assert measured.scores.keys() - profiled.scores.keys() == {f"divergence-{level}" for level in LEVELS}
    facts = measured.profile["divergence"]
    assert facts["num_prompts"] == 3
    assert facts["guidance_scale"] == 2.0
    assert {**measured.profile, "divergence": None} == {**profiled.profile, "divergence": None}


def test_a_head_that_costs_next_to_nothing_is_not_asked_again(generator, profiled, measured, monkeypatch):
    scores = torch.stack([measured.scores[f"divergence-{level}"] for level in LEVELS])
    monkeypatch.setattr(divergence, "NEGLIGIBLE", scores[0].median().item() + 1e-3)
    again = measure_divergence(generator, PROMPTS, profiled, batch_size=2, progress=False)
    assert (scores[0] < divergence.NEGLIGIBLE).any()
    expected = scores[0]
    for level, own in zip(LEVELS, scores, strict=True):
        expected = torch.where(expected < divergence.NEGLIGIBLE, expected, own)
        assert torch.equal(again.scores[f"divergence-{level}"], expected)
    assert not torch.equal(expected, scores[-1])


def stop_at(monkeypatch, number):
    """Interrupts `measure_divergence` at its pass of that number, the first being 1.

    Returns the numbers of heads of its finished passes, those of later runs too.
    """
    calls, finished, real = [], [], divergence.compare_caches

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        results = real(*args, **kwargs)
        finished.append(len(args[2]))
        return results

    monkeypatch.setattr(divergence, "compare_caches", stops)
    return finished


@pytest.mark.parametrize("number", [2, 5])
def test_an_interrupted_run_goes_on_after_its_last_pass(generator, profiled, measured, tmp_path, monkeypatch, number):
    state, settings = tmp_path / "state", {"batch_size": 2, "progress": False}
    finished = stop_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        measure_divergence(generator, PROMPTS, profiled, state_file=state, **settings)
    assert measure_divergence(generator, PROMPTS, profiled, state_file=state, **settings) == measured
    assert sum(finished) == 2 * 4 * len(LEVELS)  # every head once for each of the two batches and every level
    with pytest.raises(ProfilingError, match=r"another run \(seed 0 there, 1 now\); give another file, or delete it"):
        measure_divergence(generator, PROMPTS, profiled, seed=1, state_file=state, **settings)


def test_heads_are_measured_side_by_side_or_one_by_one(generator, profiled, measured, monkeypatch):
    monkeypatch.setattr(divergence, "NUM_CACHES", 1)
    found = measure_divergence(generator, PROMPTS, profiled, levels=[16], batch_size=2, progress=False)
    assert torch.equal(found.scores["divergence-16"], measured.scores["divergence-16"])


def test_images_are_kept_batch_by_batch(generator, profiled, measured, tmp_path, monkeypatch):
    state, settings, generated = tmp_path / "state", {"batch_size": 2, "progress": False}, []
    generate = type(generator).generate

    def stops(self, prompts, cache=None, **keywords):
        if cache is None:
            generated.append(prompts)
            if len(generated) == 2:
                raise KeyboardInterrupt
        return generate(self, prompts, cache, **keywords)

    monkeypatch.setattr(type(generator), "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        measure_divergence(generator, PROMPTS, profiled, state_file=state, **settings)
    assert measure_divergence(generator, PROMPTS, profiled, state_file=state, **settings) == measured
    assert generated == [PROMPTS[:2], PROMPTS[2:], PROMPTS[2:]]


def test_a_state_of_other_labels_at_a_level_or_of_another_cache_is_refused(generator, profiled, tmp_path, monkeypatch):
    state, settings = tmp_path / "state", {"batch_size": 2, "progress": False, "state_file": tmp_path / "state"}
    stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        measure_divergence(generator, PROMPTS, profiled, **settings)
    before = state.read_bytes()
    swapped = {"retained_spatial-24": "retained_semantic-24", "retained_semantic-24": "retained_spatial-24"}
    scores = {name: profiled.scores[swapped.get(name, name)] for name in profiled.scores}
    with pytest.raises(ProfilingError, match="another run .kinds"):
        measure_divergence(generator, PROMPTS, replace(profiled, scores=scores), **settings)
    other = replace(profiled, profile={**profiled.profile, "buffer": 4})
    with pytest.raises(ProfilingError, match="another run .buffer 8 there, 4 now"):
        measure_divergence(generator, PROMPTS, other, **settings)
    assert state.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"[]", b'{"run": {"seed": 0}, "divergence": {"16": [[1.0]]}}'])
def test_other_files_and_states_of_the_old_format_are_refused(generator, profiled, tmp_path, content):
    state = tmp_path / "state.json"
    state.write_bytes(content)
    with pytest.raises(ProfilingError, match="not the measurements of ssd-cache fit .* give another file, or delete"):
        measure_divergence(generator, PROMPTS, profiled, batch_size=2, state_file=state, progress=False)
    assert state.read_bytes() == content


def test_what_can_not_be_measured_is_refused_at_once(generator, profiled, monkeypatch):
    monkeypatch.setattr(type(generator), "generate", None)
    with pytest.raises(ValueError, match=r"level 17 was not measured: the map's levels are \[16, 24, 40\]"):
        measure_divergence(generator, PROMPTS, profiled, levels=[17], progress=False)
    with pytest.raises(ValueError, match="profile again with levels"):
        measure_divergence(generator, PROMPTS, replace(profiled, scores={}), progress=False)
    with pytest.raises(ValueError, match=r"levels is empty: give some of the map's levels, \[16, 24, 40\]"):
        measure_divergence(generator, PROMPTS, profiled, levels=[], progress=False)
    small = replace(profiled, profile={**profiled.profile, "buffer": 20})
    with pytest.raises(ValueError, match="16 slots, fewer than buffer=20"):
        measure_divergence(generator, PROMPTS, small, progress=False)
    with pytest.raises(ProfilingError, match="the state of this run cannot be written"):
        measure_divergence(generator, PROMPTS, profiled, state_file="/dev/null/state", progress=False)


def test_fitted_slots_have_the_least_divergence_of_all_choices(measured):
    # brute force over levels; random scores, since those of a random model are nearly alike
    generator = torch.Generator().manual_seed(3)
    scores = {f"divergence-{level}": torch.rand(2, 2, generator=generator) for level in LEVELS}
    source = replace(measured, scores={**measured.scores, **scores})
    fitted = fit_heads(source, 24)
    assert fitted.method == "fit by divergence"
    best = min(
        sum(scores[f"divergence-{level}"].flatten()[head].item() for head, level in enumerate(choice))
        for choice in itertools.product(LEVELS, repeat=4)
        if sum(choice) <= 24 * 4
    )
    slots = [level for layer in fitted.budget for level in layer]
    assert sum(slots) <= 24 * 4
    got = sum(scores[f"divergence-{level}"].flatten()[head].item() for head, level in enumerate(slots))
    assert got == pytest.approx(best, abs=1e-9)
    for head, level in enumerate(slots):
        assert fitted.is_spatial.flatten()[head] == best_kinds(source, level).flatten()[head]


def test_levels_are_those_that_both_measured(measured):
    one = {name: score for name, score in measured.scores.items() if name not in ("divergence-40",)}
    assert {level for layer in fit_heads(replace(measured, scores=one), 24).budget for level in layer} <= {16, 24}
    assert measured_levels(measured) == list(LEVELS)


def test_the_command_fits_a_profiled_map(checkpoint, profiled, tmp_path):
    profiled.save_pretrained(tmp_path / "profiled")
    command = ["fit", *PROMPTS[:1], "--model", str(checkpoint), "--head-map", str(tmp_path / "profiled")]
    command += ["--budget", "24", "--levels", "16,40", "--output", str(tmp_path / "fitted")]
    result = CliRunner().invoke(app, [*command, "--resume", str(tmp_path / "state")])
    assert result.exit_code == 0, result.output
    fitted = HeadMap.from_pretrained(tmp_path / "fitted")
    assert fitted.method == "fit by divergence"
    assert {level for layer in fitted.budget for level in layer} <= {16, 40}
    assert sum(level for layer in fitted.budget for level in layer) <= 24 * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fitted", "profiled", "state"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "17"], "level 17 was not measured: the map's levels are [16, 24, 40]"),
        (["--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["--temperature", "0"], "temperature=0 leaves one token"),
        (["--budget", "8"], "the budget is 8 slots a head, fewer than the lowest level, 16"),
        (["--budget", "20", "--levels", "40,24"], "the budget is 20 slots a head, fewer than the lowest level, 24"),
        (["--levels", "16"], "attention was measured at the levels [16], and choosing slots needs at least two"),
    ],
)
def test_wrong_use_of_the_command_is_one_line(checkpoint, profiled, tmp_path, options, message):
    profiled.save_pretrained(tmp_path / "profiled")
    command = ["fit", PROMPTS[0], "--model", str(checkpoint), "--head-map", str(tmp_path / "profiled"), *options]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "fitted")])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "fitted").exists()


def test_a_model_without_a_map_says_what_to_give(tmp_path):
    bare = write_checkpoint(tmp_path / "bare", with_head_map=False)
    result = CliRunner().invoke(app, ["fit", PROMPTS[0], "--model", str(bare), "--output", str(tmp_path / "fitted")])
    assert result.exit_code == 2
    assert "give --head-map" in " ".join(result.output.split())
