"""The fused kernels against the plain loops of reference.py and against torch: Triton's interpreted, and the CPU's own.

`test_fused.py` runs this file twice, each in a process of its own. Triton must be told to interpret before it is
imported, and then every model of that process takes the kernel; without that, every model takes the loops of
`cpu_kernels.cpp`, inside `fast_decode` or not. Sizes are small: the interpreter needs a few milliseconds a head.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from helpers.models import left_padded_prompts, random_score, tiny_janus, tiny_llama
from helpers.plain_loops import runs, same_as_plain_loops
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_cache import HeadMap, SSDCache, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.cache import fused_eviction
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.kernels import cpu_loops as cpu_kernels
from ssd_cache.kernels import dispatch as fused
from ssd_cache.kernels.eight_bits import KV_DTYPES, dequantize, quantize

torch.set_num_threads(1)  # tensors are tiny, and the interpreter's own time is all there is

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = fused.DTYPES if INTERPRETS else tuple(cpu_kernels.DECODERS)
STORED = (None, *KV_DTYPES)
if not INTERPRETS:
    _can_serve = fused.can_serve
    fused.can_serve = lambda *states, on_cpu, **options: _can_serve(*states, on_cpu=True, **options)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


SPLITS = (1, 4) if INTERPRETS else (1,)


@pytest.fixture(params=SPLITS, ids=lambda splits: f"{splits} splits")
def splits(request, monkeypatch):
    """Programs that share the tokens of a head; only Triton's kernel splits them."""
    if request.param > 1:
        module = import_module("ssd_cache.kernels.triton_decode")
        monkeypatch.setattr(module, "num_splits", lambda *sizes: request.param)
    return request.param


@settings(max_examples=40)
@given(runs(largest_side=3), st.booleans(), st.sampled_from(STORED))
def test_same_tokens_and_outputs_as_plain_loops(run, is_counted, kv_dtype):
    cache = same_as_plain_loops(run, is_counted, kv_dtype)
    assert cache.layers[0].has_kernel
    assert all(store.queries is None for store in cache.layers[0].stores)


GRID = (4, 4)
LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=GRID)
SCORED = replace(LABELS, learned=random_score(2, 2, 16, GRID))
SETTINGS = {
    "one store": {"budget": 8, "buffer": 2},
    "two stores": {"budget": {"spatial": 8, "semantic": 10}, "buffer": 3, "num_recent": 2},
    "full": {"budget": 1.0},
    "last": {"budget": 11, "buffer": 4, "score": "last", "num_sinks": 1},
    "margin": {"budget": 10, "buffer": 3, "score": "margin"},
    "leverage": {"budget": 11, "buffer": 3, "score": "leverage"},
    "learned": {"budget": 11, "buffer": 3, "score": "learned"},
}


def torch_path(monkeypatch):
    monkeypatch.setattr(fused, "can_serve", lambda *states, **options: False)


def generate(model, cache, **kwargs):
    inputs = left_padded_prompts((5, 8))
    return model.generate(**inputs, generation_mode="image", **{CACHE: cache}, do_sample=False, **kwargs)


@pytest.mark.parametrize(
    ("name", "splits"),
    [*((name, 1) for name in SETTINGS), *([("two stores", 2)] if INTERPRETS else [])],
    indirect=["splits"],
)
def test_janus_generates_the_tokens_of_the_torch_path_with_its_scores(name, splits, monkeypatch):
    """With guidance and left padding; tokens equal in float32, as the logits of these models are far apart."""
    model = tiny_janus(grid_side=4)
    with_kernel, plain = (SSDCache(SCORED, **{"score": "sum"} | SETTINGS[name]) for _ in range(2))
    tokens = generate(model, with_kernel)
    torch_path(monkeypatch)
    assert torch.equal(tokens, generate(model, plain))
    for ours, theirs in zip(with_kernel.layers, plain.layers, strict=True):
        assert ours.has_kernel
        assert not theirs.has_kernel
        for mine, other in zip(ours.stores, theirs.stores, strict=True):
            other.score_window()
            held = slice(other.num_stored)
            assert torch.equal(mine.positions[..., held], other.positions[..., held])
            # float32 rounding of two orders of summation, over at most 16 queries
            torch.testing.assert_close(mine.received, other.received, rtol=1e-4, atol=1e-5)
            # the last token is generated and not fed; all else was written by the kernel
            end = slice(other.num_prompt + other.num_stored)
            torch.testing.assert_close(mine.keys[:, :, end], other.keys[:, :, end], rtol=1e-4, atol=1e-5)
            assert mine.bookkeeping_nbytes <= other.bookkeeping_nbytes


def test_compiled_steps_with_the_kernel_are_one_graph():
    from torch._dynamo.utils import counters

    model = tiny_janus(grid_side=4)
    expected, caches = generate(model, SSDCache(LABELS, 8, buffer=2)), [SSDCache(LABELS, 8, buffer=2) for _ in range(2)]
    counters.clear()
    with fast_decode(model):
        for cache in caches:
            assert torch.equal(generate(model, cache), expected)
            assert counters["stats"]["unique_graphs"] == 1
            assert all(layer.has_kernel for layer in cache.layers)


def test_text_model_with_grouped_heads_and_left_padding(monkeypatch):
    model = tiny_llama()
    options = {**left_padded_prompts((7, 4)), "do_sample": False, "max_new_tokens": 14}
    cache = SSDCache(LABELS, 8, buffer=2)
    tokens = model.generate(**{CACHE: cache}, **options)
    assert all(layer.has_kernel for layer in cache.layers)
    torch_path(monkeypatch)
    assert torch.equal(tokens, model.generate(**{CACHE: SSDCache(LABELS, 8, buffer=2)}, **options))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_one_step_over_codes_equals_a_step_over_their_numbers(dtype, groups, kv_dtype, splits):
    """The prompt and the slots of a store, 18 and 130 columns, the new one the first of a tile; codes bit for bit."""
    batch, num_prompt, num_slots, slot, heads = 2, 18, 130, 128, torch.tensor([2, 0])
    query, new = torch.randn(batch, 3, groups, 20).to(dtype), [torch.randn(batch, 3, 1, dim) for dim in (20, 12)]
    new[0][0, 2] = 0  # the least scale
    new = [states.to(dtype) for states in new]
    prompt = [torch.randn(batch, 2, num_prompt, dim).to(dtype) for dim in (20, 12)]
    codes = [part for dim in (20, 12) for part in quantize(torch.randn(batch, 2, num_slots, dim).exp(), kv_dtype)]
    mask = torch.ones(batch, num_prompt + num_slots, dtype=torch.bool)
    mask[1, :3] = False
    expected = [part.clone() for part in codes]
    parts = [part for states in new for part in quantize(states[:, heads, 0], kv_dtype)]
    for held, states in zip(expected, parts, strict=True):
        held[:, :, slot] = states
    scores, output = torch.zeros(batch, 1, num_slots), torch.full((batch, 3, groups, 12), 7.0, dtype=dtype)
    store = [prompt[0].clone()], [prompt[1].clone()], [scores], [heads], [mask], [torch.tensor(slot)]
    fused.decode(query, *new, *store, 0.3, output, codes, kv_dtype)

    assert all(map(torch.equal, codes, expected))
    assert torch.equal(store[0][0], prompt[0])
    assert torch.equal(store[1][0], prompt[1])
    assert (output[:, 1] == 7).all()
    keys, values = (
        torch.cat([states.float(), dequantize(*parts, kv_dtype, torch.float32)], 2)[:, :, : num_prompt + slot + 1]
        for states, parts in zip(prompt, (codes[:2], codes[2:]), strict=True)
    )
    seen = mask[:, None, None, : num_prompt + slot + 1]
    logits = (0.3 * query[:, heads].double() @ keys.double().mT).masked_fill(~seen, float("-inf"))
    exact, attended = logits.softmax(-1) @ values.double(), output[:, heads].double()
    # a rounding of the output, one of the weights for a matrix product, and float32 sums of 140 products
    assert (attended - exact).abs().max() <= 2 * torch.finfo(dtype).eps * values.abs().max() + 1e-5
    received = torch.zeros(batch, num_slots, dtype=torch.float64)
    received[:, : slot + 1] = logits.softmax(-1)[:, 0, :, num_prompt:].sum(1)
    torch.testing.assert_close(scores[:, 0].double(), received, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_one_step_in_numbers_of_any_precision(dtype, groups, splits):
    """Sizes that fill no tile: 145 columns of 20 and 12 numbers; two of a layer's three heads, one of them scored."""
    batch, num_prompt, num_slots, slot = 2, 5, 150, 140
    heads, end = torch.tensor([2, 0]), num_prompt + slot
    query = torch.randn(batch, 3, groups, 20).to(dtype)
    new_key, new_value = torch.randn(batch, 3, 1, 20).to(dtype), torch.randn(batch, 3, 1, 12).to(dtype)
    keys = torch.randn(batch, 2, num_prompt + num_slots, 20).to(dtype)
    values = torch.randn(batch, 2, num_prompt + num_slots, 12).to(dtype)
    mask = torch.ones(batch, num_prompt + num_slots, dtype=torch.bool)
    mask[1, :3] = False
    scores = torch.rand(batch, 1, num_slots)
    before = keys.clone(), values.clone(), scores.clone()
    output = torch.full((batch, 3, groups, 12), 7.0, dtype=dtype)
    store = [keys], [values], [scores], [heads], [mask], [torch.tensor(slot)]
    fused.decode(query, new_key, new_value, *store, 0.3, output)

    assert torch.equal(keys[:, :, end], new_key[:, heads, 0])
    assert torch.equal(values[:, :, end], new_value[:, heads, 0])
    for now, then in zip((keys, values), before, strict=False):
        now[:, :, end] = then[:, :, end]
        assert torch.equal(now, then), "nothing but the token's column is written"
    assert (output[:, 1] == 7).all(), "the head that is not of this store is left alone"

    keys[:, :, end], values[:, :, end] = new_key[:, heads, 0], new_value[:, heads, 0]
    seen = mask[:, None, None, : end + 1]
    arguments = query[:, heads], keys[:, :, : end + 1], values[:, :, : end + 1]
    exact = F.scaled_dot_product_attention(*(states.double() for states in arguments), seen, scale=0.3)
    plain = F.scaled_dot_product_attention(*arguments, seen, scale=0.3)
    error, torch_error = ((states.double() - exact).abs().max() for states in (output[:, heads], plain))
    # twice what torch's own attention errs by in this dtype; for a matrix product, weights are rounded to it first
    rounding = 0 if groups == 1 else torch.finfo(dtype).eps / 2 * values.abs().max()
    assert error <= 2 * torch_error + rounding + 1e-7

    logits = (0.3 * arguments[0].double() @ arguments[1].double().mT).masked_fill(~seen, float("-inf"))
    received = torch.zeros(batch, num_slots, dtype=torch.float64)
    received[:, : slot + 1] = logits.softmax(-1)[:, 0, :, num_prompt:].sum(1)
    # sums in float32, whatever the dtype, of at most 150 shares below 1
    torch.testing.assert_close(scores[:, 0].double(), before[2][:, 0] + received, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(st.data())
def test_an_eviction_is_that_of_torch_bit_for_bit(data):
    """With codes and scales or without, few or no semantic heads, equal ranks, and ranks that are no numbers."""
    draw, random = data.draw, torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    cpu_kernels.library()  # as the attention of an image loads it
    num_slots, batch, heads = draw(st.integers(2, 70), "slots"), 2, 3
    num_evict, num_sinks = draw(st.integers(1, num_slots), "evict"), draw(st.integers(0, 3), "sinks")
    num_semantic, has_scales = draw(st.integers(0, heads), "semantic"), draw(st.booleans(), "scales")
    num_recent = draw(st.integers(0, num_slots), "recent")
    num_seen = num_slots + draw(st.integers(0, 99), "evicted before")
    held = [torch.randperm(num_seen, generator=random)[:num_slots] for _ in range(batch * heads)]
    positions = torch.stack(held).int().view(batch, heads, num_slots)
    positions[:, num_semantic:] = positions[:1, :1]  # spatial heads hold the same tokens
    kinds = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e-45, float("inf"), float("-inf"), float("nan")])
    ranks = kinds[torch.randint(len(kinds), (batch, num_semantic, num_slots), generator=random)]
    received = torch.rand(batch, draw(st.integers(0, num_semantic), "scored"), num_slots, generator=random)
    num_prompt = 0 if has_scales else 5
    states = [torch.randn(batch, heads, num_prompt + num_slots, dim, generator=random) for dim in (6, 8)]
    scales = [torch.rand(batch, heads, num_slots, generator=random) for _ in range(2 * has_scales)]
    found = []
    for run in (fused_eviction._by_torch, fused_eviction._by_kernel):
        slots = fused_eviction.Slots(*([t.clone() for t in part] if isinstance(part, list) else part.clone()
                                       for part in (positions, received, states, scales)))  # fmt: skip
        given_ranks = fused_eviction.Ranks(lambda: ranks if num_semantic else None)
        run(slots, given_ranks, num_evict, num_seen, num_recent=num_recent, num_sinks=num_sinks)
        kept = num_slots - num_evict
        found.append([slots.positions, slots.received, *(part[:, :, : num_prompt + kept] for part in slots.states),
                      *(part[:, :, :kept] for part in slots.scales)])  # fmt: skip
    assert all(map(torch.equal, *found))


@settings(max_examples=20 if INTERPRETS else 80)
@given(st.data())
def test_an_eviction_by_a_learned_score_is_that_of_torch(data):
    """The same tokens stay, since random scores do not come near each other; worth differs by rounding."""
    draw, seed = data.draw, data.draw(st.integers(0, 99), "seed")
    torch.manual_seed(seed)
    cpu_kernels.library()
    dtype, sizes = draw(st.sampled_from(DTYPES)), (draw(st.integers(1, 40), "key"), draw(st.integers(1, 40), "value"))
    grid, batch, heads = (draw(st.integers(2, 9), "rows"), draw(st.integers(2, 9), "columns")), 2, 3
    num_slots = draw(st.integers(2, 70), "slots")
    num_seen = num_slots + draw(st.integers(0, 40), "evicted before")  # also past the end of the grid
    num_evict, num_semantic = draw(st.integers(1, num_slots), "evict"), draw(st.integers(1, heads), "semantic")
    spared = {"num_recent": draw(st.integers(0, num_slots), "recent"), "num_sinks": draw(st.integers(0, 3), "sinks")}
    first_new = draw(st.integers(0, num_slots - 1), "first new")
    positions = torch.stack([torch.randperm(num_seen)[:num_slots] for _ in range(batch * heads)]).int()
    positions = positions.view(batch, heads, num_slots)
    positions[:, num_semantic:] = positions[:1, :1]
    worth = torch.randn(batch, num_semantic, num_slots)
    states = [torch.randn(batch, heads, 5 + num_slots, size).to(dtype) for size in sizes]
    shapes = {"key": sizes[:1], "value": sizes[1:], "row": (grid[0], grid[0]), "column": grid}
    learned = LearnedScore.of({name: torch.randn(num_semantic, *shape) for name, shape in shapes.items()})
    found = []
    for run in (fused_eviction._by_torch, fused_eviction._by_kernel):
        slots = fused_eviction.Slots(positions.clone(), worth.clone(), [part.clone() for part in states], [])
        ranks = fused_eviction._ranks_by(learned, slots, num_seen, first_new)
        run(slots, ranks, num_evict, num_seen, **spared)
        kept = 5 + num_slots - num_evict
        found.append([slots.positions, *(part[:, :, :kept] for part in slots.states), slots.received])
    (*exact, worth), (*others, other) = found
    assert all(map(torch.equal, exact, others))
    torch.testing.assert_close(worth, other, rtol=1e-5, atol=1e-4)


def test_a_device_that_is_full_during_the_trial_is_tried_again(monkeypatch):
    def fail(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    cpu_kernels.library()
    fused_eviction._passes_trial.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(fused_eviction, "_agree", fail)
        assert not fused_eviction.has_kernel(torch.device("cpu"))
    assert fused_eviction.has_kernel(torch.device("cpu"))


@pytest.mark.parametrize("score", ["sum", "learned"])
def test_an_eviction_is_one_launch(score, monkeypatch):
    """Of each store; "sum" ranks by what the decode kernel has added up, and "learned" in the launch."""
    cpu_kernels.library()
    assert fused_eviction.has_kernel(torch.device("cpu"))
    owner, name = (
        (cpu_kernels, "evict") if not INTERPRETS else (import_module("ssd_cache.kernels.triton_evict"), "launch")
    )
    launches, launch = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: launches.append(1) or launch(*args))
    monkeypatch.setattr(fused_eviction, "select_victims", None)
    monkeypatch.setattr(LearnedScore, "of_states", None)
    monkeypatch.setattr(LearnedScore, "of_places", None)
    cache = SSDCache(SCORED, 8, buffer=2, score=score)
    generate(tiny_janus(grid_side=4), cache)
    assert len(launches) == 2 * len(range(8, 15, 2)), "two layers; 15 of 16 tokens are fed"


def test_one_call_over_stores_of_several_lengths_equals_a_call_for_each():
    """Bit for bit; one of the stores holds no token yet."""
    new = [torch.randn(2, 4, 1, 8) for _ in range(3)]
    parts = []
    for heads, num_slots, slot in (([3, 0], 30, 20), ([1], 4, 0), ([2], 9, 8)):
        states = [torch.randn(2, len(heads), 5 + num_slots, 8) for _ in range(2)]
        parts.append((*states, torch.rand(2, 1, num_slots), torch.tensor(heads), torch.rand(2, 5 + num_slots) < 0.8,
                      torch.tensor(slot)))  # fmt: skip
    copies = [[tensor.clone() for tensor in part] for part in parts]
    together, single = torch.empty(2, 4, 1, 8), torch.empty(2, 4, 1, 8)
    fused.decode(*new, *map(list, zip(*parts, strict=True)), 0.3, together)
    for part in copies:
        fused.decode(*new, *([tensor] for tensor in part), 0.3, single)
    assert torch.equal(together, single)
    for part, other in zip(parts, copies, strict=True):
        assert all(map(torch.equal, part, other))


def test_gradients_keep_the_torch_path():
    model = tiny_llama()
    inputs = left_padded_prompts((4, 4))["input_ids"]
    graded = SSDCache(LABELS, 0.5, buffer=2)
    with torch.enable_grad():
        model(inputs, past_key_values=graded)
        model(inputs[:, :1], past_key_values=graded)
    assert not any(layer.has_kernel for layer in graded.layers)


def test_gradients_and_another_attention_in_mid_image_are_refused():
    model, cache = tiny_llama(), SSDCache(LABELS, 0.5, buffer=2)
    inputs = left_padded_prompts((4, 4))["input_ids"]
    model(inputs, past_key_values=cache)
    model(inputs[:, :1], past_key_values=cache)
    with torch.enable_grad(), pytest.raises(ValueError, match="without gradients"):
        model(inputs[:, :1], past_key_values=cache)
    model.set_attn_implementation("sdpa")
    with pytest.raises(AttributeError, match="'ssd' supports; load the model with"):
        model(inputs[:, :1], past_key_values=cache)


def test_a_kernel_that_fails_or_errs_is_not_used(monkeypatch):
    query = torch.randn(1, 2, 1, 7)
    for launch, reason in ((lambda *args: None, "errs by"), (lambda *args: 1 / 0, "division by zero")):
        fused.passes_trial.cache_clear()
        monkeypatch.setattr(fused, "_launch", launch)
        with pytest.warns(UserWarning, match=reason):
            assert not fused.can_serve(query, query, query, on_cpu=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not fused.can_serve(query, query, query, on_cpu=True), "it is tried once, and said once"
    fused.passes_trial.cache_clear()


@pytest.mark.skipif(not INTERPRETS, reason="the loops for the CPU refuse them")
@pytest.mark.parametrize(
    ("heads", "slot", "wrong"), [([5, 1], 3, [0]), ([-1, 2], 3, [0]), ([1, 2], -1, [0]), ([1, 2], 10, [0])]
)
def test_heads_and_slots_that_are_not_there_give_nan(heads, slot, wrong, splits):
    """A GPU cannot raise; head 0 and slot 0 stand in for them, and memory stays whole."""
    states, output = torch.randn(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)
    keys, values, scores = torch.zeros(1, 2, 12, 4), torch.zeros(1, 2, 12, 4), torch.zeros(1, 1, 10)
    store = [keys], [values], [scores], [torch.tensor(heads)], [], [torch.tensor(slot)]
    fused.decode(states, states, states, *store, 0.5, output)
    assert output.isnan().any(-1).flatten().nonzero().flatten().tolist() == wrong
