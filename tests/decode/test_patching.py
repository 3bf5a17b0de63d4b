"""Patches on shared attributes: blocks leave in any order, overlap from several threads, and leave nothing behind."""

from __future__ import annotations

import asyncio
import copy
import gc
import importlib
import pickle
import threading
import warnings
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from helpers.compiling import needs_compiler
from helpers.models import left_padded_prompts, tiny_janus, tiny_llama
from transformers import DynamicCache

from ssd_cache import HeadMap, SSDCache, enable, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.decode.guidance import batched_guidance
from ssd_cache.decode.patching import Block, Patch, patched

GRID = (8, 8)
LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=GRID)
OTHER = ~LABELS
SETTINGS = {"budget": 24, "buffer": 8, "num_recent": 4}


class Add(Patch):
    """Adds to a function's result the number of its open blocks."""

    def __call__(self, *args):
        return self.inner(*args) + len(self.owners)


class Double(Patch):
    def __call__(self, *args):
        return 2 * self.inner(*args) if self.owners else self.inner(*args)


class Target:
    def number(self, start=10):
        return start


def generate(model, cache=None, lengths=(5, 9), **options):
    options = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True, **options}
    given = {} if cache is None else {CACHE: cache}
    return model.generate(**left_padded_prompts(lengths), **given, **options)


def in_threads(*functions):
    """Run functions at once, and raise what the first of them raised."""
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise errors[0]


# --- the mechanism --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_own", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_blocks_leave_in_any_order_and_the_attribute_is_as_before(has_own, order):
    target = Target()
    if has_own:
        target.number = lambda: 100
    before = dict(vars(target))
    blocks = [patched(target, "number", kind, Block()) for kind in (Add, Double, Add)]
    for block in blocks:
        block.__enter__()
    assert target.number() == 2 * ((100 if has_own else 10) + 2)
    for number in order:
        blocks[number].__exit__(None, None, None)
    assert vars(target) == before
    assert target.number() == (100 if has_own else 10)


def test_what_foreign_code_puts_around_a_patch_stays():
    target = Target()
    block = patched(target, "number", Add, Block())
    block.__enter__()
    inner = target.number
    target.number = lambda: 1000 + inner()
    assert target.number() == 1011
    block.__exit__(None, None, None)
    assert target.number() == 1010
    target.number = inner  # as foreign code that restores what it found
    with patched(target, "number", Add, Block()):
        assert target.number() == 11
    assert not vars(target)


def test_a_copy_and_a_pickle_of_the_target_have_the_original():
    model = tiny_llama()
    expected = generate(model, DynamicCache()).sequences
    with enable(model, LABELS, **SETTINGS), fast_decode(model), batched_guidance(model, 3.0):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.data.zero_()  # a copy that still called the model's own generate would show it
    for other in copies:
        assert torch.equal(generate(other, DynamicCache()).sequences, expected)
        with enable(other, LABELS, **SETTINGS):
            assert isinstance(generate(other).past_key_values, SSDCache)
        assert isinstance(generate(other).past_key_values, DynamicCache)


# --- enable ---------------------------------------------------------------------------------------------------


def is_clean(model):
    return "generate" not in vars(model) and not {"forward", "_attention_in_force"} & set(vars(model.get_decoder()))


@pytest.mark.parametrize("is_first_out", [True, False])
def test_enable_blocks_that_overlap_leave_nothing(is_first_out):
    model = tiny_llama(attn_implementation="eager")
    first, second = enable(model, LABELS, **SETTINGS), enable(model, OTHER, **SETTINGS)
    first.__enter__()
    second.__enter__()
    assert generate(model).past_key_values.head_map == OTHER
    leaving, staying = (first, second) if is_first_out else (second, first)
    leaving.__exit__(None, None, None)
    assert model.config._attn_implementation == "ssd"
    assert generate(model).past_key_values.head_map == (OTHER if is_first_out else LABELS)
    staying.__exit__(None, None, None)
    assert model.config._attn_implementation == "eager"
    assert is_clean(model)
    assert isinstance(generate(model).past_key_values, DynamicCache)


def test_generators_and_stacks_that_are_never_finished_leave_nothing():
    model = tiny_llama(attn_implementation="sdpa")

    def caches(head_map):
        with enable(model, head_map, fast=True, **SETTINGS):
            while True:
                yield 1

    first, second = caches(LABELS), caches(OTHER)
    next(first), next(second)
    del first  # closed, not finished, and before the one that was begun later
    gc.collect()
    assert model.config._attn_implementation == "ssd"
    second.close()
    stack = ExitStack()
    stack.enter_context(enable(model, LABELS, **SETTINGS))
    del stack
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
    assert is_clean(model)


def test_one_block_may_be_entered_repeatedly_and_be_a_decorator():
    model = tiny_llama(attn_implementation="sdpa")
    block = enable(model, LABELS, **SETTINGS)
    for _ in range(2):
        with block, block:
            assert isinstance(generate(model).past_key_values, SSDCache)
        assert is_clean(model)
    assert isinstance(block(generate)(model).past_key_values, SSDCache)
    assert is_clean(model)


@pytest.mark.parametrize("fails", ["ssd_attention", "fast_decode"])
def test_an_entry_that_fails_is_undone(fails, monkeypatch):
    model = tiny_llama(attn_implementation="sdpa")
    module = importlib.import_module("ssd_cache.enabling")
    before = {name: type(module) for name, module in model.named_modules()}

    @contextmanager
    def failing(*args, **kwargs):
        with getattr(real, fails)(*args, **kwargs):
            raise RuntimeError("stop")
            yield

    real = type("Real", (), {fails: staticmethod(getattr(module, fails))})
    monkeypatch.setattr(module, fails, failing)
    with pytest.raises(RuntimeError, match="stop"), enable(model, LABELS, fast=True, **SETTINGS):
        pass
    assert is_clean(model)
    assert model.config._attn_implementation == "sdpa"
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_two_threads_with_unlike_blocks_get_each_its_own():
    model, barrier, found = tiny_llama(attn_implementation="sdpa"), threading.Barrier(2, timeout=60), {}

    def run(name, head_map):
        with enable(model, head_map, **SETTINGS):
            barrier.wait()
            for _ in range(3):
                found.setdefault(name, []).append(generate(model))
            barrier.wait()

    in_threads(lambda: run("first", LABELS), lambda: run("second", OTHER))
    assert is_clean(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("ssd")
    for name, head_map in (("first", LABELS), ("second", OTHER)):
        expected = generate(model, SSDCache(head_map, **SETTINGS)).sequences
        for output in found[name]:
            assert output.past_key_values.head_map == head_map
            assert torch.equal(output.sequences, expected)


def test_a_thread_that_entered_no_block_is_served_by_the_only_one():
    model, found = tiny_llama(), []
    with enable(model, LABELS, **SETTINGS):
        in_threads(*[lambda: found.append(generate(model).past_key_values.head_map)] * 2)
        with enable(model, OTHER, **SETTINGS):
            with pytest.raises(RuntimeError, match="2 enable blocks are open on this model and this thread or task"):
                in_threads(lambda: generate(model))
    assert found == [LABELS, LABELS]


def test_two_tasks_of_one_thread_get_each_its_own():
    model = tiny_llama()

    async def run(head_map):
        with enable(model, head_map, **SETTINGS):
            await asyncio.sleep(0)
            found = generate(model).past_key_values.head_map
            await asyncio.sleep(0)
        return found

    async def both():
        return await asyncio.gather(run(LABELS), run(OTHER))

    assert asyncio.run(both()) == [LABELS, OTHER]


def test_unlike_attentions_of_two_threads_are_refused():
    model = tiny_llama(attn_implementation="eager")
    with ssd_attention(model, "sdpa"):
        with ssd_attention(model):
            assert model.config._attn_implementation == "ssd"
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(RuntimeError, match="holds this model's attention at 'sdpa', and this one asks for 'ssd'"):
            in_threads(lambda: enable(model, LABELS, **SETTINGS).__enter__())
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "eager"
    assert is_clean(model)


def test_the_models_that_are_compiled_as_a_whole_work_too():
    model = tiny_llama(attn_implementation="sdpa")
    compiled = torch.compile(model)
    with enable(compiled, LABELS, **SETTINGS) as given:
        assert given is compiled
        found = [generate(each) for each in (compiled, model)]
    assert all(isinstance(output.past_key_values, SSDCache) for output in found)
    assert is_clean(model)
    model.set_attn_implementation("ssd")
    expected = generate(model, SSDCache(LABELS, **SETTINGS)).sequences
    assert all(torch.equal(output.sequences, expected) for output in found)
    with batched_guidance(compiled, 2.0):
        cache = SSDCache(LABELS, **SETTINGS)
        generate(compiled, cache)
        assert cache.layers[0].stores[0].keys.shape[0] == 4


# --- guidance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [True, False])
def test_guided_calls_of_two_threads_are_each_guided_once(is_shared):
    model, barrier, found = tiny_llama(), threading.Barrier(2, timeout=60), {}
    scales = (2.0, 4.0)
    with enable(model, LABELS, **SETTINGS):
        expected = {scale: generate(model, guidance_scale=scale).sequences for scale in scales}

        def run(scale):
            barrier.wait()
            for _ in range(3):
                if is_shared:
                    found.setdefault(scale, []).append(generate(model, guidance_scale=scale).sequences)
                else:
                    with batched_guidance(model, scale):
                        cache = SSDCache(LABELS, **SETTINGS)
                        found.setdefault(scale, []).append(generate(model, cache).sequences)
            barrier.wait()

        in_threads(*(lambda scale=scale: run(scale) for scale in scales))
    assert "forward" not in vars(model)
    assert not torch.equal(*expected.values())
    for scale in scales:
        assert all(torch.equal(sequences, expected[scale]) for sequences in found[scale])


def test_an_unguided_call_beside_a_guided_one_stays_unguided():
    model, is_guiding, may_end = tiny_llama(), threading.Event(), threading.Event()
    expected = generate(model, SSDCache(LABELS, **SETTINGS)).sequences

    def hold(batch_id, ids):
        is_guiding.set()
        assert may_end.wait(60)
        return list(range(64))

    def guided():
        generate(model, guidance_scale=3.0, max_new_tokens=2, prefix_allowed_tokens_fn=hold)

    def plain():
        assert is_guiding.wait(60)
        found.append(generate(model).sequences)
        may_end.set()

    found = []
    with enable(model, LABELS, **SETTINGS):
        in_threads(guided, plain)
    assert torch.equal(found[0], expected)


# --- fast_decode ----------------------------------------------------------------------------------------------


@needs_compiler
def test_nested_fast_decode_counts_every_token_once():
    torch._dynamo.reset()
    model = tiny_janus(grid_side=8)
    inputs = {**left_padded_prompts((5, 9)), "generation_mode": "image", "do_sample": False}
    expected = model.generate(**inputs, **{CACHE: SSDCache(LABELS, **SETTINGS)})
    before = {name: type(module) for name, module in model.named_modules()}
    with warnings.catch_warnings(), fast_decode(model), fast_decode(model):
        warnings.filterwarnings("error", message="SSDCache is past|fast_decode continues")
        cache = SSDCache(LABELS, **SETTINGS)
        assert torch.equal(model.generate(**inputs, **{CACHE: cache}), expected)
        assert cache.get_seq_length() == 9 + 63
        with enable(model, LABELS, fast=True, **SETTINGS):
            assert torch.equal(model.generate(**inputs), expected)
    assert is_clean(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@needs_compiler
def test_fast_decode_of_two_models_that_share_a_decoder():
    torch._dynamo.reset()
    first, second = tiny_llama(), tiny_llama(seed=1)
    second.model = first.model
    models = (first, second)
    expected = [generate(model, SSDCache(LABELS, **SETTINGS)).sequences for model in models]
    blocks = [fast_decode(model) for model in models]
    for block in blocks:
        block.__enter__()
    for model, sequences in zip(models, expected, strict=True):
        assert torch.equal(generate(model, SSDCache(LABELS, **SETTINGS)).sequences, sequences)
    blocks[0].__exit__(None, None, None)
    assert torch.equal(generate(second, SSDCache(LABELS, **SETTINGS)).sequences, expected[1])
    blocks[1].__exit__(None, None, None)
    assert is_clean(first)
    assert all(type(module) is torch.nn.Linear for module in (first.lm_head, second.lm_head))


@needs_compiler
@pytest.mark.parametrize("is_shared", [True, False])
def test_fast_decode_from_two_threads_is_exact(is_shared):
    torch._dynamo.reset()
    model, found = tiny_llama(), {}
    lengths = [(5, 9), (7, 9), (9, 5), (3, 9)]
    expected = [generate(model, SSDCache(LABELS, **SETTINGS), lengths=each).sequences for each in lengths]

    def run(first):
        for number in range(first, len(lengths), 2):
            found[number] = generate(model, SSDCache(LABELS, **SETTINGS), lengths=lengths[number]).sequences

    def own_block(first):
        with fast_decode(model):
            run(first)

    with fast_decode(model) if is_shared else nullcontext():
        in_threads(*((lambda first=first: (run if is_shared else own_block)(first)) for first in range(2)))
    assert all(torch.equal(found[number], sequences) for number, sequences in enumerate(expected))
    assert is_clean(model)
    assert type(model.lm_head) is torch.nn.Linear


@needs_compiler
def test_fast_decode_of_a_model_that_is_compiled_as_a_whole():
    torch._dynamo.reset()
    model = tiny_llama()
    compiled, tokens = torch.compile(model, backend="eager"), left_padded_prompts((30, 30))["input_ids"]
    expected = generate(model, SSDCache(LABELS, **SETTINGS)).sequences

    @torch.no_grad()
    def steps(forward):
        cache = SSDCache(LABELS, **SETTINGS)
        states = [forward(input_ids=tokens[:, :6], **{CACHE: cache}).logits[:, -1]]
        for step in range(6, 9):
            states.append(forward(input_ids=tokens[:, step : step + 1], **{CACHE: cache}).logits[:, -1])
        assert cache.get_seq_length() == 9
        return torch.stack(states)

    plain = steps(model)
    with fast_decode(compiled) as given:
        assert given is compiled
        assert torch.equal(generate(compiled, SSDCache(LABELS, **SETTINGS)).sequences, expected)
        # float32 rounding of two ways to sum the same softmax
        torch.testing.assert_close(steps(compiled), plain, rtol=1e-4, atol=1e-4)
    assert is_clean(model)
