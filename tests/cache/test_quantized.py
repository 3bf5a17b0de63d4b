"""Slots in 8 bits: errors within their bounds, plain loops, bytes, and codes that move with their scales.

One image shows that a trained model still meets its caption; docs/results.md has the accuracy.
"""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from helpers.caches import feed, generate_image, half_generated, mixed_map, move_and_go_on, random_states
from helpers.compiling import needs_compiler, static_addresses
from helpers.models import left_padded_prompts, random_score, tiny_janus, tiny_llama
from helpers.plain_loops import runs, same_as_plain_loops
from helpers.reference import eight_bits, float8
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from ssd_cache import HeadMap, SSDCache, enable, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.cache.quantized import QuantizedStore
from ssd_cache.cache.slots import SlotStore
from ssd_cache.kernels import cpu_loops, dispatch
from ssd_cache.kernels.eight_bits import KV_DTYPES, dequantize, quantize
from ssd_cache.models import BUNDLED, find_generator
from ssd_cache.shapes.judge import judge

both = pytest.mark.parametrize("kv_dtype", KV_DTYPES)


# --- numbers


@st.composite
def tokens(draw):
    """Keys of a few tokens, `[tokens, head_dim]`, of sizes from far below float16 to near its end."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    spread = torch.randn(shape, generator=generator).exp() if draw(st.booleans()) else 1.0
    states = torch.randn(shape, generator=generator) * spread * 2.0 ** draw(st.integers(-40, 8))
    return states.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


@given(tokens())
def test_int8_errs_by_half_a_step(states):
    codes, scales = quantize(states, "int8")
    error = (dequantize(codes, scales, "int8", torch.float32) - states.float()).abs()
    largest = states.float().abs().amax(-1, keepdim=True)
    # half a step, and two roundings of float32 at the size of the largest number
    assert (error <= scales[:, None] / 2 + 2**-22 * largest).all()
    assert codes.abs().max() <= 127
    assert (codes.abs().amax(-1) == 127)[largest[:, 0] > 2**-100].all(), "the largest number is met by the largest code"


@given(tokens())
def test_fp8_errs_by_a_sixteenth_or_half_of_its_least_step(states):
    codes, scales = quantize(states, "fp8")
    held = dequantize(codes, scales, "fp8", torch.float32)
    size = states.float().abs()
    # 3 bits of mantissa round by 2^-4 of a number at most; below 2^-6 the steps are 2^-9; float32 itself rounds twice
    bound = torch.maximum(2**-4 * size, 2**-10 * scales[:, None]) + 2**-22 * size
    assert ((held - states.float()).abs() <= bound).all()


@both
@given(states=tokens())
def test_codes_and_scales_are_those_of_plain_loops(kv_dtype, states):
    codes, scales = quantize(states, kv_dtype)
    held = dequantize(codes, scales, kv_dtype, torch.float32)
    assert (codes.dtype, scales.dtype, codes.shape, scales.shape) == (
        torch.int8,
        torch.float32,
        states.shape,
        states.shape[:1],
    )
    for token, row in enumerate(states.float().tolist()):
        slow_codes, slow_scale, slow_held = eight_bits(row, kv_dtype)
        assert [code % 256 for code in codes[token].tolist()] == [code % 256 for code in slow_codes]
        assert scales[token].item() == slow_scale
        assert held[token].tolist() == slow_held


def test_every_float8_is_told_from_the_others():
    """The loops' table of numbers is torch's, so that "plain loops" means float8_e4m3fn."""
    bits = torch.tensor([bits for bits in range(256) if bits & 127 != 127], dtype=torch.uint8)
    assert bits.view(torch.float8_e4m3fn).float().tolist() == [float8(code) for code in bits.tolist()]


@both
def test_what_is_not_finite_is_not_hidden(kv_dtype):
    states = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [1.0, 2.0]])
    held = dequantize(*quantize(states, kv_dtype), kv_dtype, torch.float32)
    assert held.isfinite().all(-1).tolist() == [False, False, True]


# --- the cache against plain loops


@both
@settings(max_examples=25)
@given(run=runs(largest_side=4), is_counted=st.booleans())
def test_same_tokens_and_outputs_as_plain_loops_over_what_8_bits_hold(kv_dtype, run, is_counted):
    cache = same_as_plain_loops(run, is_counted, kv_dtype)
    assert all(type(store) is QuantizedStore for store in cache.layers[0].stores)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["spatial", "semantic"])
def test_codes_and_scales_move_with_their_tokens(kv_dtype, dtype, kind):
    head_map = HeadMap.uniform(kind, num_layers=1, num_kv_heads=2, grid=(6, 6))
    # a score of positions alone, so that 8 bits cannot change which tokens stay
    options = {"buffer": 4, "num_recent": 3, "score": "margin"}
    plain = SSDCache(head_map, 14, **options)
    cache = SSDCache(head_map, 14, kv_dtype=kv_dtype, **options)
    torch.manual_seed(1)
    keys, values = (torch.randn(3, 2, 5 + 33, 8, dtype=dtype) for _ in range(2))
    for start, end in [(0, 5), *((at, at + 1) for at in range(5, 5 + 33))]:
        new = slice(start, end)
        whole = plain.update(keys[:, :, new], values[:, :, new], 0)
        shown = cache.update(keys[:, :, new], values[:, :, new], 0)
        for states, other in zip(shown, whole, strict=True):
            assert states.dtype == dtype
            assert states.shape == other.shape
            assert torch.equal(states[:, :, :5], other[:, :, :5]), "the prompt is whole"
        if start < 5:
            continue
        (store,), (other,) = cache.layers[0].stores, plain.layers[0].stores
        held = slice(store.num_stored)
        places = store.positions[:, :, held]
        assert torch.equal(places, other.positions[:, :, held])
        index = 5 + places.long()[..., None].expand(-1, -1, -1, 8)
        for states, given_states in zip(shown, (keys, values), strict=True):
            expected = dequantize(*quantize(given_states.gather(2, index), kv_dtype), kv_dtype, dtype)
            assert torch.equal(states[:, :, 5:], expected)


@both
def test_any_attention_serves_where_no_query_is_needed(kv_dtype):
    head_map = HeadMap.uniform("spatial", num_layers=2, num_kv_heads=2, grid=(6, 6))
    caches = [SSDCache(head_map, 16, buffer=3, kv_dtype=kv_dtype) for _ in range(2)]
    generated = [
        generate_image(tiny_janus(grid_side=6, attn_implementation=name), cache, do_sample=False)
        for name, cache in zip(("sdpa", "ssd"), caches, strict=True)
    ]
    assert torch.equal(*generated)


# --- bytes


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [0.5, 1.0, {"spatial": 0.4, "semantic": 0.6}])
def test_nbytes_is_the_formula_and_that_of_the_tensors(kv_dtype, dtype, budget):
    model = tiny_janus(grid_side=6).to(dtype)
    cache = SSDCache(mixed_map(), budget, buffer=3, num_recent=2, kv_dtype=kv_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "torch's attention runs the steps .* are converted")  # float16, on a CPU
        assert generate_image(model, cache).shape == (3, 36)
    rows, prompt, head_dim, heads = 6, 9, 16, 4  # guidance doubles the rows
    slots = sum(sum(layer.plan.num_slots) for layer in cache.layers)
    assert cache.nbytes == rows * 2 * (heads * prompt * head_dim * dtype.itemsize + slots * (head_dim + 4))
    found = {
        id(tensor): tensor.nbytes
        for layer in cache.layers
        for store in layer.stores
        for name, tensor in vars(store).items()
        if isinstance(tensor, torch.Tensor) and name not in ("positions", "received", "queries", "mask", "labels")
    }
    assert sum(found.values()) == cache.nbytes
    stats = cache.memory_stats()
    assert stats.key_value == cache.nbytes
    assert stats.full_cache == rows * heads * (prompt + 35) * head_dim * dtype.itemsize * 2
    assert f"kv_dtype='{kv_dtype}', 44 tokens seen" in repr(cache)


def test_without_kv_dtype_nothing_is_quantised():
    cache = SSDCache(mixed_map(), 14, buffer=3)
    generate_image(tiny_janus(grid_side=6), cache)
    assert {type(store) for layer in cache.layers for store in layer.stores} == {SlotStore}
    assert "kv_dtype" not in repr(cache)


@both
def test_a_full_budget_is_quantised_and_near_the_full_cache(kv_dtype):
    model = tiny_llama()
    ids = torch.randint(10, 40, (2, 60))
    cache = SSDCache(mixed_map(grid=(8, 8)), 1.0, kv_dtype=kv_dtype)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        states = [model.model(ids[:, at : at + 1], past_key_values=cache).last_hidden_state for at in range(6, 60)]
        expected = model.model(ids).last_hidden_state[:, 6:]
    error = (torch.cat(states, 1) - expected).norm() / expected.norm()
    # roundings of at most half a step of the largest, or a sixteenth of each number, average out over two layers
    assert 0 < error < {"int8": 0.01, "fp8": 0.05}[kv_dtype]


# --- state that moves as one


def half_generated_in_8_bits(kv_dtype, rows=None):
    return half_generated({"spatial": 9, "semantic": 13}, rows, num_recent=3, kv_dtype=kv_dtype)


@both
@pytest.mark.parametrize("move", ["reorder", "select", "repeat"])
def test_rows_move_with_their_scales(kv_dtype, move):
    rows = torch.tensor({"reorder": [2, 0, 0], "select": [1, 2], "repeat": [0, 0, 1, 1, 2, 2]}[move])
    moved, expected = half_generated_in_8_bits(kv_dtype), half_generated_in_8_bits(kv_dtype, rows)
    move_and_go_on(moved, expected, move, rows)
    assert moved.nbytes == expected.nbytes


@both
def test_reset_makes_it_as_new(kv_dtype):
    model = tiny_janus(grid_side=6)
    cache = SSDCache(mixed_map(), 14, buffer=3, kv_dtype=kv_dtype)
    first = generate_image(model, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    generate_image(model, cache, lengths=(4,), seed=5)
    cache.reset()
    assert torch.equal(generate_image(model, cache), first)


@both
def test_a_deep_copy_goes_on_alike_and_apart(kv_dtype):
    original = half_generated_in_8_bits(kv_dtype)
    copied = copy.deepcopy(original)
    for step in range(12):
        states = random_states(3, 1, 50 + step)
        assert torch.equal(feed(original, states), feed(copied, states))
    before = [store.key_codes.clone() for layer in copied.layers for store in layer.stores]
    feed(original, random_states(3, 1, 99))
    after = [store.key_codes for layer in copied.layers for store in layer.stores]
    assert all(map(torch.equal, before, after))


# --- who makes the steps


@needs_compiler
@pytest.mark.parametrize(
    ("kv_dtype", "budget"), [("int8", {"spatial": 30, "semantic": 50}), ("fp8", 0.4)], ids=["two stores", "one"]
)
def test_compiled_steps_generate_eagers_tokens(kv_dtype, budget):
    torch._dynamo.reset()
    counters.clear()
    labels = HeadMap(torch.tensor([[True, False]]), grid=(12, 12))
    model = tiny_janus(layers=1, grid_side=12)
    eager, fast = (SSDCache(labels, budget, buffer=12, kv_dtype=kv_dtype) for _ in range(2))
    expected = generate_image(model, eager, do_sample=False)
    with fast_decode(model):
        assert torch.equal(generate_image(model, fast, do_sample=False), expected)
    assert counters["stats"]["unique_graphs"] == 1
    for mine, other in zip(fast.layers[0].stores, eager.layers[0].stores, strict=True):
        held = slice(other.num_stored)
        assert torch.equal(mine.positions[..., held], other.positions[..., held])


@both
def test_nothing_moves_in_memory_while_an_image_is_generated(kv_dtype):
    """What a recorded CUDA graph lives by; it reads codes and scales, so their addresses count too."""
    model = tiny_llama()
    ids = torch.randint(10, 40, (2, 100))
    cache = SSDCache(mixed_map(grid=(12, 12)), 30, buffer=12, kv_dtype=kv_dtype)
    places = static_addresses(model, cache, ids)
    assert len(set(places)) == 1
    store = cache.layers[0].stores[0]
    assert {store.key_codes.data_ptr(), store.value_scales.data_ptr()} <= set(places[0])


@needs_compiler
def test_where_nothing_is_evicted_eager_steps_take_the_kernel_for_8_bits_alone():
    """Without it their tokens equal those of a full cache bit for bit, which 8 bits rule out anyway."""
    for kv_dtype in (None, *KV_DTYPES):
        cache = SSDCache(mixed_map(), 1.0, kv_dtype=kv_dtype)
        generate_image(tiny_janus(grid_side=6), cache)
        assert all(layer.has_kernel == (kv_dtype is not None) for layer in cache.layers)


@needs_compiler
@both
@pytest.mark.parametrize("score", ["sum", "learned", "leverage"])
def test_the_kernel_generates_the_tokens_of_the_dequantising_path(kv_dtype, score, monkeypatch):
    """Greedy, with guidance and padding; the logits of these models are far apart."""
    model = tiny_janus(grid_side=6)
    learned = random_score(2, 2, 16, (6, 6)) if score == "learned" else None
    options = {"buffer": 3, "score": score, "num_recent": 2, "kv_dtype": kv_dtype}
    budget = {"spatial": 12, "semantic": 15}
    caches = [SSDCache(mixed_map(learned=learned), budget, **options) for _ in range(2)]
    tokens = generate_image(model, caches[0], do_sample=False)
    monkeypatch.setattr(dispatch, "can_serve", lambda *states, **options: False)
    assert torch.equal(tokens, generate_image(model, caches[1], do_sample=False))
    for mine, other in zip(
        *([store for layer in cache.layers for store in layer.stores] for cache in caches), strict=True
    ):
        held = slice(other.num_stored)
        assert mine.queries is None
        assert mine.nbytes == other.nbytes
        assert torch.equal(mine.positions[..., held], other.positions[..., held])


NO_KERNEL = {
    "no compiler": (None, "which need a C++ compiler"),
    "a dtype without a kernel": (torch.float64, "takes torch.float64 on this cpu"),
}


@needs_compiler
@both
@pytest.mark.parametrize("case", NO_KERNEL)
def test_without_a_kernel_it_says_so_once_and_dequantises(kv_dtype, case, monkeypatch):
    dtype, reason = NO_KERNEL[case]
    model = tiny_janus(grid_side=6).to(dtype or torch.float32)
    expected = generate_image(model, SSDCache(mixed_map(), 14, buffer=3, kv_dtype=kv_dtype), do_sample=False)
    asked = (dispatch.passes_trial, dispatch._warn_of_torch)
    for answer in asked:
        answer.cache_clear()
    if dtype is None:
        monkeypatch.setattr(cpu_loops, "library", functools.cache(lambda: None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            cache = SSDCache(mixed_map(), 14, buffer=3, kv_dtype=kv_dtype)
            assert torch.equal(generate_image(model, cache, do_sample=False), expected)
            assert not any(layer.has_kernel for layer in cache.layers)
    for answer in asked:
        answer.cache_clear()
    (told,) = [str(warning.message) for warning in caught if "converted" in str(warning.message)]
    assert told.startswith("torch's attention runs the steps over an SSDCache, for which slots in " + kv_dtype)
    assert reason in told


@both
def test_enable_hands_it_on(kv_dtype):
    model = tiny_janus(grid_side=6)
    inputs = {**left_padded_prompts((5, 9, 3)), "generation_mode": "image", "do_sample": False}
    cache = SSDCache(mixed_map(), 16, buffer=3, kv_dtype=kv_dtype)
    expected = model.generate(**inputs, **{CACHE: cache})
    with enable(model, mixed_map(), budget=16, buffer=3, kv_dtype=kv_dtype):
        assert torch.equal(model.generate(**inputs), expected)


@pytest.mark.parametrize(
    ("kv_dtype", "message"),
    [
        ("int4", "kv_dtype='int4' is unknown: did you mean 'int8'"),
        (
            "e4m3",
            "kv_dtype='e4m3' is unknown: give one of 'int8', 'fp8', or None to store visual tokens in the model's",
        ),
        (torch.int8, "kv_dtype=torch.int8 is unknown: give one of 'int8'"),
        (["int8"], r"kv_dtype=\['int8'\] is unknown"),
        (8, "kv_dtype=8 is unknown"),
    ],
)
def test_an_unknown_kv_dtype_is_refused(kv_dtype, message):
    with pytest.raises(ValueError, match=message):
        SSDCache(mixed_map(), 0.5, kv_dtype=kv_dtype)


def test_the_bundled_model_generates_its_prompt():
    bundled = find_generator(BUNDLED).load("float32", "cpu")
    caption = "a photo of a red circle and a blue square"
    cache = SSDCache(bundled.checkpoint.head_map(), kv_dtype="int8")
    generated = bundled.generate([caption], cache, seed=0)
    verdict = judge(generated[0], caption)
    assert verdict.correct, verdict.reason
    stats = cache.memory_stats()
    # a fifth of the visual tokens, at 36 bytes for 128, and the prompt whole
    assert stats.full_cache / stats.key_value > 10
