"""SSDCache in transformers' own generate: identity with DynamicCache, bytes, errors, state that moves as one."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from helpers.caches import GRID, feed, generate_image, half_generated, mixed_map, move_and_go_on, random_states
from helpers.compiling import needs_compiler
from helpers.models import left_padded_prompts, random_score, tiny_janus, tiny_llama
from transformers import DynamicCache, DynamicLayer

from ssd_cache import POLICIES, HeadMap, HeadMapError, SSDCache, enable
from ssd_cache._compat import CACHE
from ssd_cache.cache.scorers import SCORES
from ssd_cache.kernels import dispatch


def learned_map():
    """`mixed_map` with a learned score for heads of 16 numbers."""
    torch.manual_seed(0)
    return mixed_map(learned=random_score(2, 2, 16, GRID))


def maps(layers, kv_heads, grid):
    shape = {"num_layers": layers, "num_kv_heads": kv_heads, "grid": grid}
    return {
        "spatial": HeadMap.uniform("spatial", **shape),
        "semantic": HeadMap.uniform("semantic", **shape),
        "mixed": mixed_map(layers, kv_heads, grid),
    }


@pytest.mark.parametrize("kind", ["spatial", "semantic", "mixed"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.001])
def test_full_budget_generates_the_same_tokens_as_dynamic_cache(kind, guidance_scale):
    model = tiny_janus(grid_side=12)
    expected = generate_image(model, DynamicCache(), guidance_scale=guidance_scale)
    cache = SSDCache(maps(2, 2, (12, 12))[kind], 1.0)
    assert torch.equal(generate_image(model, cache, guidance_scale=guidance_scale), expected)
    assert cache.get_seq_length() == 9 + 143  # the last token is generated and never fed back
    plain = tiny_janus(grid_side=12, attn_implementation="sdpa")
    assert torch.equal(generate_image(plain, DynamicCache(), guidance_scale=guidance_scale), expected)


def test_full_janus_grid_is_identical_too():
    model = tiny_janus()
    expected = generate_image(model, DynamicCache(), lengths=(4,))
    assert expected.shape == (1, 576)
    assert torch.equal(generate_image(model, SSDCache(mixed_map(grid=(24, 24)), 1.0), lengths=(4,)), expected)


@pytest.mark.parametrize("score", SCORES)
def test_full_budget_is_identical_with_every_score(score):
    model = tiny_janus(grid_side=6)
    expected = generate_image(model, DynamicCache())
    assert torch.equal(generate_image(model, SSDCache(learned_map(), 1.0, score=score, num_sinks=2)), expected)


@pytest.mark.parametrize("kind", ["spatial", "semantic", "mixed"])
def test_full_budget_equals_dynamic_cache_on_grouped_heads(kind):
    model = tiny_llama()
    inputs = left_padded_prompts((7, 4, 6))
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=200, past_key_values=DynamicCache())
    cache = SSDCache(maps(2, 2, (20, 10))[kind], 1.0)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=200, past_key_values=cache), expected)


def test_ssd_attention_is_sdpa_with_any_other_cache_or_none():
    ours, plain = tiny_llama(), tiny_llama(attn_implementation="sdpa")
    inputs = left_padded_prompts((7, 4, 6))
    assert torch.equal(ours(**inputs).logits, plain(**inputs).logits)
    asked, expected = (model(**inputs, output_attentions=True) for model in (ours, plain))
    assert asked.attentions == expected.attentions  # sdpa has none to give
    assert torch.equal(asked.logits, expected.logits)
    for implementation in ("dynamic", "static"):
        options = {"do_sample": False, "max_new_tokens": 20, "cache_implementation": implementation}
        assert torch.equal(ours.generate(**inputs, **options), plain.generate(**inputs, **options))
    for model in (ours, plain):
        model.train()
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
    losses = []
    for model in (ours, plain):
        torch.manual_seed(3)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append((loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0.5, {"spatial": 0.4, "semantic": 0.6}, [0.5, {"spatial": 20, "semantic": 13}]])
def test_nbytes_is_the_formula(budget, dtype):
    head_map = mixed_map()
    model = tiny_janus(grid_side=6).to(dtype)
    cache = SSDCache(head_map, budget, buffer=3, num_recent=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = generate_image(model, cache)
    assert tokens.shape == (3, 36)
    rows, prompt, head_dim, itemsize = 6, 9, 16, torch.finfo(dtype).bits // 8
    slots = 0
    for plan in (cache.layers[0].plan, cache.layers[1].plan):
        for head in range(head_map.num_kv_heads):
            slots += prompt + plan.num_slots[head]
    assert cache.nbytes == rows * slots * head_dim * itemsize * 2
    stats = cache.memory_stats()
    assert stats.key_value == cache.nbytes
    assert stats.full_cache == rows * 4 * (prompt + 35) * head_dim * itemsize * 2
    assert 0 < stats.bookkeeping < stats.key_value
    assert f"{cache.get_seq_length()} tokens seen" in repr(cache)


def test_tokens_seen_is_not_tokens_stored():
    cache = SSDCache(mixed_map(), 12, buffer=4, num_recent=2)
    generate_image(tiny_janus(grid_side=6), cache)
    assert cache.get_seq_length() == 9 + 35
    assert all(store.num_stored <= 12 for layer in cache.layers for store in layer.stores)


def test_left_padding_changes_nothing_when_layers_differ_in_length():
    model = tiny_janus(grid_side=6)
    budget = [{"spatial": 20, "semantic": 14}, {"spatial": 13, "semantic": 30}]
    together = SSDCache(mixed_map(), budget, buffer=3, num_recent=2)
    batch = generate_image(model, together, lengths=(5, 9), do_sample=False)
    short = left_padded_prompts((5, 9))
    alone = model.generate(
        input_ids=short["input_ids"][:1, 4:],
        attention_mask=short["attention_mask"][:1, 4:],
        generation_mode="image",
        guidance_scale=5.0,
        do_sample=False,
        **{CACHE: SSDCache(mixed_map(), budget, buffer=3, num_recent=2)},
    )
    # the unconditional row's blanked words are seen, so only rows of one length can be compared to the token:
    # the first row of `batch` has 4 masked columns that a row alone does not have, and must generate the same
    assert torch.equal(batch[:1], alone)


@needs_compiler
@pytest.mark.parametrize("budget", [12, {"spatial": 12, "semantic": 15}, {"spatial": 36, "semantic": 12}])
def test_heads_that_evict_are_read_by_the_cpu_loop(budget, monkeypatch):
    """It gives the tokens of torch's attention, which a full budget keeps, since that gives a full cache's bits."""
    model = tiny_janus(grid_side=6)
    full, evicting, plain = (SSDCache(mixed_map(), slots, buffer=3) for slots in (36, budget, budget))
    generate_image(model, full)
    tokens = generate_image(model, evicting, do_sample=False)
    assert [layer.has_kernel for cache in (full, evicting) for layer in cache.layers] == [False, False, True, True]
    monkeypatch.setattr(dispatch, "can_serve", lambda *states, **options: False)
    assert torch.equal(generate_image(model, plain, do_sample=False), tokens)
    assert not any(layer.has_kernel for layer in plain.layers)
    for ours, theirs in zip(evicting.layers, plain.layers, strict=True):
        for mine, other in zip(ours.held_positions(), theirs.held_positions(), strict=True):
            assert torch.equal(mine, other)


def test_dropout_keeps_torchs_attention():
    """As in training, but without gradients; no kernel drops softmax weights."""
    model = tiny_janus(grid_side=6).train()
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    cache = SSDCache(mixed_map(), 12, buffer=3)
    tokens = [generate_image(model, cache, do_sample=False)]
    assert {layer.backend for layer in cache.layers} == {"torch's attention"}
    for layer in model.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.0
    cache.reset()
    tokens.append(generate_image(model, cache, do_sample=False))
    assert not torch.equal(*tokens)


# --- state moves as one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [12, {"spatial": 9, "semantic": 13}])
@pytest.mark.parametrize("move", ["reorder", "select", "mask", "repeat"])
@pytest.mark.parametrize("score", ["sum", "last", "margin", "leverage", "learned"])
def test_rows_can_be_moved_in_mid_image(budget, move, score):
    rows = {"reorder": [2, 0, 0], "select": [1, 2], "mask": [0, 2], "repeat": [0, 0, 1, 1, 2, 2]}[move]
    rows = torch.tensor(rows)
    moved, expected = half_generated(budget, score=score), half_generated(budget, rows, score=score)
    move_and_go_on(moved, expected, move, rows)
    assert moved.nbytes == expected.nbytes


def test_rows_can_be_moved_before_the_first_visual_token():
    moved, expected = (SSDCache(mixed_map(), 20, buffer=4) for _ in range(2))
    rows = torch.tensor([1, 1, 0])
    feed(moved, random_states(3, 5, 0))
    moved.reorder_cache(rows)
    feed(expected, random_states(3, 5, 0), rows)
    for step in range(9):
        states = random_states(3, 1, 1 + step)
        torch.testing.assert_close(feed(moved, states, rows), feed(expected, states, rows))


def test_reset_makes_it_as_new():
    model = tiny_janus(grid_side=6)
    cache = SSDCache(mixed_map(), 14, buffer=3)
    first = generate_image(model, cache)
    cache.reset()
    assert cache.get_seq_length() == cache.memory_stats().full_cache == 0
    other = generate_image(model, cache, lengths=(4,), seed=5)
    cache.reset()
    assert torch.equal(generate_image(model, cache), first)
    assert torch.equal(generate_image(model, SSDCache(mixed_map(), 14, buffer=3), lengths=(4,), seed=5), other)


def test_a_deep_copy_goes_on_alike_and_apart():
    original = half_generated(12)
    copied = copy.deepcopy(original)
    for step in range(12):
        states = random_states(3, 1, 50 + step)
        assert torch.equal(feed(original, states), feed(copied, states))
    feed(original, random_states(3, 1, 99))
    assert original.get_seq_length() == copied.get_seq_length() + 1


def test_two_caches_take_turns_on_one_model():
    model = tiny_llama()
    prompts = left_padded_prompts((6, 6))["input_ids"]

    def new_cache():
        return SSDCache(mixed_map(grid=(8, 8)), 20, buffer=3)

    def steps(cache, row):
        tokens, logits = prompts[row : row + 1], []
        for _ in range(40):
            out = model(tokens, past_key_values=cache).logits[:, -1]
            logits.append(out)
            tokens = out.argmax(-1, keepdim=True)
            yield out
        return

    with torch.no_grad():
        alone = [torch.stack(list(steps(new_cache(), row))) for row in (0, 1)]
        together = list(zip(steps(new_cache(), 0), steps(new_cache(), 1), strict=True))
    for row in (0, 1):
        assert torch.equal(torch.stack([pair[row] for pair in together]), alone[row])


def test_two_threads_each_with_its_cache():
    model = tiny_llama()
    inputs = [left_padded_prompts((6, 4), seed=seed) for seed in (1, 2)]

    def run(index, results):
        cache = SSDCache(mixed_map(grid=(8, 8)), 20, buffer=3)
        results[index] = model.generate(**inputs[index], do_sample=False, max_new_tokens=60, past_key_values=cache)

    alone, together = {}, {}
    for index in (0, 1):
        run(index, alone)
    threads = [threading.Thread(target=run, args=(index, together)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(alone[index], together[index]) for index in (0, 1))


def test_beam_search_moves_every_beam_with_its_scores():
    model = tiny_llama()
    inputs = left_padded_prompts((6, 4))
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 30}
    expected = model.generate(**inputs, **options, **{CACHE: DynamicCache()})
    cache = SSDCache(mixed_map(grid=(8, 8)), 1.0)
    assert torch.equal(model.generate(**inputs, **options, **{CACHE: cache}), expected)
    small = SSDCache(mixed_map(grid=(8, 8)), 12, buffer=3)
    assert model.generate(**inputs, **options, **{CACHE: small}).shape == expected.shape


def test_prompt_in_chunks_is_one_prompt():
    model = tiny_llama()
    tokens = left_padded_prompts((9,))["input_ids"]
    with torch.no_grad():
        whole, chunked = (SSDCache(mixed_map(grid=(8, 8)), 12, buffer=3) for _ in range(2))
        expected = model(tokens, past_key_values=whole).logits[:, -1]
        model(tokens[:, :4], past_key_values=chunked)
        torch.testing.assert_close(model(tokens[:, 4:], past_key_values=chunked).logits[:, -1], expected)
        for _ in range(30):
            tokens = expected.argmax(-1, keepdim=True)
            expected = model(tokens, past_key_values=whole).logits[:, -1]
            torch.testing.assert_close(model(tokens, past_key_values=chunked).logits[:, -1], expected)
    assert chunked.layers[0].num_prompt == 9


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget=0.0 is out of range"),
        ({"budget": 1.5}, "budget=1.5 is out of range"),
        ({"budget": 0}, "budget=0 is out of range"),
        ({"budget": True}, "budget=True is out of range"),
        ({"budget": "0.2"}, "budget='0.2' is out of range"),
        ({"budget": float("nan")}, "budget=nan is out of range"),
        ({"budget": {"spatial": 0.5}}, "give both kinds"),
        ({"budget": {"spatial": 0.5, "semantic": 2.0}}, r"budget\['semantic'\]=2.0"),
        ({"budget": [0.5]}, "1 entries, but the head map has 2 layers"),
        ({"budget": 8, "buffer": 6, "num_recent": 4}, "buffer=6 and num_recent=4 together"),
        ({"budget": 8, "buffer": 6, "num_recent": 0, "num_sinks": 3}, "buffer=6 and num_sinks=3 together"),
        (
            {"budget": 9, "buffer": 6, "num_recent": 2, "num_sinks": 2},
            "a semantic head of layer 0 9 slots, fewer than buffer=6 and num_recent=2 and num_sinks=2 together",
        ),
        ({"buffer": 0}, "buffer=0 is out of range"),
        ({"buffer": 2.0}, "buffer=2.0 is out of range"),
        ({"num_sinks": -1}, "num_sinks=-1 is out of range"),
        ({"num_recent": 1.0}, "num_recent=1.0 is out of range"),
        ({"num_recent": -1}, "num_recent=-1 is out of range"),
        ({"score": "maen"}, "score='maen' is unknown: did you mean 'mean'"),
        (
            {"score": "attention"},
            "score='attention' is unknown: give one of 'sum', 'mean', 'last', 'margin'",
        ),
        ({"score": "learned"}, "carries no learned score; `ssd-cache learn` makes a map with one"),
    ],
)
def test_bad_settings_are_refused_at_birth(settings, message):
    with pytest.raises(ValueError, match=message):
        SSDCache(mixed_map(), **{"budget": 0.5, **settings})


def test_a_path_is_not_a_head_map():
    with pytest.raises(TypeError, match="HeadMap.from_pretrained"):
        SSDCache("some/folder")


def test_a_short_window_is_warned_of():
    with pytest.warns(UserWarning, match="right above"):
        SSDCache(mixed_map(), 12, buffer=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSDCache(mixed_map(), 13, buffer=6)  # a row and two


@pytest.mark.parametrize(("layers", "kv_heads"), [(2, 4), (1, 2), (3, 2)])
def test_a_map_for_another_model_is_refused_before_a_token_is_generated(layers, kv_heads):
    model = tiny_janus(grid_side=6)
    cache = SSDCache(HeadMap.uniform("spatial", num_layers=layers, num_kv_heads=kv_heads, grid=GRID), 0.5)
    with pytest.raises(HeadMapError, match=f"{layers} layers"):
        generate_image(model, cache)


def test_semantic_heads_notice_that_queries_do_not_arrive():
    model = tiny_janus(grid_side=6, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"set_attn_implementation\('ssd'\)"):
        generate_image(model, SSDCache(mixed_map(), 0.5, buffer=3))


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_spatial_heads_need_no_queries(attn_implementation):
    head_map = HeadMap.uniform("spatial", num_layers=2, num_kv_heads=2, grid=GRID)
    results = []
    for implementation in (attn_implementation, "ssd"):
        model = tiny_janus(grid_side=6, attn_implementation=implementation)
        results.append(generate_image(model, SSDCache(head_map, 16, buffer=3, num_sinks=2), do_sample=False))
    assert torch.equal(*results)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_heads_that_keep_the_margin_need_no_queries(attn_implementation):
    head_map = HeadMap.uniform("semantic", num_layers=2, num_kv_heads=2, grid=GRID)
    results = []
    for implementation in (attn_implementation, "ssd"):
        model = tiny_janus(grid_side=6, attn_implementation=implementation)
        cache = SSDCache.from_policy("margin", head_map, 18, buffer=3)
        results.append(generate_image(model, cache, do_sample=False))
        assert not any(layer.plan.needs_ssd_attention for layer in cache.layers)
        (store,) = cache.layers[0].stores
        assert store.queries is None
        held = set(store.positions[0, 0, : store.num_stored].tolist())
        # the margin of all rows, the newest, and what came since the last eviction
        assert held == {token for token in range(35) if token % 6 in (0, 5)} | set(range(27, 35))
    assert torch.equal(*results)


def test_the_margin_beside_other_heads_needs_the_attention_ssd():
    # stored with the semantic heads first, which only "ssd" can undo
    assert [
        layer.plan.needs_ssd_attention for layer in SSDCache.from_policy("margin", mixed_map(), 18, buffer=3).layers
    ] == [
        False,
        True,
    ]
    model = tiny_janus(grid_side=6, attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"set_attn_implementation\('ssd'\)"):
        generate_image(model, SSDCache.from_policy("margin", mixed_map(), 18, buffer=3))


def test_a_second_image_without_reset_is_refused():
    model = tiny_janus(grid_side=6)
    cache = SSDCache(mixed_map(), 0.5, buffer=3)
    generate_image(model, cache)
    with pytest.raises(ValueError, match=r"cache\.reset\(\)"):
        generate_image(model, cache)


def test_another_batch_in_mid_image_is_refused():
    cache = half_generated(12)
    with pytest.raises(ValueError, match="holds 3 rows .* and got 2 rows"):
        feed(cache, random_states(2, 1, 7))


def test_more_tokens_than_the_grid_warn_once_and_go_on():
    cache = half_generated(12)
    with pytest.warns(UserWarning, match="6 x 6 = 36 visual tokens") as caught:
        for step in range(60):
            feed(cache, random_states(3, 1, 200 + step))
    assert len(caught) == 1
    assert cache.get_seq_length() == 5 + 17 + 60


def test_full_budget_past_the_grid_keeps_a_window():
    cache = SSDCache(mixed_map(), 1.0)
    feed(cache, random_states(3, 5, 0))
    with pytest.warns(UserWarning, match="continues"):
        for step in range(40):
            feed(cache, random_states(3, 1, 1 + step))
    store = cache.layers[0].stores[0]
    assert sorted(store.positions[0, 0, : store.num_stored].tolist()) == list(range(6, 40))


def test_cropping_and_offloading_are_refused():
    cache = half_generated(12)
    cache.crop(0)
    with pytest.raises(ValueError, match="evicted tokens are gone"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="offloaded"):
        cache.layers[0].offload()


def test_no_graph_is_kept():
    model = tiny_llama()
    cache = SSDCache(mixed_map(grid=(8, 8)), 12, buffer=3)
    tokens = left_padded_prompts((5,))["input_ids"]
    for _ in range(20):
        tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert not any(store.keys.requires_grad for layer in cache.layers for store in layer.stores)


# --- enable ---------------------------------------------------------------------------------------------------


def test_enable_gives_each_call_a_fresh_cache_and_leaves_nothing():
    model = tiny_janus(grid_side=6, attn_implementation="sdpa")
    configs = [model.config, model.config.text_config, model.config.vision_config, model.config.vq_config]
    before = [config._attn_implementation for config in configs]
    full = generate_image(model, None)
    with enable(model, mixed_map(), budget=14, buffer=3) as same:
        assert same is model
        assert model.config.text_config._attn_implementation == "ssd"
        first, second = generate_image(model, None), generate_image(model, None)
    assert torch.equal(first, second)
    expected = generate_image(tiny_janus(grid_side=6), SSDCache(mixed_map(), 14, buffer=3))
    assert torch.equal(first, expected)
    assert "generate" not in vars(model)
    assert [config._attn_implementation for config in configs] == before
    assert torch.equal(generate_image(model, None), full)


def test_enable_is_undone_after_an_exception_and_nests():
    model = tiny_llama(attn_implementation="eager")
    with pytest.raises(RuntimeError, match="stop"), enable(model, mixed_map(), budget=20, buffer=3):
        with enable(model, mixed_map(), budget=14, buffer=3):
            pass
        assert model.config._attn_implementation == "ssd"
        assert "generate" in vars(model)
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "eager"
    assert "generate" not in vars(model)


def test_enable_keeps_a_cache_that_the_caller_brings():
    model = tiny_llama()
    cache = DynamicCache()
    with enable(model, mixed_map(grid=(8, 8)), budget=14, buffer=3):
        model.generate(**left_padded_prompts((5,)), do_sample=False, max_new_tokens=4, past_key_values=cache)
    assert isinstance(cache.layers[0], DynamicLayer)
    assert cache.get_seq_length() == 8


def test_enable_refuses_before_anything_is_put_on_the_model():
    model = tiny_llama(attn_implementation="sdpa")
    with pytest.raises(HeadMapError, match="3 layers x 2 KV heads, but LlamaForCausalLM has 2 x 2"):
        with enable(model, mixed_map(layers=3)):
            pass
    with pytest.raises(ValueError, match="budget=2.0"):
        with enable(model, mixed_map(), budget=2.0):
            pass
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


# --- policies -------------------------------------------------------------------------------------------------


def test_policies_fall_out_of_the_rules():
    head_map = mixed_map()
    full = SSDCache.from_policy("full", head_map, 0.5)
    assert full.budget == 1.0
    h2o = SSDCache.from_policy("h2o", head_map, 20, buffer=4)
    assert not h2o.head_map.is_spatial.any()
    assert h2o.layers[0].plan.num_recent == (10, 10)
    streaming = SSDCache.from_policy("streaming-llm", head_map, 20, buffer=4)
    assert streaming.head_map.is_spatial.all()
    assert streaming.num_sinks == 4
    assert SSDCache.from_policy("ssd", head_map, 20, buffer=4).head_map == head_map
    linear = SSDCache.from_policy("linear", head_map, 20)
    assert not linear.head_map.is_spatial.any()
    plan = linear.layers[0].plan
    assert (linear.score, plan.num_sinks, plan.num_recent, plan.buffer) == ("last", 4, (6, 6), 6)
    assert SSDCache.from_policy("linear", head_map, 20, num_sinks=0).num_sinks == 0
    margin = SSDCache.from_policy("margin", head_map, 20)
    assert (margin.head_map, margin.score) == (head_map, "margin")
    with pytest.raises(ValueError, match=", ".join(POLICIES)):
        SSDCache.from_policy("sdd", head_map)
