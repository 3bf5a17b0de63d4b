"""Static steps refuse what eager steps refuse, with the same errors, and work under autocast; no process ends."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from helpers.compiling import needs_compiler
from helpers.models import left_padded_prompts, tiny_janus, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_cache import HeadMap, SSDCache, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.cache import scorers
from ssd_cache.cache.eviction import slot_of
from ssd_cache.cache.scorers import LastScorer, Scorer
from ssd_cache.cache.slots import NUM_AHEAD

LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(12, 12))

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def _compiler():
    """A fresh one; and no error is raised for a warning that the compiler gives up before eager says what is wrong."""
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


SETTINGS = {"kernel": {}, "kernel for 8 bits": {"kv_dtype": "int8"}, "torch": {"score": "last"}}
"""Settings of caches whose steps the loops do, and torch's own operations."""


class OwnSum(LastScorer):
    """The score "last" with a sum of its own, which no kernel adds up."""

    def observe(self, received, weights):
        super().observe(received, weights)


@pytest.fixture(autouse=True)
def _last_has_its_own_sum(monkeypatch):
    monkeypatch.setattr(scorers, "SCORES", {**scorers.SCORES, "last": OwnSum})


def begin(model, rows=2, steps=3, **settings):
    """A cache in the middle of an image of `rows` rows; inside `fast_decode`, of static steps from the second on."""
    cache = SSDCache(LABELS, 0.4, buffer=4, **settings)
    tokens = torch.randint(10, 40, (rows, 6 + steps), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :6], past_key_values=cache)
    for step in range(6, 6 + steps):
        model(tokens[:, step : step + 1], past_key_values=cache)
    return cache


def token(rows):
    return torch.full((rows, 1), 11)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("rows", [64, 1])
def test_another_number_of_rows_is_refused_and_nothing_is_counted(rows, settings):
    model = tiny_llama()
    with fast_decode(model):
        cache = begin(model, **settings)
        seen = cache.get_seq_length()
        with pytest.raises(ValueError, match=f"holds 2 rows .* and got {rows} rows"):
            model(token(rows), past_key_values=cache)
        assert cache.get_seq_length() == seen
        model(token(2), past_key_values=cache)
        assert cache.get_seq_length() == seen + 1


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_rows_selected_in_the_middle_of_an_image(settings):
    """The cache goes on with the rows selected, as it does eagerly, and refuses the others."""
    model = tiny_llama()
    logits = []
    for is_fast in (False, True):
        with fast_decode(model) if is_fast else torch.no_grad():
            cache = begin(model, rows=3, **settings)
            cache.batch_select_indices(torch.tensor([2, 0]))
            with pytest.raises(ValueError, match="holds 2 rows .* and got 3 rows"):
                model(token(3), past_key_values=cache)
            logits.append(torch.stack([model(token(2), past_key_values=cache).logits for _ in range(40)]))
            assert cache.layers[0].has_kernel == ("score" not in settings)
    # float32 rounding of two ways to sum the same softmax
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


class Operations(TorchDispatchMode):
    """The operations of torch that start work on a device; a view does not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_host_side_of_a_static_step_is_one_copy():
    """An eviction writes the positions of all tokens until the next, and slots are computed for many tokens at once."""
    model, cache = tiny_llama(), SSDCache(LABELS.with_grid((40, 20)), {"spatial": 30, "semantic": 50}, buffer=12)
    cache.allow_cpu_kernel()  # as inside `fast_decode`: no query is held, and none is scored
    model(torch.full((2, 6), 11), past_key_values=cache)
    model(token(2), past_key_values=cache)
    for number in range(1, NUM_AHEAD + 100):
        with Operations() as operations, cache.static_step():
            count = len(operations.names)
            slots = [[int(slot) for slot in layer.slots] for layer in cache.layers]
        sizes = [[store.plan.num_slots for store in layer.stores] for layer in cache.layers]
        assert slots == [[slot_of(number, size, 12) for size in layer] for layer in sizes]
        evicts = any(number >= size and (number - size) % 12 == 0 for size in (30, 50))
        if not evicts and number not in (1, 1 + NUM_AHEAD):
            assert count == 1, operations.names


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_in_the_middle_of_an_image_is_refused(dtype, settings):
    model = tiny_llama()
    with fast_decode(model):
        cache = begin(model, **settings)
        model.to(dtype)
        with pytest.raises(ValueError, match=rf"rows of torch.float32 on cpu and got 2 rows of {dtype}"):
            model(token(2), past_key_values=cache)


@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("change", [lambda s: s.to("meta"), lambda s: s.double(), lambda s: s.repeat(32, 1, 1, 1)])
def test_the_layer_refuses_it_in_either_kind_of_step(change, is_static):
    model, states = tiny_llama(), torch.randn(2, 2, 1, 8)
    for keys, values in ((change(states), change(states)), (states, change(states)), (change(states), states)):
        cache = begin(model, steps=1)
        with pytest.raises(ValueError, match="of SSDCache holds 2 rows"):
            with cache.static_step() if is_static else torch.no_grad():
                cache.update(keys, values, 0)


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_janus(grid_side=12)], ids=["llama", "janus"])
def test_autocast_generates_what_it_generates_eagerly(make):
    model = make()
    options = {**left_padded_prompts((5, 8)), "do_sample": False}
    options |= {"max_new_tokens": 60} if make is tiny_llama else {"generation_mode": "image"}

    def generate():
        with torch.autocast("cpu", torch.bfloat16):
            return model.generate(**options, **{CACHE: SSDCache(LABELS, 0.4, buffer=12)})

    expected = generate()
    with fast_decode(model):
        for _ in range(2):
            assert torch.equal(generate(), expected)


@pytest.mark.parametrize("is_fast", [False, True])
def test_autocast_may_begin_in_the_middle_of_an_image(is_fast):
    """New tokens are cast to what the cache holds, as a DynamicCache casts them."""
    model = tiny_llama()
    with fast_decode(model) if is_fast else torch.no_grad():
        cache = begin(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits = [model(token(2), past_key_values=cache).logits for _ in range(20)]
    assert cache.layers[0].has_kernel
    cache = begin(model)
    exact = [model(token(2), past_key_values=cache).logits for _ in range(20)]
    # logits below 4 with 8 bits, each by way of a dozen such roundings
    torch.testing.assert_close(torch.stack(logits).float(), torch.stack(exact), rtol=0, atol=0.2)


def test_a_scorer_that_adds_attention_its_own_way_gets_no_kernel():
    """The kernel adds up all attention; another sum would be ignored without an error."""

    class Squares(Scorer):
        def observe(self, received, weights):
            received += weights.square().sum((2, 3))

    plan = SSDCache(LABELS, 0.4, buffer=12).layers[0].plan
    assert plan.takes_kernel
    assert not replace(plan, scorer=Squares()).takes_kernel
