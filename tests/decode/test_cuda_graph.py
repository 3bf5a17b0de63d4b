"""Recorded steps, with a stand-in for the driver: when one is recorded, what failure leaves, which devices take part.

The stand-in has the two habits of `torch.cuda.graph` that matter: recording executes nothing, and a stream is restored
only where ending the capture succeeds. Graphs on a real GPU are in test_fused.py.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers.compiling import held_tensors, needs_compiler
from helpers.models import left_padded_prompts, tiny_llama

from ssd_cache import HeadMap, SSDCache, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.decode.cuda_graph import WARM_UP, can_record

LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(8, 8))
SETTINGS = {"budget": 24, "buffer": 8, "num_recent": 4}
NUM_TOKENS = 20


class Driver:
    """CUDA's streams and graphs, for a model on the CPU whose decoder's `forward` is `patch`."""

    def __init__(self, fails):
        self.fails, self.stream, self.is_capturing = fails, "default", False
        self.num_captures = self.num_replays = 0

    def install(self, monkeypatch, patch, cache):
        self.cache, self.step = cache, patch.compiled
        patch.compiled = self.run
        for name in ("graph", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "stream", self.use_stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=self.replay))
        module = importlib.import_module("ssd_cache.decode.fast_decode")  # the package has a function of this name
        monkeypatch.setattr(module, "can_record", lambda cache, device: True)

    def run(self, **arguments):
        if not self.is_capturing:
            return self.step(**arguments)
        if self.fails == "body":
            raise RuntimeError("operation not permitted when stream is capturing")
        held = [tensor.clone() for tensor in held_tensors(self.cache)]
        self.arguments, self.outputs = arguments, self.step(**arguments)
        for tensor, before in zip(held_tensors(self.cache), held, strict=True):
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
    def graph(self, graph, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        before, self.stream, self.is_capturing = self.stream, "capture", True
        self.num_captures += 1
        try:
            yield
        finally:
            self.is_capturing = False
            if self.fails:
                raise RuntimeError("capture was invalidated")
            self.stream = before

    def replay(self):
        self.num_replays += 1
        self.outputs.last_hidden_state.copy_(self.step(**self.arguments).last_hidden_state)


def generate(model, cache):
    return model.generate(
        **left_padded_prompts((5, 9)), **{CACHE: cache}, do_sample=False, max_new_tokens=NUM_TOKENS + 1
    )


@needs_compiler
@pytest.mark.parametrize("fails", [None, "body", "exit"])
def test_a_step_is_recorded_once_and_failure_leaves_nothing(fails, monkeypatch):
    torch._dynamo.reset()
    model = tiny_llama()
    expected = generate(model, SSDCache(LABELS, **SETTINGS))
    cache, driver = SSDCache(LABELS, **SETTINGS), Driver(fails)
    with fast_decode(model), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch = model.get_decoder().forward
        driver.install(monkeypatch, patch, cache)
        assert torch.equal(generate(model, cache), expected)
        assert patch.is_usable, "a failed capture was taken for a failed compiler"
        assert patch.is_recorded == (fails is None)
    told = [str(warning.message) for warning in caught if "fast_decode continues" in str(warning.message)]
    assert len(told) == (fails is not None)
    assert all(text.startswith("fast_decode continues without CUDA graphs") for text in told)
    assert driver.num_captures == 1
    # one visual token runs as ever, and the next WARM_UP before one is recorded
    assert driver.num_replays == (NUM_TOKENS - 1 - WARM_UP if fails is None else 0)
    assert driver.stream == "default"


def test_only_layers_on_one_gpu_are_recorded():
    first, second, cpu = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")

    def on(*devices):
        return SimpleNamespace(layers=[SimpleNamespace(device=device) for device in devices])

    assert can_record(on(first, first), first)
    assert not can_record(on(first, second), first)
    assert not can_record(on(second, second), first)
    assert not can_record(on(cpu, cpu), cpu)
