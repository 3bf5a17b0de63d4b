"""Packed linear layers: the same products to rounding, also after weights change, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from helpers.compiling import needs_compiler
from helpers.models import left_padded_prompts, tiny_janus, tiny_llama
from torch.nn.utils import parametrize

from ssd_cache import HeadMap, SSDCache
from ssd_cache._compat import CACHE
from ssd_cache.kernels import cpu_loops, onednn
from ssd_cache.kernels.packed_linears import COPY, MAX_ROWS, packed_linears

pytestmark = needs_compiler


def is_packed(linear):
    """Whether products of this layer run on a copy of its weight now."""
    packed = getattr(linear.weight, COPY, None)
    return packed is not None and packed.made_of is not None


def is_plain(model):
    """Whether nothing of a block is on the model."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return all(type(module) is torch.nn.Linear and not hasattr(module.weight, COPY) for module in modules)


in_bfloat16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not onednn.takes_weight(torch.ones(1, 1).bfloat16()), reason="oneDNN does not multiply in bfloat16 here"
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, in_bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [*((rows, 48) for rows in range(1, 20)), (6, 1, 48), (64, 48), (2, MAX_ROWS, 48)])
def test_products_are_equal_to_rounding(has_bias, shape, dtype):
    linear, states = torch.nn.Linear(48, 80, bias=has_bias, dtype=dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        expected = linear(states)
        exact = states.double() @ linear.weight.double().mT + (linear.bias.double() if has_bias else 0)
        with packed_linears(linear):
            for _ in range(2):
                result = linear(states)
            assert is_packed(linear) == (states.numel() <= 48 * MAX_ROWS)
    # at most twice the error of torch's own product, and 1e-6 where that is nil
    assert (result - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6


def test_only_what_a_step_uses_is_packed_and_nothing_is_left():
    model = tiny_janus(grid_side=4)
    before = {name: type(module) for name, module in model.named_modules()}
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(4, 4))
    with pytest.raises(KeyError), packed_linears(model):
        inputs = left_padded_prompts((5, 3))
        model.generate(**inputs, generation_mode="image", **{CACHE: SSDCache(labels, 8, buffer=2)})
        decoder = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
        assert all(map(is_packed, decoder))
        tower = [m for m in model.model.vision_model.modules() if isinstance(m, torch.nn.Linear)]
        assert not any(map(is_packed, tower))
        raise KeyError
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert is_plain(model)


def test_each_weight_is_packed_once_an_image(monkeypatch):
    """Only the prompt's products have several tokens a row; one in every step would pack all weights at every step."""
    packed, pack = [], cpu_loops.pack
    monkeypatch.setattr(cpu_loops, "pack", lambda weight, *args: packed.append(weight) or pack(weight, *args))
    model = tiny_janus(grid_side=4)
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(4, 4))
    with packed_linears(model):
        for number in (1, 2):
            cache = SSDCache(labels, 8, buffer=2)
            model.generate(**left_padded_prompts((5, 3)), generation_mode="image", guidance_scale=5.0, **{CACHE: cache})
            assert len(packed) == number * len({id(weight) for weight in packed}) > 0


@pytest.mark.parametrize("dtype", [in_bfloat16])
@torch.no_grad()
def test_weights_in_bfloat16_change_and_their_copies_are_freed(dtype):
    linear, states = torch.nn.Linear(64, 64, dtype=dtype), torch.randn(3, 1, 64, dtype=dtype)
    with packed_linears(linear):
        for change in (_load, _multiply, _change_one, _set_data, _transpose_data):
            change(linear)
            for _ in range(2):
                torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))
            assert is_packed(linear)
        place = weakref.ref(getattr(linear.weight, COPY).place)
        linear.weight.data += torch.randn(64, 64)  # not counted by torch, so the next prompt packs the weight again
        linear(torch.randn(3, 5, 64, dtype=dtype))
        torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))
        assert torch.equal(linear(states.expand(3, 0, 64)), linear(states)[:, :0])
    gc.collect()
    assert place() is None
    assert is_plain(linear)


@pytest.mark.parametrize("dtype", [torch.float32, in_bfloat16])
def test_a_weight_packed_in_inference_mode_is_packed_again_outside(dtype):
    linear, states = torch.nn.Linear(32, 32, dtype=dtype), torch.randn(2, 32, dtype=dtype)
    with packed_linears(linear):
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with torch.no_grad():
                linear.weight.mul_(2)
            with mode():
                torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))
        assert is_packed(linear)


def test_gradients_flow_and_other_dtypes_are_left_alone():
    model = tiny_llama()
    with packed_linears(model):
        model(left_padded_prompts((4,))["input_ids"]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    for other in (torch.nn.Linear(4, 16).half(), torch.nn.Linear(4, 20)):  # 20 is no multiple of 16
        with packed_linears(other):
            assert type(other) is torch.nn.Linear


# Weights that change inside the block


def _load(linear):
    linear.load_state_dict({name: tensor + 1 for name, tensor in linear.state_dict().items()})


def _assign(linear):
    linear.load_state_dict({name: tensor + 1 for name, tensor in linear.state_dict().items()}, assign=True)


def _multiply(linear):
    linear.weight.mul_(2)


def _change_one(linear):
    linear.weight[3, 5] += 4


def _set_data(linear):
    linear.weight.data = torch.randn_like(linear.weight)


def _transpose_data(linear):  # the same address, shape and version
    linear.weight.data = linear.weight.data.mT


def _set_smaller_data(linear):
    linear.weight.data, linear.bias.data = torch.randn(16, 32), torch.randn(16)


def _move_through_bfloat16(linear):
    linear.to(torch.bfloat16).float()


def _replace(linear):
    linear.weight = torch.nn.Parameter(torch.randn(32, 32))


def _replace_by_another_shape(linear):
    linear.weight, linear.bias = torch.nn.Parameter(torch.randn(16, 32)), None


def _parametrize(linear):
    parametrize.register_parametrization(linear, "weight", torch.nn.Tanh())


def _move_by_swapping(linear):  # which takes what is on the weight away with the old tensor
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        linear.to(torch.bfloat16).float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _set_inference_data(linear):
    with torch.inference_mode():
        linear.weight.data = torch.randn(32, 32)
        linear(torch.randn(2, 32))
        linear.weight[1, 1] += 4  # which torch does not count


CHANGES = [
    _load,
    _assign,
    _multiply,
    _change_one,
    _set_data,
    _transpose_data,
    _set_smaller_data,
    _move_through_bfloat16,
    _move_by_swapping,
    _replace,
    _replace_by_another_shape,
    _parametrize,
    _set_inference_data,
]


RAISING = (_transpose_data, _set_smaller_data, _move_by_swapping)
"""Changes after which a compiled call raises an error of torch 2.8; 2.9 to 2.12 were not tried."""


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_a_changed_weight_gives_the_products_of_the_new_one(change, is_compiled):
    if is_compiled and change in RAISING and torch.__version__ < (2, 13):
        pytest.skip("torch 2.8 raises an error of its own")
    torch._dynamo.reset()
    linear, states = torch.nn.Linear(32, 32), torch.randn(3, 1, 32)
    run = torch.compile(linear, fullgraph=True) if is_compiled else linear
    with packed_linears(linear):
        for _ in range(2):
            torch.testing.assert_close(run(states), F.linear(states, linear.weight, linear.bias))
        assert is_packed(linear)
        change(linear)
        for _ in range(2):
            torch.testing.assert_close(run(states), F.linear(states, linear.weight, linear.bias))
    torch.testing.assert_close(run(states), F.linear(states, linear.weight, linear.bias))
    assert not hasattr(linear.weight, COPY)


def _merge_adapter(linear):  # as peft does it
    linear.weight.data += torch.randn(linear.out_features, 2) @ torch.randn(2, linear.in_features)


def _prune(linear):
    linear.weight.data *= torch.rand_like(linear.weight) < 0.5


def _write_one(linear):
    linear.weight.data[33, 44] += 1


@pytest.mark.parametrize("change", [_merge_adapter, _prune, _write_one], ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_a_change_that_torch_does_not_count_takes_effect_from_the_next_prompt_on(change):
    """The first product with several tokens is a prompt."""
    linear, states = torch.nn.Linear(64, 64), torch.randn(3, 1, 64)
    with packed_linears(linear):
        linear(states)
        change(linear)
        linear(torch.randn(3, 5, 64))
        torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))
        assert is_packed(linear)


@torch.no_grad()
def test_a_model_of_inference_mode_is_not_packed():
    """Its weights can change without a count of the changes."""
    with torch.inference_mode():
        linear, states = torch.nn.Linear(32, 32), torch.randn(2, 32)
        with packed_linears(linear):
            linear(states)
            linear.weight[2, 3] += 1
            torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))


class Adapter(torch.nn.Module):
    """A linear layer with a low-rank adapter that can be merged into its weight, as peft wraps one."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.is_merged = base, False
        self.delta = torch.randn(base.out_features, 2) @ torch.randn(2, base.in_features)

    def merge(self, sign=1):
        self.base_layer.weight.data += sign * self.delta
        self.is_merged = sign > 0

    def forward(self, states):
        return self.base_layer(states) + (0 if self.is_merged else states @ self.delta.mT)


@torch.no_grad()
def test_an_adapter_merged_and_unmerged_between_images_is_seen():
    """The output with the adapter is the same before and after the merge; float32 sums of 64 products below 100."""
    adapter, prompt, step = Adapter(torch.nn.Linear(64, 64)), torch.randn(3, 5, 64), torch.randn(3, 1, 64)
    expected = adapter(step)
    with packed_linears(adapter):
        for merge in (None, adapter.merge, lambda: adapter.merge(-1)):
            if merge:
                merge()
            adapter(prompt)
            for _ in range(2):
                torch.testing.assert_close(adapter(step), expected, rtol=1e-4, atol=1e-4)
            assert is_packed(adapter.base_layer)


# Several models and threads


@torch.no_grad()
def test_two_models_in_turn_use_their_own_weights():
    """Each image of one model is interrupted by one of the other, in one block each and in nested blocks."""
    models = [tiny_llama(), tiny_llama()]
    for parameter in models[1].parameters():
        parameter.mul_(1.5)
    tokens = torch.randint(10, 40, (2, 1))
    expected = [model(tokens).logits for model in models]
    assert not torch.allclose(*expected)
    with packed_linears(models[0]), packed_linears(models[1]), packed_linears(models[0]):
        for _ in range(3):
            for model, logits in zip(models, expected, strict=True):
                torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    for model, logits in zip(models, expected, strict=True):
        with packed_linears(model):
            torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-4)


def test_threads_may_share_a_model_and_start_images_at_any_time():
    """A prompt in one thread packs weights anew while another thread multiplies by them."""
    model, prompt, tokens = tiny_llama(), torch.randint(10, 40, (2, 6)), torch.randint(10, 40, (2, 1))
    with torch.no_grad():
        expected = model(tokens).logits

    def generate(_):
        with torch.no_grad(), packed_linears(model):
            worst = 0.0
            for _ in range(20):
                model(prompt)
                for _ in range(3):
                    worst = max(worst, float((model(tokens).logits - expected).abs().max()))
            return worst

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(generate, range(4))) < 1e-4  # float32, two orders of sums
    assert is_plain(model)


# Weights that share memory


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_weights_that_start_at_one_address_are_told_apart(is_compiled):
    torch._dynamo.reset()
    memory = torch.randn(48 * 32)
    pair = torch.nn.ModuleList([torch.nn.Linear(32, 48, bias=False), torch.nn.Linear(48, 32, bias=False)])
    for linear, shape in zip(pair, ((48, 32), (32, 48)), strict=True):
        linear.weight = torch.nn.Parameter(memory.view(shape))
    states = torch.randn(2, 32), torch.randn(2, 48)

    def run(first, second):
        return pair[0](first), pair[1](second)

    run = torch.compile(run, fullgraph=True) if is_compiled else run
    with packed_linears(pair):
        for _ in range(2):
            for result, linear, own in zip(run(*states), pair, states, strict=True):
                torch.testing.assert_close(result, own @ linear.weight.mT)
        memory.view(48, 32)[7] += 1  # the memory, and not through either weight
        pair[0](torch.randn(2, 2, 32))  # a prompt, after which all are packed again
        for result, linear, own in zip(run(*states), pair, states, strict=True):
            torch.testing.assert_close(result, own @ linear.weight.mT)


@torch.no_grad()
def test_tied_weights_share_a_copy_and_serve_both_layers():
    pair = torch.nn.ModuleList([torch.nn.Linear(32, 48), torch.nn.Linear(32, 48)])
    pair[1].weight = pair[0].weight
    states = torch.randn(2, 32)
    with packed_linears(pair), packed_linears(pair[1]):
        for _ in range(2):
            for linear in pair:
                torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))
            assert getattr(pair[0].weight, COPY) is getattr(pair[1].weight, COPY)
            pair[0].weight.mul_(3)
    assert is_plain(pair)


@torch.no_grad()
def test_a_freed_address_serves_no_other_model():
    """A weight that moves inside the block frees its memory, which the next weight may get."""
    for _ in range(20):
        linear, states = torch.nn.Linear(64, 64), torch.randn(2, 64)
        with packed_linears(linear):
            linear(states)
            linear.to(torch.bfloat16)
        for _ in range(3):
            other = torch.nn.Linear(64, 64)
            with packed_linears(other):
                torch.testing.assert_close(other(states), F.linear(states, other.weight, other.bias))
    linear = torch.nn.Linear(64, 64)
    with packed_linears(linear):
        for _ in range(20):
            torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))
            linear.weight.data = torch.randn(64, 64)


# Blocks that nest, overlap, and end in any order


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)], ids=str)
@torch.no_grad()
def test_blocks_may_end_in_any_order(order):
    model = tiny_llama()
    tokens = torch.randint(10, 40, (2, 1))
    expected = model(tokens).logits
    blocks = [packed_linears(part) for part in (model, model.model.layers[0], model)]
    for block in blocks:
        block.__enter__()
    for number in order:
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)  # float32, two orders of sums
        assert is_packed(model.model.layers[0].self_attn.q_proj)
        blocks[number].__exit__(None, None, None)
    assert is_plain(model)
    assert torch.equal(model(tokens).logits, expected)


@torch.no_grad()
def test_a_weight_replaced_between_two_blocks_leaves_nothing():
    linear, states = torch.nn.Linear(32, 32), torch.randn(2, 32)
    first, second = packed_linears(linear), packed_linears(linear)
    first.__enter__()
    old = linear.weight
    linear.weight = torch.nn.Parameter(torch.randn(32, 32))
    second.__enter__()
    for block in (first, second):
        torch.testing.assert_close(linear(states), F.linear(states, linear.weight, linear.bias))
        block.__exit__(None, None, None)
    assert is_plain(linear)
    assert not hasattr(old, COPY)


@torch.no_grad()
def test_copies_made_inside_a_block_work_and_can_be_packed_themselves():
    linear, states = torch.nn.Linear(32, 32), torch.randn(2, 32)
    with packed_linears(linear):
        expected = linear(states)
        file = io.BytesIO()
        torch.save(linear, file)
        file.seek(0)
        copies = copy.deepcopy(linear), torch.load(file, weights_only=False)
        for other in copies:
            torch.testing.assert_close(other(states), expected)
            with packed_linears(other):
                torch.testing.assert_close(other(states), expected)
                assert is_packed(other)
            assert is_plain(other)


@torch.no_grad()
def test_the_copies_are_freed_with_the_block():
    linear = torch.nn.Linear(32, 32)
    with packed_linears(linear):
        linear(torch.randn(2, 32))
        place = weakref.ref(getattr(linear.weight, COPY).place)
        assert place() is not None
    gc.collect()
    assert place() is None


# Layers that decide about their products themselves


class Doubled(torch.Tensor):
    """A wrapper without numbers of its own, as quantised weights are: it multiplies by twice its inner tensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        if function not in (torch.ops.aten.t.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            raise NotImplementedError(f"{function} is not for this weight")
        plain = [2 * arg.inner if isinstance(arg, cls) else arg for arg in args]
        return cls(args[0].inner.t()) if function is torch.ops.aten.t.default else function(*plain, **(kwargs or {}))


@pytest.mark.parametrize("is_changed_inside", [False, True], ids=["before", "inside"])
@torch.no_grad()
def test_a_weight_of_a_tensor_subclass_runs_its_own_product(is_changed_inside):
    linear, states = torch.nn.Linear(32, 48), torch.randn(2, 32)
    expected = F.linear(states, 2 * linear.weight, linear.bias)
    with ExitStack() as stack:
        if is_changed_inside:
            stack.enter_context(packed_linears(linear))
            linear(states)
        linear.weight = torch.nn.Parameter(Doubled(linear.weight.detach()), requires_grad=False)
        if not is_changed_inside:
            stack.enter_context(packed_linears(linear))
        torch.testing.assert_close(linear(states), expected)


@torch.no_grad()
def test_hooks_forwards_and_parametrizations_of_a_layer_run():
    states = torch.randn(2, 32)

    def hook(module, args, output):
        return output + 1

    hooked, own, parametrized, normed = (torch.nn.Linear(32, 32) for _ in range(4))
    hooked.register_forward_hook(hook)
    own.forward = lambda input: F.linear(input, own.weight) * 3
    parametrize.register_parametrization(parametrized, "weight", torch.nn.Tanh())
    torch.nn.utils.spectral_norm(normed).eval()  # a pre-hook computes the weight anew
    for linear in (hooked, own, parametrized, normed):
        expected = linear(states)
        before = type(linear), vars(linear).keys()
        with packed_linears(linear):
            assert torch.equal(linear(states), expected)
            assert not hasattr(linear.weight, COPY)
        assert (type(linear), vars(linear).keys()) == before


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("is_fast", [False, True], ids=["packed_linears", "fast_decode"])
def test_weights_of_torchao_run_their_own_product(config, is_fast):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from ssd_cache import fast_decode

    torch._dynamo.reset()
    model = tiny_llama()
    quantization.quantize_(model, getattr(quantization, config)())
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(4, 4))
    options = {**left_padded_prompts((6, 4)), "do_sample": False, "max_new_tokens": 16}

    def generate():
        return model.generate(**options, **{CACHE: SSDCache(labels, 8, buffer=2)})

    expected = generate()
    with fast_decode(model) if is_fast else packed_linears(model):
        assert torch.equal(generate(), expected)
