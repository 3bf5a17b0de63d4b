"""SSDCache and the attention "ssd" against the plain loops of reference.py: same tokens kept, same outputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.plain_loops import chooses_by_score, held_tokens, runs, same_as_plain_loops, step_reference, step_through
from helpers.reference import ReferenceHead
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_cache import HeadMap, SSDCache
from ssd_cache.cache.eviction import compact, select_victims
from ssd_cache.cache.scorers import SCORES, attention_weights, make_scorer
from ssd_cache.head_map.learned_score import LearnedScore

MODULE = SimpleNamespace(num_key_value_groups=1, is_causal=True)


@given(runs(), st.booleans())
def test_same_tokens_and_outputs_as_plain_loops(run, is_counted):
    same_as_plain_loops(run, is_counted)


def test_most_runs_choose_by_score_and_by_every_score():
    scores = []  # of the runs that choose by them; None for the others

    @settings(max_examples=300, derandomize=True)
    @given(runs())
    def collect(run):
        scores.append(run["score"] if chooses_by_score(run) else None)

    collect()
    assert scores.count(None) <= len(scores) / 2
    assert set(scores) >= set(SCORES)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        # semantic: buffer, num_recent, num_sinks, score
        ("linear", (5, 5, 4, "last")),
        ("h2o", (5, 10, 0, "sum")),
        ("margin", (5, 5, 0, "margin")),
        ("online", (1, 9, 0, "leverage")),
    ],
)
def test_policies_are_the_reference_with_their_settings(policy, settings):
    buffer, num_recent, num_sinks, score = settings
    grid, cells, slots, num_prompt = (6, 5), 30, 21, 3
    queries, keys, values = (torch.randn(2, 2, num_prompt + cells, 4) for _ in range(3))
    head_map = HeadMap.uniform("semantic", num_layers=1, num_kv_heads=2, grid=grid)
    cache = SSDCache.from_policy(policy, head_map, 0.7)
    reference = {
        (row, head): ReferenceHead("semantic", slots, cells, buffer, num_recent, num_sinks, score, grid[1])
        for row in range(2)
        for head in range(2)
    }
    for step, _ in step_through(cache, queries, keys, values, num_prompt, None):
        step_reference(reference, queries, keys, values, num_prompt, step, None)
        assert held_tokens(cache.layers[0]) == {place: sorted(slow.kept) for place, slow in reference.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [{"spatial": 9, "semantic": 9}, {"spatial": 10, "semantic": 12}])
def test_low_precision_outputs_over_the_kept_set(dtype, slots):
    batch, kv_heads, groups, dim, num_prompt = 2, 3, 2, 16, 3
    grid, total = (6, 5), 3 + 30
    queries = torch.randn(batch, kv_heads * groups, total, dim).to(dtype)
    keys, values = (torch.randn(batch, kv_heads, total, dim).to(dtype) for _ in range(2))
    head_map = HeadMap(torch.tensor([[True, False, True]]), grid=grid)
    cache = SSDCache(head_map, slots, buffer=3, num_recent=2)
    errors, torch_errors = [0.0], [0.0]
    for step, output in step_through(cache, queries, keys, values, num_prompt, None):
        assert output.dtype == dtype
        for (row, head), tokens in held_tokens(cache.layers[0]).items():
            columns = [*range(num_prompt), *(num_prompt + token for token in tokens)]
            mine = slice(head * groups, (head + 1) * groups)
            query = queries[row, mine, num_prompt + step][:, None]
            kept = keys[row, [head] * groups][:, columns], values[row, [head] * groups][:, columns]
            exact = F.scaled_dot_product_attention(query.double(), *(part.double() for part in kept))
            plain = F.scaled_dot_product_attention(query, *kept)
            errors.append(float((output[row, mine].double() - exact[:, 0]).abs().max()))
            torch_errors.append(float((plain.double() - exact).abs().max()))
    assert max(errors) <= 2 * max(torch_errors)
    assert all(len(tokens) <= 12 for tokens in held_tokens(cache.layers[0]).values())


def test_half_precision_products_do_not_overflow_where_the_attention_does_not():
    signs = torch.tensor([1.0, -1.0, 1.0])[None, None, :, None].expand(1, 1, 3, 16)
    queries, keys = (64 * signs[:, :, None, 1:]).half(), (80 * signs).half()  # products of 81,920, a quarter scaled
    weights = attention_weights(queries, keys, 0.25, num_prompt=1, num_first=1)
    torch.testing.assert_close(weights[0, 0, 0], torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]))


def test_victims_of_equal_score_go_oldest_first():
    positions = torch.tensor([[[7, 2, 5, 3], [4, 5, 6, 7]]], dtype=torch.int32)
    scores = torch.tensor([[[1.0, 1.0, 1.0, 0.5]]])
    # semantic head: token 3 has the lowest score, then token 2 is the oldest of three equals; spatial: tokens 4 and 5
    assert select_victims(positions, scores, num_evict=2, num_seen=8).tolist() == [[[1, 3], [0, 1]]]


def test_sinks_are_spared_by_score_too():
    positions = torch.tensor([[[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]])
    scores = torch.tensor([[[0.1, 0.2, 0.9, 0.5, 0.3]]])
    victims = select_victims(positions, scores, num_evict=2, num_seen=5, num_recent=1, num_sinks=1)
    assert victims.tolist() == [[[1, 3], [1, 2]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_learned_score_takes_values_of_another_size_than_keys(dtype):
    keys, values = torch.randn(2, 3, 5, 8).to(dtype), torch.randn(2, 3, 5, 6).to(dtype)
    learned = LearnedScore(torch.randn(3, 8), torch.randn(3, 6), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))
    worth = learned.of_states(keys, values)
    assert worth.dtype == torch.float32
    for row, head, token in torch.cartesian_prod(*map(torch.arange, worth.shape)).tolist():
        expected = keys[row, head, token].double() @ learned.key[head].double()
        expected += values[row, head, token].double() @ learned.value[head].double()
        assert worth[row, head, token].item() == pytest.approx(expected.item(), abs=1e-5)


def test_scores_in_numbers():
    attention = torch.tensor([[[1.4, 0.5, 0.4, 0.2]]])  # the table of docs/concepts.md
    positions = torch.tensor([[[0, 1, 2, 3]]])
    keys = torch.tensor([[[[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [1.0, 0.0]]]])  # their mean is (1, 1)
    formed = {
        name: make_scorer(name, 3, None).rank(attention, positions, 4, states=lambda: (keys, None))[0, 0].tolist()
        for name in SCORES
        if name != "learned"
    }
    assert formed["sum"] == formed["last"] == pytest.approx([1.4, 0.5, 0.4, 0.2])
    assert formed["mean"] == pytest.approx([0.35, 0.5 / 3, 0.2, 0.2])
    assert formed["margin"] == [1, 0, 1, 1]
    # the matrix is [[1.725, -1], [-1, 3.225]]: the covariance [[1.5, -1], [-1, 3]], and a tenth of its mean diagonal
    assert formed["leverage"] == pytest.approx([2.3284, 2.7941, 1.5231, 0.3780], rel=1e-4)


@given(st.integers(1, 9), st.data())
def test_compact_keeps_survivors_and_moves_few_rows(num_slots, data):
    num_evict = data.draw(st.integers(1, num_slots))
    victims = torch.tensor(
        [[sorted(data.draw(st.permutations(range(num_slots)))[:num_evict]) for _ in range(2)]], dtype=torch.long
    )
    before = torch.arange(num_slots).repeat(1, 2, 1)
    slots, rows = before.clone(), before[..., None].expand(-1, -1, -1, 3).clone()
    compact([slots, rows], victims)
    left = num_slots - num_evict
    for head in range(2):
        survivors = set(range(num_slots)) - set(victims[0, head].tolist())
        assert set(slots[0, head, :left].tolist()) == survivors
        assert (rows[0, head, :left] == slots[0, head, :left, None]).all()
        moved = (slots[0, head, :left] != before[0, head, :left]).sum()
        assert moved <= num_evict
