"""Recorded steps, with a stand-in for the driver: when one is recorded and again, and what a failure leaves.

The stand-in has the two habits of `torch.cuda.graph` that matter: recording executes nothing, and a stream is restored
only where ending the capture succeeds. Graphs on a real GPU are in test_fused.py.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.compiling import held_tensors, needs_compiler
from helpers.models import left_padded_prompts, tiny_llama
from torch._dynamo.utils import counters

from ssd_cache import HeadMap, SSDCache, enable, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.decode.cuda_graph import WARM_UP, can_record, devices_of

LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(8, 8))
SETTINGS = {"budget": 24, "buffer": 8, "num_recent": 4}
NUM_TOKENS = 20


class Driver:
    """CUDA's streams and graphs, for a model on the CPU whose decoder's `forward` is `patch`."""

    def __init__(self, monkeypatch, fails=None):
        self.fails, self.stream, self.is_capturing = fails, "default", False
        self.num_captures = self.num_replays = 0
        for name in ("graph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", self.use_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        self.ended = []
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: self.ended.append(pool), raising=False)
        module = importlib.import_module("ssd_cache.decode.fast_decode")  # the package has a function of this name
        monkeypatch.setattr(module, "can_record", lambda device: True)

    def drive(self, patch):
        self.step, patch.compiled = patch.compiled, self.run

    def run(self, **arguments):
        if not self.is_capturing:
            return self.step(**arguments)
        if self.fails == "body":
            raise RuntimeError("operation not permitted when stream is capturing")
        if self.fails == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        held = [tensor.clone() for tensor in held_tensors(arguments[CACHE])]
        self.arguments, self.outputs = arguments, self.step(**arguments)
        for tensor, before in zip(held_tensors(arguments[CACHE]), held, strict=True):
            tensor.copy_(before)  # recording executes nothing
        return self.outputs

    def current_stream(self):
        return self.stream

    @contextmanager
    def use_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode="global"):
        assert (pool, stream, capture_error_mode) == ((0, 1), "a stream of cpu", "thread_local")
        before, self.stream, self.is_capturing = self.stream, stream, True
        self.num_captures += 1
        try:
            yield
        finally:
            self.is_capturing = False
            if self.fails in ("body", "exit"):
                raise RuntimeError("capture was invalidated")
            self.stream = before

    def replay(self):
        self.num_replays += 1
        self.outputs.last_hidden_state.copy_(self.step(**self.arguments).last_hidden_state)


PROMPTS = left_padded_prompts((5, 9))
OPTIONS = {"do_sample": False, "max_new_tokens": NUM_TOKENS + 1}


def generate(model, cache):
    return model.generate(**PROMPTS, **{CACHE: cache}, **OPTIONS)


@pytest.fixture
def model():
    torch._dynamo.reset()
    return tiny_llama()


@contextmanager
def warned():
    """The texts of `fast_decode`'s warnings inside the block."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    found = [str(warning.message) for warning in caught]
    texts += [text for text in found if text.startswith("fast_decode continues")]


@needs_compiler
@pytest.mark.parametrize("fails", [None, "body", "exit", "memory"])
def test_a_step_is_recorded_once_and_failure_leaves_nothing(fails, model, monkeypatch):
    expected, before = generate(model, SSDCache(LABELS, **SETTINGS)), dict(vars(model.get_decoder()))
    cache, driver = SSDCache(LABELS, **SETTINGS), Driver(monkeypatch, fails)
    with fast_decode(model), warned() as told:
        patch = model.get_decoder().forward
        driver.drive(patch)
        assert torch.equal(generate(model, cache), expected)
        assert patch.is_usable, "a failed capture was taken for a failed compiler"
        assert patch.is_recorded == (fails is None)
    assert len(told) == (fails is not None)
    reasons = {"body": "not permitted", "exit": "invalidated", "memory": "CUDA out of memory"}
    for text in told:
        assert text.startswith("fast_decode continues without CUDA graphs: ")
        assert reasons[fails] in text
    assert driver.num_captures == 1
    # one visual token runs as ever, and the next WARM_UP before one is recorded
    assert driver.num_replays == (NUM_TOKENS - 1 - WARM_UP if fails is None else 0)
    assert driver.stream == "default"
    # after a failure, the allocator does not go on as in a recording
    assert driver.ended == ([] if fails is None else [(None, (0, 1))])
    served = cache.served_by
    assert (served.attention, served.eager, served.replayed) == ("CPU loop", 1, driver.num_replays)
    assert served.compiled == NUM_TOKENS - 1 - driver.num_replays
    expected_words = f"1 eager, 2 compiled, {NUM_TOKENS - 3} replayed as a CUDA graph" if fails is None else "compiled"
    assert expected_words in str(served)
    assert dict(vars(model.get_decoder())) == before


@needs_compiler
def test_nothing_is_compiled_while_a_step_is_recorded_in_inference_mode(model, monkeypatch):
    cache, driver = SSDCache(LABELS, **SETTINGS), Driver(monkeypatch)
    with fast_decode(model), torch.inference_mode():
        driver.drive(model.get_decoder().forward)
        counters.clear()
        expected = generate(copy.deepcopy(model), SSDCache(LABELS, **SETTINGS))
        assert torch.equal(generate(model, cache), expected)
        assert driver.num_captures == 1
        assert counters["stats"]["unique_graphs"] == 1


@needs_compiler
def test_next_images_replay_the_graph_until_the_model_changes(model, monkeypatch):
    cache, driver, norm = SSDCache(LABELS, **SETTINGS), Driver(monkeypatch), model.get_decoder().norm

    def image():
        expected = generate(copy.deepcopy(model), SSDCache(LABELS, **SETTINGS))  # the copy carries no block
        assert torch.equal(generate(model, cache), expected)
        served = cache.served_by
        cache.reset()
        assert cache.served_by.replayed == 0
        return driver.num_captures, served.replayed

    with fast_decode(model):
        driver.drive(model.get_decoder().forward)
        assert image() == (1, NUM_TOKENS - 1 - WARM_UP)
        assert image() == image() == (1, NUM_TOKENS - 2), "each image runs one step before the graph"
        norm.weight = torch.nn.Parameter(norm.weight.detach() * 3)  # another address, by the same code
        assert image() == (2, NUM_TOKENS - 1 - WARM_UP)
        norm.variance_epsilon = 0.5  # other code at the same addresses; so does a change of adapters
        assert image() == (3, NUM_TOKENS - 1 - WARM_UP)
        assert image() == (3, NUM_TOKENS - 2)
        cache.reorder_cache(torch.tensor([1, 0]))  # other tensors of the cache
        assert image() == (4, NUM_TOKENS - 1 - WARM_UP)


@needs_compiler
@torch.no_grad()
def test_no_graph_is_replayed_after_linear_layers_were_merged(model, monkeypatch):
    """A graph has the addresses of separate weights, which merging has freed."""
    module = importlib.import_module("ssd_cache.decode.fast_decode")
    monkeypatch.setattr(module, "packed_linears", nullcontext)  # nothing is packed on a GPU
    tokens, driver = torch.randint(10, 40, (2, 40)), Driver(monkeypatch)
    caches = [SSDCache(LABELS, **SETTINGS) for _ in range(2)]

    def step(cache, start, end):
        states = model(tokens[:, start:end], past_key_values=cache).logits[:, -1]
        return states, driver.num_captures, driver.num_replays

    def expect(start, end):
        return step(caches[1], start, end)[0]

    expected = [expect(0, 6), *(expect(at, at + 1) for at in range(6, 20))]
    with fast_decode(model):
        driver.drive(model.get_decoder().forward)
        found = [step(caches[0], 0, 6), *(step(caches[0], at, at + 1) for at in range(6, 12))]
        assert found[-1][1:] == (1, 3)
        with fast_decode(model, merge_linears=True):
            found += [step(caches[0], at, at + 1) for at in range(12, 16)]
            assert [counts for _, *counts in found[-4:]] == [[1, 3], [1, 3], [2, 4], [2, 5]]
            linear = model.model.layers[0].self_attn.q_proj
            linear.weight.data = linear.weight.data.clone()  # the graph's weights stay in memory until the next image
        found += [step(caches[0], at, at + 1) for at in range(16, 20)]
        for (states, *_), reference in zip(found, expected, strict=True):
            # float32 rounding of two ways to sum the same softmax
            torch.testing.assert_close(states, reference, rtol=1e-4, atol=1e-4)
        caches[0].reset()
        linear.weight.data = linear.weight.data * 3
        counts = [step(caches[0], 0, 6), *(step(caches[0], at, at + 1) for at in range(6, 11))]
        caches[1].reset()
        assert [counts for _, *counts in counts[2:]] == [[2, 9], [2, 9], [3, 10], [3, 11]]


@needs_compiler
def test_enable_keeps_one_cache_and_its_graph(model, made, monkeypatch):
    driver, calls = Driver(monkeypatch), {**PROMPTS, **OPTIONS}
    expected = generate(model, SSDCache(LABELS, **SETTINGS))
    block = enable(model, LABELS, fast=True, **SETTINGS)
    with block:
        driver.drive(model.get_decoder().forward)
        for replayed in (NUM_TOKENS - 1 - WARM_UP, NUM_TOKENS - 2, NUM_TOKENS - 2):
            assert torch.equal(model.generate(**calls), expected)
            assert block.served_by().replayed == replayed
        assert (driver.num_captures, len(made)) == (1, 2), "a cache to check the settings, and one for all calls"
        output = model.generate(**calls, return_dict_in_generate=True)
        assert output.past_key_values is made[1]
        assert torch.equal(model.generate(**calls), expected)
        assert output.past_key_values.get_seq_length() == 9 + NUM_TOKENS, "a cache that the caller has was used again"
        assert len(made) == 3


@needs_compiler
def test_layers_on_two_gpus_are_compiled_and_not_recorded(model, monkeypatch):
    expected, driver = generate(model, SSDCache(LABELS, **SETTINGS)), Driver(monkeypatch)
    module = importlib.import_module("ssd_cache.decode.fast_decode")
    monkeypatch.setattr(module, "devices_of", lambda cache, device: ["cuda:0", "cuda:1"])
    with fast_decode(model), warned() as told:
        driver.drive(model.get_decoder().forward)
        for _ in range(2):
            cache = SSDCache(LABELS, **SETTINGS)
            assert torch.equal(generate(model, cache), expected)
    (text,) = told
    assert text == (
        "fast_decode continues without CUDA graphs: the layers are on cuda:0, cuda:1, and a graph records one device"
    )
    assert (driver.num_captures, cache.served_by.compiled, cache.served_by.replayed) == (0, NUM_TOKENS - 1, 0)


def test_the_devices_of_a_step_are_those_of_input_and_layers():
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)

    def on(*devices):
        return SimpleNamespace(layers=[SimpleNamespace(device=device) for device in devices])

    assert devices_of(on(first, first), first) == ["cuda:0"]
    assert devices_of(on(second, second), first) == devices_of(on(first, second), first) == ["cuda:0", "cuda:1"]
    assert can_record(first)
    assert not can_record(torch.device("cpu"))
