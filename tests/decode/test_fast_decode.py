"""`fast_decode`: compiled steps give eager's tokens, compile once, and leave nothing on the model.

Everything is compiled for real, on models so small that it takes seconds.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from helpers.compiling import held_tensors, needs_compiler, static_addresses
from helpers.models import left_padded_prompts, tiny_janus, tiny_llama
from torch._dynamo.utils import counters
from transformers import DynamicCache

from ssd_cache import HeadMap, SSDCache, enable, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.kernels import cpu_loops as cpu_kernels
from ssd_cache.kernels import dispatch as fused

GRID = (12, 12)
LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=GRID)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def generate(model, cache, lengths=(5, 9, 3), **kwargs):
    inputs = left_padded_prompts(lengths)
    return model.generate(**inputs, generation_mode="image", **{CACHE: cache}, do_sample=False, **kwargs)


SETTINGS = {
    "one store": {"budget": 0.4, "buffer": 12},
    "two stores": {"budget": {"spatial": 30, "semantic": 50}, "buffer": 12, "num_recent": 7},
    "full": {"budget": 1.0},
    "a buffer that does not divide the slots": {"budget": 50, "buffer": 8, "score": "mean", "num_sinks": 2},
}


@needs_compiler
@pytest.mark.parametrize("name", SETTINGS)
def test_compiled_images_are_eager_images_and_compile_once(name, monkeypatch):
    model = tiny_janus(grid_side=12)
    eager = SSDCache(LABELS, **SETTINGS[name])
    with monkeypatch.context() as patch:  # eager steps over heads of different lengths would run the same loop
        patch.setattr(fused, "can_serve", lambda *states, **options: False)
        expected = generate(model, eager)
    fast = SSDCache(LABELS, **SETTINGS[name])
    with fast_decode(model):
        assert torch.equal(generate(model, fast), expected)
        assert counters["stats"]["unique_graphs"] == 1
        assert torch.equal(generate(model, SSDCache(LABELS, **SETTINGS[name])), expected)
        assert counters["stats"]["unique_graphs"] == 1, "the second image compiled again"
    for ours, theirs in zip(fast.layers, eager.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.has_kernel
        assert not theirs.has_kernel
        for mine, other in zip(ours.stores, theirs.stores, strict=True):
            assert mine.queries is None
            other.score_window()
            held = slice(other.num_stored)
            assert torch.equal(mine.positions[..., held], other.positions[..., held])
            # two orders of the same sums: float32 rounding, over at most 144 queries
            torch.testing.assert_close(mine.received, other.received, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_an_online_cache_in_compiled_steps():
    model = tiny_janus(grid_side=12)
    online = HeadMap.online(num_layers=2, num_kv_heads=2, grid=GRID)
    eager, fast = SSDCache(online, 0.4), SSDCache(online, 0.4)
    expected = generate(model, eager)
    with fast_decode(model):
        assert torch.equal(generate(model, fast), expected)
    for ours, theirs in zip(fast.layers, eager.layers, strict=True):
        assert ours.has_kernel
        assert torch.equal(ours.stores[0].positions, theirs.stores[0].positions)


@needs_compiler
def test_text_model_with_grouped_heads_and_left_padding():
    model = tiny_llama()
    inputs = left_padded_prompts((7, 4, 6))
    options = {"do_sample": False, "max_new_tokens": 100}
    expected = model.generate(**inputs, **{CACHE: SSDCache(LABELS, 0.4)}, **options)
    with fast_decode(model):
        assert torch.equal(model.generate(**inputs, **{CACHE: SSDCache(LABELS, 0.4)}, **options), expected)
    assert counters["stats"]["unique_graphs"] == 1


@needs_compiler
def test_other_sizes_compile_a_little_more_and_stay_right():
    model = tiny_janus(grid_side=12)
    sizes = [(5, 9, 3), (4,), (6, 6), (8, 3, 2, 7)]
    expected = [generate(model, SSDCache(LABELS, 0.4), lengths=lengths) for lengths in sizes]
    with fast_decode(model):
        for lengths, tokens in zip(sizes, expected, strict=True):
            assert torch.equal(generate(model, SSDCache(LABELS, 0.4), lengths=lengths), tokens)
    assert counters["stats"]["unique_graphs"] <= 4


@needs_compiler
def test_the_decoder_itself_can_be_compiled_inside_counted_step():
    """`torch.compile(model.model.language_model, fullgraph=True)`, as a loop of one's own would use it."""
    model = tiny_janus(grid_side=12)
    decoder = model.model.language_model
    compiled = torch.compile(decoder, fullgraph=True)
    tokens = torch.randint(10, 40, (2, 150))

    def run(fast):
        cache = SSDCache(LABELS, 0.4, buffer=12)
        with torch.no_grad():
            states = [decoder(input_ids=tokens[:, :6], past_key_values=cache).last_hidden_state[:, -1]]
            for step in range(6, 150):
                token = {"input_ids": tokens[:, step : step + 1], "past_key_values": cache}
                if fast and cache.can_step_statically:
                    token["position_ids"] = torch.full((1, 1), step)
                    token["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
                    with cache.static_step():
                        states.append(compiled(**token).last_hidden_state[:, -1])
                else:
                    states.append(decoder(**token).last_hidden_state[:, -1])
        return torch.stack(states)

    # float32 rounding of two ways to sum the same softmax
    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_after_reset_another_models_scaling_counts():
    """The tensors of the last image serve again only where its scores were computed with the same scaling."""
    model, tokens = tiny_llama(), torch.randint(10, 40, (2, 100))
    cache, fresh = (SSDCache(LABELS, 30, buffer=12) for _ in range(2))

    def held(cache):
        model(tokens[:, :6], past_key_values=cache)
        for step in range(6, 100):
            model(tokens[:, step : step + 1], past_key_values=cache)
        return [positions for layer in cache.layers for positions in layer.held_positions()]

    before = held(cache)
    cache.reset()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 40
    expected = held(fresh)
    assert not all(map(torch.equal, before, expected)), "a scaling that changes nothing would show nothing"
    assert all(map(torch.equal, held(cache), expected))


def test_tensors_stay_in_place_during_an_image_and_after_reset():
    """A recorded CUDA graph depends on it: the same addresses at every static step, with evictions in between."""
    model = tiny_llama()
    tokens = torch.randint(10, 40, (2, 150))
    cache = SSDCache(LABELS, {"spatial": 30, "semantic": 50}, buffer=12)
    addresses = static_addresses(model, cache, tokens)
    assert len(set(addresses)) == 1
    version = cache.version
    held = [tensor.clone() for layer in cache.layers for tensor in layer.held_positions()]
    cache.reset()
    assert static_addresses(model, cache, tokens) == addresses
    assert cache.version == version
    again = [tensor for layer in cache.layers for tensor in layer.held_positions()]
    assert all(map(torch.equal, again, held))
    for replace in (
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0, 3])),
    ):
        before = [tensor.data_ptr() for tensor in held_tensors(cache)], cache.version
        replace()
        assert [tensor.data_ptr() for tensor in held_tensors(cache)] != before[0]
        assert cache.version != before[1]
    for rows, is_other in ((2, True), (1, True), (1, False), (2, True)):  # after those methods nothing is used again
        cache.reset()
        version = cache.version
        static_addresses(model, cache, tokens[:rows, :12])
        assert (cache.version != version) == is_other


@needs_compiler
def test_enable_can_be_fast():
    model = tiny_janus(grid_side=12)
    inputs = {**left_padded_prompts((5, 9, 3)), "generation_mode": "image", "do_sample": False}
    with enable(model, LABELS, budget=0.4):
        expected = model.generate(**inputs)
    before = dict(vars(model.get_decoder()))
    for _ in range(2):
        with enable(model, LABELS, fast=True, budget=0.4):
            assert torch.equal(model.generate(**inputs), expected)
    assert counters["stats"]["unique_graphs"] == 1, "the second block compiled again"
    assert vars(model.get_decoder()) == before
    assert "generate" not in vars(model)


def test_steps_may_be_compiled_in_mid_image_and_not():
    """The decoder alone, step by step: eager and compiled steps in turn lead to the same states."""
    model = tiny_llama()
    tokens = torch.randint(10, 40, (2, 100))

    def run(is_fast):
        cache = SSDCache(LABELS, 0.4, buffer=10)
        with torch.no_grad():
            outputs = [model(tokens[:, :6], past_key_values=cache).logits[:, -1]]
            for step in range(6, 100):
                with fast_decode(model) if is_fast(step) else torch.no_grad():
                    outputs.append(model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1])
        return torch.stack(outputs)

    # float32 rounding of two ways to sum the same softmax
    torch.testing.assert_close(run(lambda step: step % 20 > 10), run(lambda step: False), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_an_image_begun_inside_may_end_outside(budget):
    """The kernel that its prompt chose goes on, uncompiled, and the next image is an eager one again."""
    model = tiny_llama()
    tokens = torch.randint(10, 40, (2, 100))
    cache = SSDCache(LABELS, budget, buffer=10)

    def run(inside):
        with torch.no_grad(), fast_decode(model) if inside else nullcontext():
            states = [model(tokens[:, :6], past_key_values=cache).logits[:, -1]]
            for step in range(6, 40):
                states.append(model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1])
        with torch.no_grad():
            for step in range(40, 100):
                states.append(model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1])
        assert all(layer.has_kernel == (inside or budget < 1) for layer in cache.layers)
        cache.reset()
        return torch.stack(states)

    # float32 rounding of two ways to sum the same softmax
    torch.testing.assert_close(run(inside=True), run(inside=False), rtol=1e-4, atol=1e-4)


def test_other_caches_are_left_alone():
    model = tiny_janus(grid_side=12)
    expected = generate(model, DynamicCache())
    with fast_decode(model):
        assert torch.equal(generate(model, DynamicCache()), expected)
    assert counters["stats"]["unique_graphs"] == 0


def test_what_is_put_on_the_model_comes_off():
    model = tiny_janus(grid_side=12)
    decoder = model.get_decoder()
    before = dict(vars(decoder))
    with pytest.raises(KeyError), fast_decode(model):
        assert "forward" in vars(decoder)
        raise KeyError
    assert vars(decoder) == before


def test_without_a_compiler_it_says_so_once_and_goes_on():
    model = tiny_janus(grid_side=12)
    expected = generate(model, SSDCache(LABELS, 0.4))
    # by torch's own patch: an entry that stands for another is gone once pytest's monkeypatch has put it back
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",), "force_disable_caches": True})
    asked = (cpu_kernels.library, fused.passes_trial)
    for answer in asked:
        answer.cache_clear()
    before = dict(vars(model.get_decoder()))
    with no_compiler, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fast_decode(model):
            for _ in range(2):
                cache = SSDCache(LABELS, 0.4)
                assert torch.equal(generate(model, cache), expected)
    assert str(cache.served_by) == "torch's attention; steps: 143 eager"
    assert dict(vars(model.get_decoder())) == before
    for answer in asked:
        answer.cache_clear()
    told = [str(warning.message) for warning in caught if "fast_decode continues" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("fast_decode continues uncompiled")
    assert "/no/such/compiler" in told[0]


@needs_compiler
def test_where_its_loops_can_not_be_built_it_says_so_once_and_compiles_without(monkeypatch, tmp_path):
    model = tiny_janus(grid_side=12)
    expected = generate(model, SSDCache(LABELS, 0.4))
    (tmp_path / "loops.cpp").write_text("#error not for this processor")
    monkeypatch.setattr(cpu_kernels, "__file__", str(tmp_path / "loops.py"))
    asked = (cpu_kernels.library, fused.passes_trial)
    for answer in asked:
        answer.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fast_decode(model):
            cache = SSDCache(LABELS, 0.4)
            assert torch.equal(generate(model, cache), expected)
    for answer in asked:
        answer.cache_clear()
    assert str(cache.served_by) == "torch's attention; steps: 1 eager, 142 compiled"
    assert counters["stats"]["unique_graphs"] == 1
    told = [str(warning.message) for warning in caught if "fast_decode continues" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith("fast_decode continues without ssd-cache's CPU kernels")
