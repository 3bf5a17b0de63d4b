"""Learned scores: evictions pretended as the cache makes them, gradients, learning, and what a map carries."""

from __future__ import annotations

import json
import statistics
import warnings
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from helpers.models import random_score
from helpers.plain_loops import held_tokens, runs
from helpers.tiny_checkpoint import SIDE, write_checkpoint, write_family
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ssd_cache import HeadMap, HeadMapError, SSDCache, learn_score
from ssd_cache.cli import app
from ssd_cache.evaluation.fidelity import measure_fidelity
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.models import GeneratorError, find_generator
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.run_state import ProfilingError, read_state, write_state
from ssd_cache.training import learning, moving_slots, recording, trainer
from ssd_cache.training.learning_state import FORMAT, WHAT, LearningRun, LearningState
from ssd_cache.training.moving_slots import MAX_SIZES, limit_sizes, move_slots
from ssd_cache.training.pretended import masked_softmax, retained_tokens
from ssd_cache.training.recording import replay_images
from ssd_cache.training.trainer import Trainer, mean_attention

GRID = (SIDE, SIDE)
PROMPTS = ["a photo of a red circle", "a photo of a circle left of a blue square", "a photo of two triangles"]
SETTINGS = {"budget": 24, "buffer": 5, "batch_size": 2, "progress": False}


@given(runs())
def test_pretended_evictions_leave_the_tokens_that_the_cache_holds(run):
    torch.manual_seed(run["seed"])
    grid, heads, dim = run["grid"], len(run["is_spatial"]), 4
    length = min(run["num_visual"], grid[0] * grid[1])
    keys, values = (torch.randn(run["batch"], heads, length, dim) for _ in range(2))
    learned = random_score(1, heads, dim, grid)
    head_map = HeadMap(torch.tensor([run["is_spatial"]]), grid=grid, learned=learned)
    settings = {name: run[name] for name in ("buffer", "num_recent", "num_sinks")}
    assert_same_as_cache(head_map, run["slots"], keys, values, **settings)


@pytest.mark.parametrize("length", [14, 36])
def test_heads_whose_slots_fill_at_different_times_are_pretended_together(length):
    """Their tokens are those of the cache, and their gradients those of each head pretended alone."""
    torch.manual_seed(0)
    slots, grid, dim = [9, 21, 13, 11, 36, 13, 9], (6, 6), 4
    keys, values = (torch.randn(2, len(slots), length, dim) for _ in range(2))
    learned = random_score(1, len(slots), dim, grid)
    head_map = HeadMap(torch.tensor([[False] * 5 + [True] * 2]), grid=grid, learned=learned)
    settings = {"buffer": 4, "num_recent": 2, "num_sinks": 1}
    plan = assert_same_as_cache(head_map, [slots], keys, values, **settings)
    together = retained_tokens(plan, learned.at(0), keys.requires_grad_(True), values, softness=0.7)
    assert sorted(heads for heads, _ in together.parts) == [[0, 1, 2], [3], [4], [5, 6]]
    direction = torch.randn(2, len(slots), length, length)
    (together.at(slice(0, length)) * direction).sum().backward()
    for head, held in enumerate(slots):
        part = replace(plan, is_spatial=(head > 4,), num_slots=(held,), num_recent=(2,))
        states = keys.detach()[:, [head]].requires_grad_(True)
        alone = retained_tokens(part, learned.at((0, [head])), states, values[:, [head]], softness=0.7)
        (alone.at(slice(0, length)) * direction[:, [head]] + 0 * states.sum()).sum().backward()
        torch.testing.assert_close(keys.grad[:, [head]], states.grad)
        assert (states.grad.norm() > 0) == (head < 4 and held < length)


def assert_same_as_cache(head_map, slots, keys, values, **settings):
    """Pretended evictions leave the tokens that a cache of one layer holds at every step; returns the layer's plan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = SSDCache(head_map, slots, **settings)
    (layer,), length = cache.layers, keys.shape[2]
    pretended = retained_tokens(layer.plan, head_map.learned.at(0), keys, values, softness=1.0).at(slice(0, length))
    layer.update(keys[:, :, :1], values[:, :, :1])  # a prompt of one token
    for step in range(length):
        layer._query_missing = False  # nothing attends here
        layer.update(keys[:, :, step : step + 1], values[:, :, step : step + 1])
        for (row, head), held in held_tokens(layer).items():
            assert pretended[row, head, step, : step + 1].nonzero()[:, 0].tolist() == held
    return layer.plan


def test_the_cut_moves_with_the_scores_near_it():
    """Raising what was dropped by a little would keep more of it: the gradient says so, and that others then go."""
    learned = random_score(1, 1, 2, (2, 4)).at(0)
    learned = replace(learned, row=torch.zeros(1, 2, 2), column=torch.zeros(1, 2, 4), key=torch.tensor([[1.0, 0.0]]))
    learned = replace(learned, value=torch.zeros(1, 2))
    cache = SSDCache(HeadMap(torch.tensor([[False]]), grid=(2, 4)), 5, buffer=3, num_recent=0)
    keys = torch.zeros(1, 1, 6, 2)
    keys[..., 0] = torch.tensor([0.3, 0.9, 0.1, 0.8, 0.2, 0.5])
    keys.requires_grad_(True)
    held = retained_tokens(cache.layers[0].plan, learned, keys, torch.zeros(1, 1, 6, 2), softness=1.0).at(slice(0, 6))
    assert held[0, 0, 5].tolist() == [0, 1, 0, 1, 0, 1]
    held[0, 0, 5, 0].backward()
    slope = keys.grad[0, 0, :, 0]
    assert slope[0] > 0 > slope[1:5].max()
    assert slope[5] == 0
    assert slope.sum().abs() < 1e-6  # all scores higher: the same choice


def test_the_gradient_of_a_further_slot_is_what_it_lets_in():
    """One token more, spread over those near the threshold, but none where a head has room for all."""
    torch.manual_seed(0)
    learned = random_score(1, 3, 4, (4, 4))
    head_map = HeadMap(torch.zeros(1, 3, dtype=torch.bool), (4, 4), learned=learned)
    plan = SSDCache(head_map, [[8, 12, 16]], buffer=4).layers[0].plan
    keys, values, extra = torch.randn(1, 3, 16, 4), torch.randn(1, 3, 16, 4), torch.zeros(3, requires_grad=True)
    held = retained_tokens(plan, learned.at(0), keys, values, 1.0, extra).at(slice(15, 16))
    assert held.sum((0, 2, 3)).tolist() == [8, 12, 16]
    held.sum().backward()
    assert 0.3 < extra.grad[0] <= 1
    assert 0.3 < extra.grad[1] <= 1
    assert extra.grad[2] == 0


@pytest.mark.parametrize(
    ("done", "expected"), [(0.4, [[10, 20, 15], [25, 10, 10]]), (0.75, [[10, 15, 15], [25, 10, 15]]), (0.8, None)]
)
def test_slots_move_from_the_lowest_value_to_the_highest(done, expected, monkeypatch):
    monkeypatch.setattr(moving_slots, "MOVING", ((0.4, 3), (0.75, 6)))
    plan = SSDCache(HeadMap(torch.zeros(2, 3, dtype=torch.bool), (5, 5)), 10, buffer=5, num_recent=0).layers[0].plan
    slots = torch.tensor([[10, 15, 15], [20, 15, 15]])
    # the first cannot give, and the last of the first row has the third-highest value
    values = torch.tensor([[-2.0, 0.5, 0.0], [3.0, -1.0, -0.5]])
    moved = move_slots(slots, values, done, plan)
    assert moved.tolist() == (expected or slots.tolist())
    full = torch.where(values == 3, 25, slots)
    assert move_slots(full, values, 0.5, plan).tolist() == [[10, 20, 15], [25, 10, 15]]  # it cannot get more
    assert torch.equal(move_slots(slots, torch.zeros(2, 3), 0.1, plan), slots)


@given(st.lists(st.lists(st.integers(2, 30), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 9))
def test_few_sizes_stay_near_the_slots(numbers, unit):
    slots = unit * torch.tensor(numbers)
    found = limit_sizes(slots, unit)
    assert max(len(set(layer)) for layer in found.tolist()) <= MAX_SIZES
    assert not (found % unit).any()
    assert found.sum() <= slots.sum()
    assert found.min() >= slots.min()
    assert found.max() <= slots.max()
    assert torch.equal(limit_sizes(found, unit), found)
    least = sum(min(map(spread, partitions(sorted(layer)))) for layer in slots.tolist())
    # a mean is rounded by less than a unit, and the squares of what it is off by add to the spread around the mean
    assert least <= (found - slots).square().sum() <= least + unit**2 * slots.numel()


def partitions(numbers):
    """All ways to cut ascending numbers into three parts, as lists of parts."""
    return [[numbers[:a], numbers[a:b], numbers[b:]] for a, b in combinations(range(1, len(numbers)), 2)]


def spread(parts):
    """Sum of the squared distances of all numbers from the mean of their part."""
    return sum(len(part) * statistics.pvariance(part) for part in parts)


def test_layers_of_three_sizes_keep_them():
    slots = torch.tensor([[16, 24, 88, 88], [40, 40, 40, 40]])
    assert torch.equal(limit_sizes(slots, 8), slots)


def test_masked_softmax_credits_what_is_left_out_with_its_weight():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, 7, 7, dtype=torch.float64).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    held = (torch.rand(2, 3, 5, 5) < 0.6).double() * torch.ones(5, 5).tril()
    held.diagonal(dim1=-2, dim2=-1).fill_(1)
    held.requires_grad_(True)
    logits.requires_grad_(True)
    weights = masked_softmax(logits, held)
    cut = logits.detach().clone()
    cut[..., 2:, 2:].masked_fill_(held.detach()[:, :, None] == 0, -torch.inf)
    cut.requires_grad_(True)
    expected = cut.softmax(-1)
    torch.testing.assert_close(weights, expected)
    values = torch.randn(7, 3, dtype=torch.float64)
    (weights @ values).sum().backward()
    (expected @ values).sum().backward()
    torch.testing.assert_close(logits.grad, cut.grad.nan_to_num())
    left_out = (held == 0) & torch.ones(5, 5).tril().bool()
    row, head, query, token = left_out.nonzero()[0].tolist()
    difference = 0.0
    for group in range(2):  # let in alone, the output moves by its new weight
        let_in = cut.detach()[row, head, group, 2 + query].clone()
        let_in[2 + token] = logits[row, head, group, 2 + query, 2 + token]
        before = cut.detach()[row, head, group, 2 + query].softmax(-1)
        difference += ((let_in.softmax(-1) - before) @ values).sum()
    torch.testing.assert_close(held.grad[row, head, query, token], difference)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), guidance_scale=2.0)
    return find_generator(str(checkpoint)).load("float32", "cpu")


def labels(learned=None, grid=GRID) -> HeadMap:
    return HeadMap(torch.tensor([[False, True], [False, False]]), grid, learned=learned)


def divergence(generator, head_map, prompts=PROMPTS, **settings) -> float:
    """KL divergence per token, mean over the images; the cache itself is used."""
    caches = {"one": lambda: SSDCache(head_map, 24, buffer=5)}
    (result,) = measure_fidelity(generator, prompts, caches, **settings).values()
    return result.kl.sum().item() / len(prompts) / head_map.num_visual_tokens


@pytest.mark.parametrize("family", ["janus", "emu3", "llama"])
def test_the_loss_is_the_divergence_of_the_cache_that_the_score_would_serve(family, tmp_path):
    """Of a cache that really evicts, token by token: prompts padded on the left, guidance rows, grouped heads."""
    found = find_generator(str(write_family(family, tmp_path / family)), None if family == "janus" else GRID)
    generator = found.load("float32", "cpu")
    text = found.family.text_config_of(found.config)
    torch.manual_seed(1)
    score = random_score(2, found.num_kv_heads, text.hidden_size // text.num_attention_heads, found.grid)
    head_map, losses = labels(score, found.grid), []
    scale = {} if generator.default_guidance is None else {"guidance_scale": 2.0}
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def record(*args):
            state, loss = step(*args)
            losses.append(loss)
            return state, loss

        patch.setattr(Trainer, "step", record)
        prompts = PROMPTS if family == "janus" else ["a red circle", "a blue square and a red circle"]
        settings = {**SETTINGS, "batch_size": 3, "state_file": tmp_path / "state"}
        learn_score(generator, prompts, head_map, **settings, num_steps=1, **scale)
    expected = divergence(generator, head_map, prompts, **scale)
    assert expected > 1e-4
    assert losses == [pytest.approx(expected, rel=1e-3)]


def test_learning_lowers_the_divergence_and_leaves_the_model_as_it_was(generator):
    before = [parameter.clone() for parameter in generator.model.parameters()]
    start = learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=1, learning_rate=1e-9)
    learned = learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=40, learning_rate=0.05)
    assert divergence(generator, learned) < 0.7 * divergence(generator, start)
    assert all(torch.equal(*pair) for pair in zip(before, generator.model.parameters(), strict=True))
    assert generator.language_model.get_decoder().config._attn_implementation == "ssd"
    assert all(parameter.requires_grad for parameter in generator.model.parameters())
    assert not any(hasattr(module, "ssd_attend") for module in generator.model.modules())
    assert (learned.budget, learned.profile["learning"]["num_steps"]) == (24, 40)
    assert torch.equal(learned.is_spatial, labels().is_spatial)


def test_a_number_scales_the_slots_of_a_fitted_map_and_the_new_map_keeps_them(generator):
    fitted = replace(labels(), budget=[[12, 40], [30, 14]])
    learned = learn_score(generator, PROMPTS, fitted, **SETTINGS | {"budget": 32, "buffer": 2}, num_steps=1)
    assert learned.budget == [[16, 53], [40, 19]]
    assert SSDCache(learned).num_slots == SSDCache(fitted, 32, buffer=2, num_recent=0).num_slots
    assert learn_score(generator, PROMPTS, fitted, **SETTINGS | {"budget": None, "buffer": 2}, num_steps=1).budget == (
        fitted.budget
    )


def test_slots_move_to_the_head_whose_tokens_matter(generator, monkeypatch):
    """The values of the other heads are zero, so the loss does not depend on what they hold."""
    monkeypatch.setattr(trainer, "MOVE_STEPS", 2)
    decoder = generator.language_model.get_decoder()
    first, second = (layer.self_attn.v_proj.weight for layer in decoder.layers)
    others = [first, second[len(second) // 2 :]]
    before = [weight.detach().clone() for weight in others]
    start = replace(labels(), budget=[[31, 19], [14, 16]])
    settings = SETTINGS | {"budget": None, "num_steps": 9, "learn_slots": True}
    try:
        with torch.no_grad():
            for weight in others:
                weight.zero_()
        learned = learn_score(generator, PROMPTS, start, **settings)
        fixed = learn_score(generator, PROMPTS, start, **settings | {"learn_slots": False})
    finally:
        with torch.no_grad():
            for weight, kept in zip(others, before, strict=True):
                weight.copy_(kept)
    assert learned.budget[1][0] == 30  # it began with 15
    assert sum(map(sum, learned.budget)) == sum(map(sum, start.budget)) == 80
    assert min(map(min, learned.budget)) >= 10
    assert (learned.learned.ranks_all, fixed.learned.ranks_all) == (True, False)
    for found in (learned, fixed):
        assert torch.equal(found.is_spatial, start.is_spatial)
    cache = SSDCache(learned, buffer=5)
    assert [list(layer.plan.num_slots) for layer in cache.layers] == learned.budget
    assert not any(any(layer.plan.is_spatial) for layer in cache.layers)
    further = learn_score(generator, PROMPTS, learned, **settings | {"learn_slots": False, "num_steps": 1})
    assert further.learned.ranks_all
    assert further.budget == learned.budget
    losses = [found.profile["learning"]["held_out"]["after"] for found in (learned, fixed)]
    assert losses[0] < losses[1]


def test_a_layer_ends_with_few_sizes(generator, monkeypatch):
    monkeypatch.setattr(moving_slots, "MAX_SIZES", 1)
    start = replace(labels(), budget=[[35, 15], [10, 20]])
    settings = SETTINGS | {"budget": None, "num_steps": 4, "learn_slots": True}
    learned = learn_score(generator, PROMPTS, start, **settings)
    assert learned.budget == [[25, 25], [15, 15]]
    assert learned.profile["learning"]["held_out"]["after"] > 0


def test_the_value_of_a_slot_has_the_sign_of_its_effect(generator):
    """Values of a head against the loss with an eviction interval more of slots, over all heads."""
    recorded = replay_images(generator, PROMPTS, generator.generate(PROMPTS, seed=3), seed=3)
    settings = {"num_steps": 2, "learning_rate": 0.02, "batch_size": 3, "learn_slots": True, "buffer": 5}
    plans = learning.check_learning(labels(), 20, **settings)
    slots = [plan.num_slots for plan in plans]
    trained = Trainer(generator, plans, 2.0, 1.0, 0.02, 2, 3, Processes())
    first = mean_attention(generator, recorded, labels(), 3)
    state = LearningState.beginning(first, slots)
    values = trained.step(state, recorded)[0].tensors["slot_values"]
    effects = torch.full((2, 2), trained.divergences(state, recorded).mean().item())
    for layer, head in product(range(2), range(2)):
        more = torch.tensor(slots)
        more[layer, head] += 5
        state = LearningState.beginning(first, more.tolist())
        effects[layer, head] -= trained.divergences(state, recorded).mean()
    assert effects.argmax() == values.argmax(), (effects, values)
    assert values.flatten()[effects.argmax()] > 0 < effects.max()


def test_an_interrupted_run_goes_on_to_the_same_slots(generator, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(trainer, "MOVE_STEPS", 2)
    settings = SETTINGS | {"num_steps": 7, "learn_slots": True}
    whole = learn_score(generator, PROMPTS, labels(), **settings)
    state, go_on = tmp_path / "state", stop(3)  # between two moves
    with pytest.raises(KeyboardInterrupt):
        learn_score(generator, PROMPTS, labels(), **settings, state_file=state)
    go_on()
    good = read_state(state, FORMAT, WHAT)
    slots, values = good.tensors["slots"], good.tensors["slot_values"]
    assert slots.tolist() != good.settings["slots"]
    assert values.norm() > 0
    uneven = slots + torch.tensor([[1, -1], [0, 0]])
    wrong = [("slots", slots + 5), ("slots", uneven), ("slots", slots.float()), ("slot_values", values * torch.nan)]
    for name, tensor in wrong:
        write_state(state, FORMAT, replace(good, tensors={**good.tensors, name: tensor}), WHAT)
        with pytest.raises(ProfilingError, match="not the state of learning a score"):
            learn_score(generator, PROMPTS, labels(), **settings, state_file=state)
    write_state(state, FORMAT, good, WHAT)
    with pytest.raises(ProfilingError, match="learn_slots True there, False now"):
        learn_score(generator, PROMPTS, labels(), **settings | {"learn_slots": False}, state_file=state)
    assert learn_score(generator, PROMPTS, labels(), **settings, state_file=state) == whole


@pytest.fixture
def stop(monkeypatch):
    """Interrupts learning at the step after `number` steps."""

    def stop(number):
        step = Trainer.step

        def stops(trainer, state, recording):
            if state.num_steps == number:
                raise KeyboardInterrupt
            return step(trainer, state, recording)

        monkeypatch.setattr(Trainer, "step", stops)
        return lambda: monkeypatch.setattr(Trainer, "step", step)

    return stop


def forbid_images(generator, patch):
    """Let the model replay tokens, which needs a cache, and generate no image."""
    generate = type(generator).generate

    def replays(self, prompts, cache=None, **settings):
        assert cache is not None, "an image is generated again"
        return generate(self, prompts, cache, **settings)

    patch.setattr(type(generator), "generate", replays)


def test_an_interrupted_run_goes_on_to_the_same_score(generator, tmp_path, monkeypatch, stop):
    whole = learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=5)
    state, go_on = tmp_path / "state", stop(3)
    with pytest.raises(KeyboardInterrupt):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=5, state_file=state)
    go_on()
    with pytest.raises(ProfilingError, match="learning_rate 0.02 there, 0.03 now"):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=5, learning_rate=0.03, state_file=state)
    with pytest.raises(ProfilingError, match="3 steps were taken, but num_steps=2: give at least 3"):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=2, state_file=state)
    with monkeypatch.context() as patch:
        forbid_images(generator, patch)
        steps, step = [], Trainer.step
        patch.setattr(Trainer, "step", lambda *args: steps.append(1) or step(*args))
        assert learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=5, state_file=state) == whole
        assert len(steps) == 2  # every step before the interruption is kept
    with monkeypatch.context() as patch:  # nothing is left to do
        patch.setattr(type(generator), "generate", None)
        assert learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=5, state_file=state) == whole


@pytest.mark.parametrize("first", [3, 2])
def test_more_steps_extend_a_run_on_the_schedule_of_the_new_total(generator, tmp_path, monkeypatch, stop, first):
    """A finished run of 3 steps, and one of 3 that was interrupted after 2."""
    state, go_on = tmp_path / "state", stop(first)
    if first == 3:
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=3, state_file=state)
    else:
        with pytest.raises(KeyboardInterrupt):
            learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=3, state_file=state)
    go_on()
    rates, follow = [], LearningState.follow
    with monkeypatch.context() as patch:
        forbid_images(generator, patch)
        patch.setattr(LearningState, "follow", lambda *args: rates.append(args[2]) or follow(*args))
        longer = learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=6, state_file=state)
    assert rates == [0.02 * (step + 1) / 10 * (1 - step / 6) ** 0.5 for step in range(first, 6)]
    facts = longer.profile["learning"]
    assert (facts["num_steps"], facts["stages"]) == (6, [[0, 3], [first, 6]])
    assert "stages" not in learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=6).profile["learning"]
    # the state is that of the longer run now
    assert learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=6, state_file=state) == longer


def test_images_are_kept_batch_by_batch(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "BATCHES_AT_ONCE", 1)
    state, calls, generate = tmp_path / "state", [], type(generator).generate

    def stops(self, prompts, cache=None, **settings):
        if cache is None:
            calls.append((len(prompts), settings["seed"]))
            if len(calls) == 2:
                raise KeyboardInterrupt
        return generate(self, prompts, cache, **settings)

    monkeypatch.setattr(type(generator), "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=1, state_file=state)
    learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=1, state_file=state)
    assert calls == [(2, 0), (1, 1), (1, 1), (8, 2)]  # the last are the held-out ones


def test_steps_are_saved_by_the_clock(generator, tmp_path, monkeypatch):
    saved, save = [], LearningRun.save

    def record(run):
        saved.append((run.num_steps, run.after is not None))
        save(run)

    monkeypatch.setattr(LearningRun, "save", record)
    for seconds, expected in ((0, [1, 2, 3]), (3600, [])):
        monkeypatch.setattr(learning, "SAVE_SECONDS", seconds)
        saved.clear()
        state = tmp_path / f"state-{seconds}"
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=3, state_file=state)
        # two batches of images, the first divergence, then steps, the end of the steps, and the last divergence
        assert saved == [*[(0, False)] * 3, *[(number, False) for number in expected], (3, False), (3, True)]


@pytest.mark.parametrize("family", ["janus", "emu3", "llama"])
def test_replayed_images_give_the_same_inputs_bit_for_bit(family, tmp_path):
    found = find_generator(str(write_family(family, tmp_path / family)), None if family == "janus" else GRID)
    generator = found.load("float32", "cpu")
    decoder = generator.language_model.get_decoder()
    prompts = ["a red circle", "a blue square and a red circle"]
    layers, calls = [], []

    def remember(decoder, args, kwargs):
        calls.append({name: value.clone() for name, value in kwargs.items() if isinstance(value, torch.Tensor)})

    handle = decoder.register_forward_pre_hook(remember, with_kwargs=True)
    tokens = generator.generate(prompts, seed=3)
    handle.remove()
    handle = decoder.layers[0].register_forward_hook(lambda *_: layers.append(1))
    again = replay_images(generator, prompts, tokens, seed=3)
    handle.remove()
    assert not layers  # no layer runs
    assert again.inputs.keys() & {"input_ids", "inputs_embeds"}
    for name, tensor in again.inputs.items():
        assert torch.equal(torch.cat([call[name] for call in calls], 1), tensor)
    if (mask := calls[0].get("attention_mask")) is not None and mask.ndim == 2:
        assert torch.equal(again.seen, mask.bool())
    assert torch.equal(again.is_unconditional, generator.is_unconditional(2))
    assert "forward" not in vars(decoder)
    assert not generator.visual_head._forward_hooks
    for wrong in (tokens[:1], tokens.float(), -1 - tokens, tokens + 10**6):
        with pytest.raises(GeneratorError, match="tokens (are|hold)"):
            replay_images(generator, prompts, wrong, seed=3)


def test_held_out_images_are_compared_before_and_after(generator):
    learned = learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=40, learning_rate=0.05)
    facts = learned.profile["learning"]["held_out"]
    assert facts["num_images"] == 8
    start = learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=1, learning_rate=1e-9)
    prompts = [PROMPTS[index * 3 // 8] for index in range(8)]
    # the cache itself; the images are those of the seed after the one training batch, on the same prompts
    for head_map, name in ((start, "before"), (learned, "after")):
        assert divergence(generator, head_map, prompts, seed=1) == pytest.approx(facts[name], rel=1e-3)
    assert facts["after"] - facts["before"] < -2 * facts["standard_error"] < 0


@pytest.mark.parametrize("content", [b"no state", b"", (2).to_bytes(8, "little") + b"{}"])
def test_other_files_are_refused(generator, tmp_path, content):
    state = tmp_path / "state"
    state.write_bytes(content)
    with pytest.raises(ProfilingError, match="not the state of learning a score .* give another file, or delete it"):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=5, state_file=state)
    assert state.read_bytes() == content


def test_states_of_the_first_format_and_damaged_ones_are_refused(generator, tmp_path):
    state = tmp_path / "state"
    learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=1, state_file=state)
    good = read_state(state, FORMAT, WHAT)
    write_state(state, "ssd-cache learning 1", good, WHAT)
    with pytest.raises(ProfilingError, match="it is of another kind or version"):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=1, state_file=state)
    row = good.tensors["score.row"]
    for name, tensor in (("score.row", row[:1] + 1), ("mean.row", row[:1] + 1), ("score.row", row * torch.nan)):
        write_state(state, FORMAT, replace(good, tensors={**good.tensors, name: tensor}), WHAT)
        with pytest.raises(ProfilingError, match="not the state of learning a score"):
            learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=1, state_file=state)


def test_steps_are_adams():
    torch.manual_seed(0)
    start = random_score(1, 2, 3, (2, 2))
    state, ours = LearningState.beginning(start), []
    theirs = {name: tensor.clone().requires_grad_(True) for name, tensor in start.tensors().items()}
    groups = [{"params": [theirs[name]], "lr": 0.03 / (3 if name in ("key", "value") else 1)} for name in theirs]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.98))
    for _ in range(4):
        for tensor in theirs.values():
            tensor.grad = torch.randn_like(tensor)
        state = state.follow({name: tensor.grad for name, tensor in theirs.items()}, 0.03)
        adam.step()
        ours.append(state.score())
    for name, tensor in ours[-1].tensors().items():
        torch.testing.assert_close(tensor, theirs[name].detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"learning_rate": 1.0}, "learning_rate=1.0 is out of range"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"budget": 0.01}, "fewer than"),
        ({"budget": 1.0}, "no head of this map ranks tokens at this budget"),
        ({"temperature": 0.0}, "temperature=0 leaves one token that is certain"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_drawn(generator, monkeypatch, settings, message):
    monkeypatch.setattr(type(generator), "generate", None)
    with pytest.raises(ValueError, match=message):
        learn_score(generator, PROMPTS, labels(), **SETTINGS | settings)


def test_budgets_too_small_for_moving_slots_are_refused(generator, monkeypatch):
    monkeypatch.setattr(type(generator), "generate", None)
    too_small = "learn_slots=True: the budget gives a head 9.0 slots on average, and each keeps at least 10, .*buffer=5"
    with pytest.raises(ValueError, match=too_small):
        learn_score(generator, PROMPTS, labels(), **SETTINGS | {"budget": 9}, learn_slots=True)
    with pytest.raises(ValueError, match="keeps at least 15"):
        learn_score(generator, PROMPTS, labels(), **SETTINGS | {"budget": 12}, learn_slots=True, num_sinks=2)
    with pytest.raises(ValueError, match="num_recent=0.25 is out of range: give an int"):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, learn_slots=True, num_recent=0.25)
    previews = HeadMap(torch.zeros(2, 2, dtype=torch.bool), GRID, previews=[(4, 4)])
    with pytest.raises(ValueError, match="this head map has draft grids"):
        learning.check_learning(previews, 24, num_steps=1, learning_rate=0.02, batch_size=1, learn_slots=True)


def test_maps_that_nothing_can_be_learned_for_are_refused(generator):
    online = HeadMap.online(num_layers=2, num_kv_heads=2, grid=GRID)
    with pytest.raises(ValueError, match="this head map has no labels"):
        learn_score(generator, PROMPTS, online, **SETTINGS)
    with pytest.raises(HeadMapError, match="use the map that was made for this model"):
        learn_score(generator, PROMPTS, HeadMap.uniform("semantic", num_layers=3, num_kv_heads=2, grid=GRID))
    with pytest.raises(GeneratorError, match="give at least one prompt"):
        learn_score(generator, [], labels(), **SETTINGS)


def test_a_place_without_room_for_the_state_is_refused_before_anything_is_drawn(generator, monkeypatch):
    monkeypatch.setattr(type(generator), "generate", None)
    with pytest.raises(ProfilingError, match="the state of this run cannot be written"):
        learn_score(generator, PROMPTS, labels(), **SETTINGS, state_file="/dev/null/state")


def test_a_map_carries_its_score_through_files_and_names_itself_by_it(tmp_path):
    torch.manual_seed(0)
    learned = labels(random_score(2, 2, 3, GRID))
    read = HeadMap.from_pretrained(learned.save_pretrained(tmp_path / "map"))
    assert read == learned
    assert read.digest == learned.digest != labels().digest
    assert "learned score" in repr(read)
    for name, tensor in learned.learned.tensors().items():
        assert torch.equal(getattr(read.learned, name), tensor)
    assert read != labels(random_score(2, 2, 3, GRID))
    assert read != labels()
    assert SSDCache(read, 24, buffer=5).score == "learned"
    assert SSDCache(read, 24, buffer=5).num_recent == 0
    assert SSDCache(read, 24, buffer=5, score="sum").num_recent == 0.25
    assert (~read).learned is None
    assert read.with_grid((4, 4)).learned is None
    assert read.with_grid(GRID) is read


def test_a_score_of_all_heads_is_kept_in_files_and_leaves_no_windows(tmp_path):
    torch.manual_seed(0)
    score = random_score(2, 2, 3, GRID)
    some, every = labels(score), labels(replace(score, ranks_all=True))
    read = HeadMap.from_pretrained(every.save_pretrained(tmp_path / "every"))
    assert read == every != some
    assert read.digest == every.digest != some.digest
    assert torch.equal(read.is_spatial, some.is_spatial)
    for score, is_window in (("learned", torch.zeros(2, 2, dtype=torch.bool)), ("sum", some.is_spatial)):
        cache = SSDCache(read, {"spatial": 24, "semantic": 32}, buffer=5, score=score)
        assert torch.equal(read.window_heads(score), is_window)
        assert [list(layer.plan.is_spatial) for layer in cache.layers] == is_window.tolist()
        held = [[24 if label else 32 for label in layer] for layer in some.is_spatial.tolist()]
        assert [list(layer) for layer in cache.num_slots] == held
    config = json.loads((some.save_pretrained(tmp_path / "some") / "config.json").read_text())
    assert "learned_ranks_all" not in config
    with pytest.raises(HeadMapError, match="ranks_all='yes' of the learned score is neither true nor false"):
        labels(replace(random_score(2, 2, 3, GRID), ranks_all="yes"))


def test_each_process_of_a_split_model_takes_the_score_of_its_heads():
    torch.manual_seed(0)
    whole = labels(random_score(2, 2, 3, GRID))
    for index in range(2):
        part = SSDCache(whole, 24, buffer=5, shard=(index, 2)).layers[1].plan.scorer.learned
        assert all(
            torch.equal(tensor[0], getattr(whole.learned, name)[1, index]) for name, tensor in part.tensors().items()
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": torch.zeros(2, 2, SIDE, SIDE + 1)}, r"row of the learned score is torch.float32 \[2, 2, 8, 9\]"),
        ({"column": torch.zeros(2, 2, SIDE)}, "column of the learned score"),
        ({"key": torch.zeros(2, 3, 4)}, r"must be a float tensor of shape \[2, 2, head_dim\]"),
        ({"value": torch.zeros(2, 2, 0)}, "value of the learned score"),
        ({"key": torch.zeros(2, 2, 4, dtype=torch.int64)}, "torch.int64"),
        ({"key": torch.full((2, 2, 4), torch.nan)}, "NaN or infinite"),
    ],
)
def test_scores_that_do_not_fit_the_map_are_refused(change, message):
    score = LearnedScore(**random_score(2, 2, 4, GRID).tensors() | change)
    with pytest.raises(HeadMapError, match=message):
        labels(score)


def test_a_map_with_previews_or_a_score_of_another_kind_is_refused():
    with pytest.raises(HeadMapError, match="single grid"):
        HeadMap(torch.tensor([[False]]), GRID, previews=[(2, 2)], learned=random_score(1, 1, 4, GRID))
    with pytest.raises(HeadMapError, match="give a LearnedScore"):
        HeadMap(torch.tensor([[False]]), GRID, learned=torch.zeros(3))


def test_the_command_writes_a_map_that_a_cache_takes(generator, tmp_path):
    source = labels().save_pretrained(tmp_path / "labels")
    arguments = [
        "--model",
        generator.checkpoint.source,
        "--head-map",
        str(source),
        "--buffer",
        "5",
        "--batch-size",
        "2",
    ]
    output = tmp_path / "learned"
    command = ["learn", *PROMPTS, *arguments, "--budget", "24", "--steps", "2", "-o", str(output)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "learned score" in result.output
    written = HeadMap.from_pretrained(output)
    assert written == learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=2)
    result = CliRunner().invoke(app, [*command, "--slots"])
    assert result.exit_code == 0, result.output
    written = HeadMap.from_pretrained(output)
    assert written == learn_score(generator, PROMPTS, labels(), **SETTINGS, num_steps=2, learn_slots=True)
    assert (written.budget, written.learned.ranks_all) == ([[25, 25], [25, 20]], True)
    result = CliRunner().invoke(app, ["learn", *PROMPTS, *arguments, "--budget", "9", "--slots"])
    assert result.exit_code == 2
    assert "each keeps at least 10" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["learn", *PROMPTS, *arguments, "--rate", "3"])
    assert result.exit_code == 2
    assert "learning_rate=3.0" in result.output
