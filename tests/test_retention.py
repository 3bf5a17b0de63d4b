"""SSDCache and the attention "ssd" against the plain loops of reference.py: same tokens kept, same outputs."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import AmbiguousError, ReferenceHead, online_kind

from ssd_cache import HeadMap, SSDCache
from ssd_cache.attention import ssd_attention_forward
from ssd_cache.retention import attention_weights, compact, select_victims

MODULE = SimpleNamespace(num_key_value_groups=1, is_causal=True)


def held_tokens(layer) -> dict[tuple[int, int], list[int]]:
    """(row, KV head) -> visual tokens stored, sorted, read from the stores of a layer."""
    held = {}
    for store, heads in zip(layer.stores, layer.head_indices, strict=True):
        positions = store.positions[:, :, : store.num_stored]
        for row in range(positions.shape[0]):
            for place, head in enumerate(heads):
                held[row, head] = sorted(positions[row, place].tolist())
    return held


def step_through(cache, queries, keys, values, num_prompt, seen):
    """Feed one layer the way a model does; yields (step, output `[batch, heads, head_dim]`) for the visual tokens."""
    module = SimpleNamespace(num_key_value_groups=queries.shape[1] // keys.shape[1], is_causal=True)
    total, start = keys.shape[2], 0
    for end in [num_prompt, *range(num_prompt + 1, total + 1)]:
        new = slice(start, end)
        kv_length, _ = cache.get_mask_sizes(end - start, 0)
        key_states, value_states = cache.update(keys[:, :, new], values[:, :, new], 0)
        mask = None
        if start == 0 and seen is not None:
            causal = torch.ones(end, end, dtype=torch.bool).tril()
            mask = (causal & seen[:, None, :]).unsqueeze(1)
        if isinstance(key_states, torch.Tensor):
            assert key_states.shape[2] == kv_length, "get_mask_sizes must announce what update returns"
        output, weights = ssd_attention_forward(module, queries[:, :, new], key_states, value_states, mask)
        assert weights is None
        if start >= num_prompt:
            yield start - num_prompt, output[:, 0]
        start = end
    assert cache.get_seq_length() == total


@st.composite
def runs(draw):
    grid = (draw(st.integers(2, 5)), draw(st.integers(2, 5)))
    cells = grid[0] * grid[1]
    buffer = draw(st.integers(1, 6))
    num_recent, num_sinks = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    least = buffer + max(num_recent, num_sinks)
    slots = {kind: draw(st.integers(min(least, cells), cells)) for kind in ("spatial", "semantic")}
    if draw(st.booleans()):
        slots["semantic"] = slots["spatial"]
    kv_heads = draw(st.integers(1, 4))
    return {
        "grid": grid,
        "buffer": buffer,
        "num_recent": num_recent,
        "num_sinks": num_sinks,
        "slots": slots,
        "is_spatial": draw(st.lists(st.booleans(), min_size=kv_heads, max_size=kv_heads)),
        "groups": draw(st.integers(1, 3)),
        "batch": draw(st.integers(1, 3)),
        "num_prompt": draw(st.integers(1, 4)),
        "num_visual": draw(st.integers(1, cells + 3)),
        "padded": draw(st.booleans()),
        "sharpness": draw(st.sampled_from([0.3, 1.0, 3.0])),
        "seed": draw(st.integers(0, 2**20)),
    }


@given(runs())
def test_same_tokens_and_outputs_as_plain_loops(run):
    torch.manual_seed(run["seed"])
    batch, kv_heads, groups, dim = run["batch"], len(run["is_spatial"]), run["groups"], 4
    total = run["num_prompt"] + run["num_visual"]
    queries = torch.randn(batch, kv_heads * groups, total, dim) * run["sharpness"]
    keys, values = torch.randn(batch, kv_heads, total, dim), torch.randn(batch, kv_heads, total, dim)
    seen = None
    if run["padded"]:
        pads = torch.randint(0, run["num_prompt"], (batch,))
        seen = torch.arange(run["num_prompt"]) >= pads[:, None]
    head_map = HeadMap(torch.tensor([run["is_spatial"]]), grid=run["grid"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows shorter than a row are drawn on purpose
        cache = SSDCache(
            head_map,
            run["slots"],
            buffer=run["buffer"],
            num_recent=run["num_recent"],
            num_sinks=run["num_sinks"],
        )
        cells = run["grid"][0] * run["grid"][1]
        reference = {
            (row, head): ReferenceHead(
                kind := "spatial" if spatial else "semantic",
                run["slots"][kind],
                cells,
                run["buffer"],
                run["num_recent"],
                run["num_sinks"],
            )
            for row in range(batch)
            for head, spatial in enumerate(run["is_spatial"])
        }
        errors, torch_errors = [], []
        prompt = slice(0, run["num_prompt"])
        for step, output in step_through(cache, queries, keys, values, run["num_prompt"], seen):
            held = held_tokens(cache.layers[0])
            at = run["num_prompt"] + step
            for (row, head), slow in reference.items():
                mine = slice(head * groups, (head + 1) * groups)
                prompt_seen = [True] * run["num_prompt"] if seen is None else seen[row].tolist()
                try:
                    expected = slow.step(
                        queries[row, mine, at].tolist(),
                        keys[row, head, at].tolist(),
                        values[row, head, at].tolist(),
                        keys[row, head, prompt].tolist(),
                        values[row, head, prompt].tolist(),
                        prompt_seen,
                        dim**-0.5,
                    )
                except AmbiguousError:
                    assume(False)
                assert held[row, head] == sorted(slow.kept)
                expected = torch.tensor(expected, dtype=torch.float64)
                errors.append((output[row, mine].double() - expected).abs().max())
                columns = [c for c in range(run["num_prompt"]) if prompt_seen[c]]
                columns += [run["num_prompt"] + token for token in sorted(slow.kept)]
                plain = F.scaled_dot_product_attention(
                    queries[row, mine, at][:, None],
                    keys[row, [head] * groups][:, columns],
                    values[row, [head] * groups][:, columns],
                )
                torch_errors.append((plain[:, 0].double() - expected).abs().max())
    # at most twice the error of torch's own attention over the same tokens; 1e-6 for runs in which that is nil
    assert max(errors) <= 2 * max(torch_errors) + 1e-6


@given(runs(), st.integers(1, 30))
def test_online_labels_and_tokens_as_plain_loops(run, num_slots):
    torch.manual_seed(run["seed"])
    batch, kv_heads, groups, dim = run["batch"], len(run["is_spatial"]), run["groups"], 4
    grid, cells = run["grid"], run["grid"][0] * run["grid"][1]
    least = run["buffer"] + max(run["num_recent"], run["num_sinks"])
    assume(least <= num_slots < cells)
    num_prompt, total = run["num_prompt"], run["num_prompt"] + cells
    queries = torch.randn(batch, kv_heads * groups, total, dim) * run["sharpness"]
    keys, values = torch.randn(batch, kv_heads, total, dim), torch.randn(batch, kv_heads, total, dim)
    for head in range(0, kv_heads, 2):  # every other head follows what came just before
        for token in range(1, total):
            keys[:, head, token] = 0.7 * keys[:, head, token - 1] + 0.7 * keys[:, head, token]
            for query in range(head * groups, (head + 1) * groups):
                queries[:, query, token] = 3 * keys[:, head, token]
    settings = {name: run[name] for name in ("buffer", "num_recent", "num_sinks")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = SSDCache(HeadMap.online(num_layers=1, num_kv_heads=kv_heads, grid=grid), num_slots, **settings)
    reference = {
        (row, head): ReferenceHead("semantic", num_slots, cells, *settings.values())
        for row in range(batch)
        for head in range(kv_heads)
    }
    kinds = None
    prompt = slice(0, num_prompt)
    for step, output in step_through(cache, queries, keys, values, num_prompt, None):
        at = num_prompt + step
        try:
            if step == num_slots:
                kinds = [online_kind([reference[row, head] for row in range(batch)]) for head in range(kv_heads)]
                for (_, head), slow in reference.items():
                    slow.evicts_by_score = kinds[head] == "semantic"
            expected = {
                (row, head): slow.step(
                    queries[row, head * groups : (head + 1) * groups, at].tolist(),
                    keys[row, head, at].tolist(),
                    values[row, head, at].tolist(),
                    keys[row, head, prompt].tolist(),
                    values[row, head, prompt].tolist(),
                    [True] * num_prompt,
                    dim**-0.5,
                )
                for (row, head), slow in reference.items()
            }
        except AmbiguousError:
            assume(False)
        assert held_tokens(cache.layers[0]) == {place: sorted(slow.kept) for place, slow in reference.items()}
        for (row, head), rows in expected.items():
            mine = output[row, head * groups : (head + 1) * groups].double()
            torch.testing.assert_close(mine, torch.tensor(rows, dtype=torch.float64), rtol=1e-4, atol=1e-5)
        labels = cache.labels
        assert (labels is None) == (step < num_slots)
        if labels is not None:
            assert labels.is_spatial[0].tolist() == [kind == "spatial" for kind in kinds]


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
