"""Merged linear layers of `fast_decode`: four products a layer, the same tokens, and no stale or leftover weights.

Everything runs on the CPU, where the option is off by default. Steps recorded after a merge are in test_cuda_graph.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers.compiling import needs_compiler
from helpers.models import left_padded_prompts, tiny_causal, tiny_janus, tiny_llama
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM

from ssd_cache import HeadMap, SSDCache, enable, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.decode.merged_linears import GROUPS, MERGED, remove_equal_products

LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(8, 8))
NUM_LAYERS = 2


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def generate(model):
    call = {"max_new_tokens": 40} if model.config.model_type in ("llama", "qwen2") else {"generation_mode": "image"}
    cache = SSDCache(LABELS, 24, buffer=8)
    tokens = model.generate(**left_padded_prompts((5, 9, 3)), **{CACHE: cache}, do_sample=False, **call)
    return tokens, cache.served_by


def groups(model):
    """The layers of each group, of all decoder layers."""
    for layer in model.get_decoder().layers:
        for module, names in zip((layer.self_attn, layer.mlp), GROUPS, strict=True):
            yield [getattr(module, name) for name in names]


def is_merged(linears):
    """Whether layers are merged, on slices of one tensor that has no memory beside them."""
    storages = {linear.weight.untyped_storage().data_ptr() for linear in linears}
    size = sum(linear.weight.nbytes for linear in linears)
    is_one = len(storages) == 1 and linears[0].weight.untyped_storage().nbytes() == size
    marked = {MERGED in vars(linear) for linear in linears}
    assert marked == {is_one}
    return is_one


def assert_plain(model, weights):
    """Nothing of a block is on the model, and each parameter has its own memory and the given numbers."""
    for linears in groups(model):
        for linear in linears:
            assert type(linear) is torch.nn.Linear
            assert MERGED not in vars(linear)
            for part in linear.parameters():
                assert part.untyped_storage().nbytes() == part.nbytes
    assert "forward" not in vars(model.get_decoder())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def copied(weights):
    return {name: value.clone() for name, value in weights.items()}


def biased():
    model = tiny_causal("qwen2")  # Q, K and V have a bias; gate and up have none
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(linear.bias)
    return model


MODELS = {"janus": lambda: tiny_janus(grid_side=8), "llama with grouped heads": tiny_llama, "biases": biased}


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_four_products_a_layer_give_the_tokens_of_separate_layers(name):
    model = MODELS[name]()
    weights = copied(model.state_dict())
    expected, _ = generate(model)
    with fast_decode(model, merge_linears=True):
        assert all(map(is_merged, groups(model)))
        (tokens, served), codes = run_and_get_code(generate, model)
    assert torch.equal(tokens, expected)
    assert served.compiled > 30
    assert [len(re.findall(r"extern_kernels\.(?:add)?mm\(", code)) for code in codes] == [4 * NUM_LAYERS]
    assert_plain(model, weights)


@needs_compiler
@torch.no_grad()
def test_bfloat16_is_as_exact_as_separate_layers():
    """With the full cache, since other last bits may evict other tokens."""
    exact, tokens = tiny_llama(), torch.randint(10, 40, (2, 30))
    model = copy.deepcopy(exact).bfloat16()

    def run(model):
        cache = SSDCache(LABELS, 1.0)
        states = [model(tokens[:, :6], past_key_values=cache).logits[:, -1]]
        for step in range(6, 30):
            states.append(model(tokens[:, step : step + 1], past_key_values=cache).logits[:, -1])
        return torch.stack(states).float(), cache.served_by.compiled

    (reference, _), (separate, _) = run(exact), run(model)
    with fast_decode(model, merge_linears=True):
        merged, num_compiled = run(model)
    assert num_compiled == 23
    assert (merged - reference).abs().max() <= 2 * (separate - reference).abs().max()


def test_off_by_default():
    model = tiny_llama()
    for block in (fast_decode(model), enable(model, LABELS, fast=True)):
        with block:
            assert not any(map(is_merged, groups(model)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_after_an_exception_weights_are_as_before(mode):
    model = biased()
    weights = copied(model.state_dict())
    with pytest.raises(KeyError), mode(), fast_decode(model, merge_linears=True):
        assert all(map(is_merged, groups(model)))
        assert not any(part.is_inference() for part in model.parameters())
        raise KeyError
    assert_plain(model, weights)
    assert not any(part.is_inference() for part in model.parameters())
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    assert all(linear.weight.grad is not None for linears in groups(model) for linear in linears)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)], ids=str)
@torch.no_grad()
def test_blocks_may_end_in_any_order(order):
    """Weights that were merged stay so until all blocks have ended."""
    model, tokens = tiny_llama(), torch.randint(10, 40, (2, 6))
    weights, expected = copied(model.state_dict()), model(tokens).logits
    blocks = [fast_decode(model, merge_linears=True), fast_decode(model), fast_decode(model, merge_linears=True)]
    for block in blocks:
        block.__enter__()
        assert all(map(is_merged, groups(model)))
    for number in order:
        assert all(map(is_merged, groups(model)))
        assert torch.equal(model(tokens).logits, expected)
        blocks[number].__exit__(None, None, None)
    assert_plain(model, weights)


def test_layers_that_an_outer_block_has_packed_stay_packed():
    model = tiny_llama()
    weights = copied(model.state_dict())
    outer, inner = fast_decode(model), fast_decode(model, merge_linears=True)
    with outer:
        before = [type(linear) for linears in groups(model) for linear in linears]
        with inner:
            assert [type(linear) for linears in groups(model) for linear in linears] == before
    assert_plain(model, weights)


@torch.no_grad()
def test_threads_may_share_a_model():
    """No weight moves while a block is open, so no product reads memory that another thread has freed."""
    model, tokens = tiny_llama(), torch.randint(10, 40, (2, 6))
    weights, expected = copied(model.state_dict()), model(tokens).logits

    def run(_):
        with torch.no_grad():
            for _ in range(10):
                with fast_decode(model, merge_linears=True):
                    assert all(torch.equal(model(tokens).logits, expected) for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert_plain(model, weights)


# Weights that change inside the block


def _change_in_place(linear):
    linear.weight.data.mul_(-2)


def _set_data(linear):
    linear.weight.data = torch.randn(linear.weight.shape)


def _transpose_data(linear):  # the same address, shape and version, since the weight is square
    linear.weight.data = linear.weight.data.mT


def _replace(linear):
    linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))


def _load(linear):
    linear.load_state_dict({name: torch.randn_like(part) for name, part in linear.state_dict().items()}, assign=True)


def _add_bias(linear):
    linear.bias = torch.nn.Parameter(torch.randn(len(linear.weight)))


def _parametrize(linear):
    parametrize.register_parametrization(linear, "weight", torch.nn.Tanh())


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank adapter, as PEFT wraps one."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.delta = torch.randn(base.out_features, 2) @ torch.randn(2, base.in_features)

    def forward(self, states):
        return self.base_layer(states) + states @ self.delta.mT


@needs_compiler
def test_changed_weights_take_effect_with_the_next_image():
    """The expected tokens are those of eager copies, which are plain models."""
    model = tiny_llama()
    attention = model.model.layers[0].self_attn

    def check(is_still_merged):
        tokens, served = generate(model)
        assert torch.equal(tokens, generate(copy.deepcopy(model))[0])
        assert served.compiled > 30
        assert [is_merged(linears) for linears in groups(model)] == [is_still_merged, True, True, True]
        return tokens

    with fast_decode(model, merge_linears=True):
        found = [check(True)]
        for change in (_change_in_place, _set_data, _replace, _load):
            change(attention.q_proj)
            found.append(check(True))
        assert counters["stats"]["unique_graphs"] <= 2, "a weight that is merged again should not compile again"
        for separate in (_transpose_data, _add_bias):
            separate(attention.q_proj)
            found.append(check(False))
            _set_data(attention.q_proj)
            for linear in (attention.k_proj, attention.v_proj):
                if attention.q_proj.bias is not None:
                    _add_bias(linear)
            _set_data(model.model.layers[1].mlp.up_proj)  # all layers are looked at when one was replaced
            found.append(check(True))
    assert len({tuple(tokens.flatten().tolist()) for tokens in found}) == len(found), "a change that changes no token"
    assert_plain(model, copied(model.state_dict()))


@needs_compiler
def test_adapters_attached_inside_and_before_the_block_stay_right():
    model = tiny_llama()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    mlp.up_proj = Adapter(mlp.up_proj)
    plain = attention.q_proj

    def check():
        tokens, served = generate(model)
        assert torch.equal(tokens, generate(copy.deepcopy(model))[0])
        assert served.compiled > 30
        return tokens

    with fast_decode(model, merge_linears=True):
        assert MERGED not in vars(mlp.gate_proj)
        attention.q_proj = Adapter(plain)
        assert MERGED in vars(plain)
        found = [check()]
        plain.weight.data = plain.weight.data - 2 * attention.q_proj.delta  # a merge that replaces the data
        found.append(check())
        _parametrize(plain)
        found.append(check())
    assert len({tuple(tokens.flatten().tolist()) for tokens in found}) == len(found), "a change that changes no token"
    for linear in (plain, attention.k_proj, mlp.gate_proj, mlp.up_proj.base_layer):
        assert MERGED not in vars(linear)
        for part in linear.parameters():
            assert part.untyped_storage().nbytes() == part.nbytes


@torch.no_grad()
def test_a_parameter_that_was_taken_out_gets_its_own_memory_too():
    model = tiny_llama()
    linear = model.model.layers[0].self_attn.k_proj
    old, before = linear.weight, linear.weight.clone()
    with fast_decode(model, merge_linears=True):
        linear.weight = torch.nn.Parameter(torch.zeros_like(old))
    assert torch.equal(old, before)
    assert old.untyped_storage().nbytes() == old.nbytes
    assert not linear.weight.any()


@needs_compiler
def test_code_that_the_caller_compiled_uses_the_layers_own_weights():
    """Nothing compares its weights at each step, and it may need gradients."""
    mlp, states = tiny_llama().model.layers[0].mlp, torch.randn(3, 1, 32)
    model = tiny_llama()
    model.model.layers[0].mlp = mlp
    run = torch.compile(mlp, fullgraph=True)
    with fast_decode(model, merge_linears=True):
        for _ in range(2):
            torch.testing.assert_close(run(states), mlp(states))
            mlp.up_proj.weight.data = torch.randn_like(mlp.up_proj.weight)
        run(states).sum().backward()
    assert mlp.up_proj.weight.grad is not None


# Copies and files made inside the block


def test_files_and_copies_made_inside_the_block_are_plain(tmp_path):
    model, tokens = tiny_llama(), torch.tensor([[5, 6, 7]])
    weights = copied(model.state_dict())
    with torch.no_grad():
        expected = model(tokens).logits
    with fast_decode(model, merge_linears=True):
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        file = io.BytesIO()
        torch.save(model, file)
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file.seek(0)
    others.append(torch.load(file, weights_only=False))
    others += [
        LlamaForCausalLM.from_pretrained(tmp_path / name, attn_implementation="ssd") for name in ("one", "parts")
    ]
    for other in others:
        assert all(type(linear) is torch.nn.Linear for linears in groups(other) for linear in linears)
        assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
        with fast_decode(other, merge_linears=True), torch.no_grad():
            assert all(map(is_merged, groups(other)))
            assert torch.equal(other(tokens).logits, expected)
    assert all(torch.equal(value, weights[name]) for name, value in torch.load(tmp_path / "weights.pt").items())
    assert_plain(model, weights)


# Layers that stay separate


class Subclass(torch.nn.Linear):
    """A layer whose product is not known."""


def _hook(linears):
    linears[-1].register_forward_hook(lambda module, args, output: 2 * output)


def _override(linears):
    linears[-1].forward = lambda states: states


def _subclass(linears):
    linears[-1].__class__ = Subclass


def _share(linears):
    linears[-1].weight = linears[-2].weight


def _share_memory(linears):
    linears[-1].weight = torch.nn.Parameter(linears[-2].weight.data)


def _bias_one(linears):
    linears[0].bias = torch.nn.Parameter(torch.ones(len(linears[0].weight)))


def _narrow_one(linears):
    linears[0].weight = torch.nn.Parameter(torch.ones(len(linears[0].weight), 16))


def _half_one(linears):
    linears[0].bfloat16()


def _parametrize_one(linears):
    _parametrize(linears[0])


def _make_in_inference_mode(linears):
    with torch.inference_mode():
        linears[0].weight = torch.nn.Parameter(torch.ones_like(linears[0].weight))


def _move_to_meta(linears):
    for linear in linears:
        linear.to("meta")


def _transpose_one(linears):
    linears[0].weight.data = torch.ones(linears[0].weight.shape[::-1]).mT


SEPARATE = [
    *(_hook, _override, _subclass, _share, _share_memory, _bias_one, _narrow_one, _half_one, _parametrize_one),
    *(_make_in_inference_mode, _move_to_meta, _transpose_one),
]


@pytest.mark.parametrize("change", SEPARATE, ids=lambda change: change.__name__.strip("_"))
def test_layers_that_differ_stay_separate(change):
    model = tiny_llama()
    attention = next(groups(model))
    change(attention)
    places = [part.data_ptr() for linear in attention for part in linear._parameters.values() if part is not None]
    kinds = [type(linear) for linear in attention]
    with fast_decode(model, merge_linears=True):
        after = [part.data_ptr() for linear in attention for part in linear._parameters.values() if part is not None]
        assert after == places
        assert [type(linear) for linear in attention] == kinds
        assert [MERGED in vars(linears[0]) for linears in groups(model)] == [False, True, True, True]


def test_without_memory_layers_stay_separate_with_a_warning(monkeypatch):
    model = tiny_llama()
    weights = copied(model.state_dict())

    def fail(tensors):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="separate linear layers: CUDA out of memory"):
        patch.setattr(torch, "cat", fail)
        block = fast_decode(model, merge_linears=True)
        block.__enter__()
    assert {type(linear) for linears in groups(model) for linear in linears} == {torch.nn.Linear}
    block.__exit__(None, None, None)
    assert_plain(model, weights)


# Equal products


def _alone(states, weight):
    return F.linear(states, weight)[:, :2] + F.linear(states, weight)[:, 2:]


def _with_method(states, weight):
    first = F.linear(states, weight)
    states.add_(1)
    return first + F.linear(states, weight)


def _with_operator(states, weight):
    first = F.linear(states, weight)
    states *= 3
    return first + F.linear(states, weight)


def _with_item(states, weight):
    first = F.linear(states, weight)
    states[0] = 7
    return first + F.linear(states, weight)


def _with_function(states, weight):
    first = F.linear(states, weight)
    F.relu(states, inplace=True)
    return first + F.linear(states, weight)


def _with_output(states, weight):
    first = F.linear(states, weight)
    torch.neg(states, out=states)
    return first + F.linear(states, weight)


@needs_compiler
@pytest.mark.parametrize(
    ("function", "number"),
    [(_alone, 1), (_with_method, 2), (_with_operator, 2), (_with_item, 2), (_with_function, 2), (_with_output, 2)],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
@torch.no_grad()
def test_equal_products_are_removed_unless_something_is_written_in_between(function, number):
    counts = []

    def backend(graph, inputs):
        remove_equal_products(graph.graph)
        graph.recompile()
        counts.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return graph

    states, weight = torch.randn(3, 4), torch.randn(4, 4)
    result = torch.compile(function, fullgraph=True, backend=backend)(states.clone(), weight)
    assert torch.equal(result, function(states.clone(), weight))
    assert counts == [number]
