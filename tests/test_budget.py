"""From one number to the slots of every head: on maps that carry slots of their own, scaled, and on request equal."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers.models import left_padded_prompts, random_score, tiny_janus
from hypothesis import given
from hypothesis import strategies as st

from ssd_cache import HeadMap, SSDCache, enable, fit_heads
from ssd_cache._compat import CACHE
from ssd_cache.budget import least_slots, resolve_recent, scale_slots
from ssd_cache.cache.settings import equal_budget
from ssd_cache.models import find_head_map

GRID = (6, 6)
LABELS = torch.tensor([[True, False], [False, True]])
OWN = [(10, 26), (18, 10)]
"""64 slots of 4 heads: 16 a head."""

FITTED = HeadMap(LABELS, GRID, budget=[list(layer) for layer in OWN])


def total(slots):
    return sum(map(sum, slots))


def slots_of(head_map, *args, buffer=2, num_recent=0, **settings):
    return SSDCache(head_map, *args, buffer=buffer, num_recent=num_recent, **settings).num_slots


# --- one number on a map that carries slots


@pytest.mark.parametrize("budget", [None, 16, 16 / 36])
def test_the_number_that_a_map_was_fitted_to_gives_its_own_slots(budget):
    assert slots_of(FITTED, budget) == OWN


@pytest.mark.parametrize("budget", [8, 11, 0.4, 0.5, 24, 0.9])
def test_another_number_changes_the_slots_to_an_exact_total(budget):
    slots = slots_of(FITTED, budget)
    mean = round(budget * 36) if isinstance(budget, float) else budget
    assert total(slots) == 4 * mean
    assert slots[0][1] >= slots[1][0] >= slots[0][0]  # in the order of the map
    assert max(map(max, slots)) <= 36


def test_fewer_slots_are_taken_from_the_largest_heads():
    assert slots_of(FITTED, 14) == [(10, 18), (18, 10)]
    assert slots_of(FITTED, 12) == [(10, 14), (14, 10)]
    assert slots_of(FITTED, 11) == [(10, 12), (12, 10)]
    assert slots_of(FITTED, 8) == [(8, 8), (8, 8)]


def test_more_slots_are_shared_in_proportion():
    assert slots_of(FITTED, 20) == [(13, 33), (22, 12)]
    assert slots_of(FITTED, 24) == [(16, 36), (28, 16)]  # no head gets more than the grid has


def test_a_full_budget_gives_every_head_the_whole_grid():
    assert slots_of(FITTED, 1.0) == [(36, 36), (36, 36)]


def test_each_head_keeps_room_for_what_it_must_keep():
    # a spatial head must hold buffer + sinks = 7, a semantic one three recents more
    assert slots_of(FITTED, 9, buffer=6, num_recent=3, num_sinks=1) == [(8, 10), (10, 8)]
    with pytest.raises(ValueError, match="fewer than buffer=6"):
        slots_of(FITTED, 7, buffer=6, num_recent=3, num_sinks=1)


def test_equal_slots_are_asked_for_by_name():
    assert slots_of(FITTED, 0.25, slots="uniform") == [(9, 9), (9, 9)]
    assert slots_of(FITTED, slots="uniform") == [(16, 16), (16, 16)]
    assert slots_of(FITTED, 8, slots="fitted") == slots_of(FITTED, 8)
    plain = HeadMap(LABELS, GRID)
    assert slots_of(plain, 8) == slots_of(plain, 8, slots="uniform") == [(8, 8), (8, 8)]
    assert [SSDCache(FITTED, 8, buffer=2, num_recent=0, slots=name).slots for name in (None, "uniform")] == [
        "fitted",
        "uniform",
    ]


def test_a_dict_and_a_list_are_taken_as_they_are():
    kinds = {"spatial": 8, "semantic": 20}
    assert slots_of(FITTED, kinds) == [(8, 20), (20, 8)]
    assert slots_of(FITTED, [[9, 10], 11]) == [(9, 10), (11, 11)]
    assert SSDCache(FITTED, kinds, buffer=2).slots == "given"


@pytest.mark.parametrize(
    ("head_map", "settings", "message"),
    [
        (HeadMap(LABELS, GRID), {"slots": "fitted"}, "carries no slots; fit_heads or `ssd-cache fit` makes a map"),
        (FITTED, {"slots": "unifrom"}, "slots='unifrom' is unknown: did you mean 'uniform'"),
        (FITTED, {"slots": "uniform", "budget": {"spatial": 8, "semantic": 20}}, "leave slots out"),
        (FITTED, {"budget": 1.5}, "budget=1.5 is out of range"),
        (FITTED, {"budget": float("nan")}, "budget=nan is out of range"),
        (FITTED, {"budget": "0.2"}, "budget='0.2' is out of range"),
        (FITTED, {"budget": True}, "budget=True is out of range"),
    ],
)
def test_what_can_not_be_shared_out_is_refused(head_map, settings, message):
    with pytest.raises(ValueError, match=message):
        SSDCache(head_map, buffer=2, **settings)


@given(st.data())
def test_scaled_slots_add_up_and_stay_in_their_bounds_and_in_order(data):
    cells = 60
    own = data.draw(st.lists(st.lists(st.integers(1, cells), min_size=2, max_size=2), min_size=1, max_size=5))
    least = [[data.draw(st.integers(1, 20)) for _ in layer] for layer in own]
    mean = data.draw(st.integers(1, 70))
    scaled, number = scale_slots(own, mean, least, cells), 2 * len(own)
    wanted = total(own) if abs(mean * number - total(own)) * 2 <= number else min(mean, cells) * number
    assert total(scaled) == wanted
    assert all(1 <= number <= cells for layer in scaled for number in layer)
    heads = [head for layers in zip(own, scaled, least, strict=True) for head in zip(*layers, strict=True)]
    if total(least) <= wanted:
        assert all(number >= bound for _, number, bound in heads)
    inside = sorted((before, number) for before, number, bound in heads if bound < number < cells)
    for (one, first), (other, second) in pairwise(inside):
        if wanted > total(own):  # in proportion, to one slot of rounding
            assert first * other <= second * one + max(one, other)
        else:  # as it was, or cut to a common limit, to one slot of rounding
            assert first == one or abs(first - max(number for _, number in inside)) <= 1
            assert second <= other


@given(st.integers(1, 30), st.one_of(st.integers(0, 30), st.floats(0, 0.99)), st.integers(0, 5), st.booleans())
def test_the_fewest_slots_hold_what_must_be_kept(buffer, num_recent, num_sinks, is_spatial):
    slots = least_slots(is_spatial, buffer, num_recent, num_sinks, 5000)

    def holds(number):
        return number >= buffer + num_sinks + (0 if is_spatial else resolve_recent(num_recent, number))

    assert holds(slots)
    assert not holds(slots - 1)


# --- the bundled map, and everything that passes a budget on


def test_a_fifth_of_the_bundled_map_is_the_map_as_it_was_fitted():
    head_map = find_head_map("shapes-janus")
    own = [tuple(layer) for layer in head_map.budget]
    assert head_map.slots == own
    assert SSDCache(head_map, 0.2).num_slots == SSDCache(head_map).num_slots == own
    assert fit_heads(head_map, 0.2).slots == own  # so the policy `fitted` at 20% is the map too
    assert equal_budget(head_map) == 115
    half = SSDCache(head_map, 0.5)
    assert total(half.num_slots) == 288 * 36
    assert len({number for layer in half.num_slots for number in layer}) > 5


def generate_image(model, **cache):
    torch.manual_seed(0)
    inputs = left_padded_prompts((5, 9, 3))
    return model.generate(**inputs, generation_mode="image", **cache, do_sample=True, guidance_scale=3.0)


def test_enable_passes_a_number_and_slots_on():
    model = tiny_janus(grid_side=6)
    own = generate_image(model, **{CACHE: SSDCache(FITTED, buffer=2, num_recent=0)})
    equal = generate_image(model, **{CACHE: SSDCache(FITTED, 16, slots="uniform", buffer=2, num_recent=0)})
    assert not torch.equal(own, equal), "both generate the same, so this tests nothing"
    for settings, expected in (({}, own), ({"slots": "uniform"}, equal)):
        with enable(model, FITTED, budget=16 / 36, buffer=2, num_recent=0, **settings):
            assert torch.equal(generate_image(model), expected)


def test_a_shard_holds_its_part_of_the_slots_of_the_whole_map():
    whole = slots_of(FITTED, 10)
    parts = [slots_of(FITTED, 10, shard=(index, 2)) for index in range(2)]
    assert [one + other for one, other in zip(*parts, strict=True)] == whole


def test_another_grid_scales_the_slots_with_its_cells():
    larger = FITTED.with_grid((12, 12))
    assert larger.slots == [(40, 104), (72, 40)]
    smaller = FITTED.with_grid((6, 3))
    assert smaller.slots == [(5, 13), (9, 5)]
    assert FITTED.with_grid((6, 6), [(6, 6)]).slots == [(20, 52), (36, 20)]
    shares = HeadMap(LABELS, GRID, budget=[{"spatial": 0.25, "semantic": 18}, 0.5]).with_grid((12, 12))
    assert shares.budget == [{"spatial": 0.25, "semantic": 72}, 0.5]


def test_an_inverted_map_keeps_its_slots():
    assert (~FITTED).slots == OWN
    assert ~~FITTED == FITTED


# --- policies by name


def test_policies_by_name_share_the_same_number_each_in_its_way():
    learned = HeadMap(LABELS, GRID, budget=FITTED.budget, learned=random_score(2, 2, 16, GRID))

    def cache_of(policy, *args, **settings):
        return SSDCache.from_policy(policy, learned, *args, buffer=2, **settings)

    for budget in (None, 16):
        assert cache_of("learned", budget).num_slots == OWN
        for policy in ("ssd", "margin", "h2o", "streaming-llm"):
            assert cache_of(policy, budget).num_slots == [(16, 16), (16, 16)]
    fitted = cache_of("ssd", 16, slots="fitted", num_recent=0)
    assert (fitted.num_slots, fitted.score) == (OWN, "sum")
    assert cache_of("learned", 16, slots="uniform").num_slots == [(16, 16), (16, 16)]
    assert cache_of("ssd", {"spatial": 9, "semantic": 12}).num_slots == [(9, 12), (12, 9)]
    assert cache_of("full").num_slots == [(36, 36), (36, 36)]
