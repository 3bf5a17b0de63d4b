"""Packed linear layers: the same products to rounding, packed when first used, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from compiling import needs_compiler
from models import left_padded_prompts, tiny_janus, tiny_llama

from ssd_cache import HeadMap, SSDCache, packed_linears
from ssd_cache._compat import CACHE
from ssd_cache.packed_linears import MAX_ROWS
from ssd_cache.packed_linears import packed_linears as packing

pytestmark = needs_compiler


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [*((rows, 48) for rows in range(1, 20)), (6, 1, 48), (64, 48), (2, MAX_ROWS, 48)])
def test_products_are_equal_to_rounding(has_bias, shape):
    linear, states = torch.nn.Linear(48, 80, bias=has_bias), torch.randn(shape)
    with torch.no_grad():
        expected = linear(states)
        exact = states.double() @ linear.weight.double().mT + (linear.bias.double() if has_bias else 0)
        with packing(linear):
            for _ in range(2):
                result = linear(states)
            assert len(packed_linears._packed) == (states.numel() <= 48 * MAX_ROWS)
    # at most twice the error of torch's own product, and 1e-6 where that is nil
    assert (result - exact).abs().max() <= 2 * (expected - exact).abs().max() + 1e-6


def test_only_what_a_step_uses_is_packed_and_nothing_is_left():
    model = tiny_janus(grid_side=4)
    before = {name: type(module) for name, module in model.named_modules()}
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(4, 4))
    with pytest.raises(KeyError), packing(model):
        inputs = left_padded_prompts((5, 3))
        model.generate(**inputs, generation_mode="image", **{CACHE: SSDCache(labels, 8, buffer=2)})
        decoder = [m for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear)]
        used = {linear.weight.data_ptr() for linear in decoder}
        assert used <= set(packed_linears._packed)
        tower = [m for m in model.model.vision_model.modules() if isinstance(m, torch.nn.Linear)]
        assert not {linear.weight.data_ptr() for linear in tower} & set(packed_linears._packed)
        raise KeyError
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not packed_linears._packed
    assert not packed_linears._room


def test_gradients_flow_as_ever_and_other_dtypes_are_left_alone():
    model = tiny_llama()
    with packing(model):
        model(left_padded_prompts((4,))["input_ids"]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    for other in (torch.nn.Linear(4, 16).half(), torch.nn.Linear(4, 20)):  # 20 is no multiple of 16
        with packing(other):
            assert type(other) is torch.nn.Linear
