"""Allocation of slots to heads: against brute force on small cases, and what `SSDCache` makes of the result."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssd_cache import HeadMap, SSDCache
from ssd_cache.profiling.allocation import best_choices, fit_heads

KINDS = ("spatial", "semantic")
GRID = (10, 10)
SETTINGS = {"buffer": 5, "num_recent": 0.25}


def made_up_map(labels, levels, seed=0):
    """A map whose heads retain more, the more slots they have, each in its own way."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for kind in KINDS:
        steps = torch.rand(len(levels), *labels.shape, generator=generator)
        kept = steps.cumsum(0) / (steps.sum(0) + torch.rand(labels.shape, generator=generator))
        scores |= {f"retained_{kind}-{slots}": kept[index] for index, slots in enumerate(levels)}
    return HeadMap(labels, GRID, scores=scores)


@given(st.data())
def test_best_choices_are_those_of_brute_force(data):
    groups = data.draw(st.integers(1, 4))
    costs = np.array(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    row = st.lists(st.integers(0, 20), min_size=len(costs), max_size=len(costs))
    values = np.array(data.draw(st.lists(row, min_size=groups, max_size=groups)), dtype=float)
    capacity = data.draw(st.integers(groups * int(costs.min()), 40))
    picks = best_choices(costs, values, capacity)
    assert costs[picks].sum() <= capacity
    best = max(
        sum(v[p] for v, p in zip(values, choice, strict=True))
        for choice in itertools.product(range(len(costs)), repeat=groups)
        if costs[list(choice)].sum() <= capacity
    )
    assert sum(v[p] for v, p in zip(values, picks, strict=True)) == best


@given(st.integers(0, 1000), st.floats(0.15, 1.0), st.sampled_from([None, 1, 3, 7]))
def test_the_total_is_never_above_the_uniform_one_and_the_cache_takes_it(seed, budget, step):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(3, 4, generator=generator) < torch.rand(3, 1, generator=generator)
    levels = sorted({15, *(15 + torch.randperm(86, generator=generator)[:3]).tolist()})
    head_map = made_up_map(labels, levels, seed)
    if len(levels) < 2:
        return
    fitted = fit_heads(head_map, budget, step=step)
    assert sum(map(sum, fitted.slots)) <= round(budget * 100) * 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few slots make short windows
        SSDCache(fitted, **SETTINGS)


def losses(head_map, choice):
    """What each head loses of its attention at its own slots, by the kind that loses less."""
    share = {slots: (99 - slots) / 99 for slots in set(choice)}
    kept = {
        kind: [head_map.scores[f"retained_{kind}-{slots}"].flatten()[head].item() for head, slots in enumerate(choice)]
        for kind in KINDS
    }
    return [share[slots] * (1 - max(pair)) for slots, *pair in zip(choice, *kept.values(), strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_heads_are_fitted_as_well_as_any_choice_of_levels_and_kinds_does(seed):
    levels = (15, 20, 25)
    head_map = made_up_map(torch.zeros(2, 3, dtype=torch.bool), levels, seed)
    fitted = fit_heads(head_map, 20)
    slots = [held for layer in fitted.budget for held in layer]
    assert sum(slots) <= 6 * 20
    squares = {
        choice: sum(loss**2 for loss in losses(head_map, choice))
        for choice in itertools.product(levels, repeat=6)
        if sum(choice) <= 6 * 20
    }
    assert squares[tuple(slots)] == pytest.approx(min(squares.values()), abs=1e-9)
    assert squares[tuple(slots)] < squares[(20,) * 6]
    for is_spatial, held, head in zip(fitted.is_spatial.flatten().tolist(), slots, range(6), strict=True):
        kept = {kind: head_map.scores[f"retained_{kind}-{held}"].flatten()[head] for kind in KINDS}
        assert is_spatial == (kept["spatial"] > kept["semantic"])  # the kind that loses less


def test_a_fitted_map_is_saved_and_its_slots_are_what_the_cache_holds(tmp_path):
    fitted = fit_heads(made_up_map(torch.zeros(2, 3, dtype=torch.bool), (15, 20, 25)), 20)
    loaded = HeadMap.from_pretrained(fitted.save_pretrained(tmp_path))
    assert loaded == fitted
    assert loaded.budget == fitted.budget
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few slots make short windows
        cache = SSDCache(loaded, **SETTINGS)
    for num_tokens in [4] + [1] * 60:
        for layer in range(2):
            states = torch.randn(1, 3, num_tokens, 8)
            keys, values = cache.update(states, states, layer)
            if num_tokens == 1:  # as the attention "ssd" does
                keys.ssd_layer.attend(torch.randn(1, 3, 1, 8), keys, values, 1.0, 0.0)
            else:
                keys.ssd_layer.see_prompt(states, None, 1.0, None)
    assert cache.nbytes == sum(2 * (4 + slots) * 8 * 4 for layer in fitted.budget for slots in layer)
    assert [list(layer.plan.num_slots) for layer in cache.layers] == fitted.budget


def test_a_budget_for_every_head_is_checked():
    head_map = HeadMap(torch.tensor([[True, False], [False, True]]), GRID)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = SSDCache(head_map, [[20, 0.4], {"spatial": 20, "semantic": 30}], buffer=4)
    assert [layer.plan.num_slots for layer in cache.layers] == [(20, 40), (30, 20)]
    with pytest.raises(ValueError, match=r"budget\[1\] has 1 entries, but the layer has 2 KV heads: give one a head"):
        SSDCache(head_map, [[20, 20], [20]], buffer=4)
    with pytest.raises(ValueError, match=r"budget\[0\]\[1\]=0 is out of range"):
        SSDCache(head_map, [[20, 0], 20], buffer=4)


def test_steps_between_levels_are_worth_what_lies_between():
    # both heads gain alike between the levels: steps of 1 use up the total
    scores = {"retained_spatial-20": [[0.5, 0.5]], "retained_semantic-20": [[0.5, 0.5]]}
    scores |= {"retained_spatial-40": [[0.5, 0.5]], "retained_semantic-40": [[0.9, 0.9]]}
    head_map = HeadMap(
        torch.tensor([[True, False]]), GRID, scores={name: torch.tensor(score) for name, score in scores.items()}
    )
    assert fit_heads(head_map, 25).budget == [[20, 20]]
    assert fit_heads(head_map, 25, step=1).budget == [[25, 25]]


def test_what_can_not_be_shared_out_is_refused_with_the_remedy():
    labels = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="at the levels .20., and choosing slots needs at least two: profile again"):
        fit_heads(made_up_map(labels, (20,)), 20)
    with pytest.raises(ValueError, match=r"at the levels \[\], and"):
        fit_heads(HeadMap(labels, GRID), 20)
    with pytest.raises(ValueError, match="fewer than the lowest level, 20"):
        fit_heads(made_up_map(labels, (20, 40)), 19)
    with pytest.raises(ValueError, match="step=0 is out of range"):
        fit_heads(made_up_map(labels, (20, 40)), 20, step=0)
    with pytest.raises(ValueError, match="give a coarser step, or none"):
        best_choices(np.array([1, 2]), np.zeros((2000, 2)), 1_000_000)
