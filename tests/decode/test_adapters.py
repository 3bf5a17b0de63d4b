"""LoRA adapters of PEFT under `enable`, eager and fast: attached, switched, merged, unmerged, and merged for good.

The adapters are random and change the tokens. Expected tokens come from the same model with transformers' own cache, or
uncompiled. Skipped where PEFT is not installed.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.compiling import needs_compiler
from helpers.models import left_padded_prompts, tiny_janus, tiny_llama

from ssd_cache import HeadMap, enable

peft = pytest.importorskip("peft", reason="PEFT is not installed")

SIDE = 8
LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(SIDE, SIDE))
KINDS = pytest.mark.parametrize("kind", ["llama", "janus"])


def lora():
    """An adapter with random weights in the decoder's layers."""
    modules = r".*layers\.\d+\.(self_attn\.(q_proj|v_proj)|mlp\.down_proj)"
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)


def make(kind):
    """A model with adapters "first" and "second", and the arguments of its `generate`."""
    if kind == "janus":
        model, call = tiny_janus(grid_side=SIDE), {"generation_mode": "image"}
    else:
        model, call = tiny_llama(), {"max_new_tokens": SIDE**2}
    adapted = peft.get_peft_model(model, lora(), adapter_name="first")
    adapted.add_adapter("second", lora())
    return adapted.eval(), {**left_padded_prompts((6, 4)), "do_sample": False, **call}


CHANGES = {
    "first": lambda model: model.set_adapter("first"),
    "second": lambda model: model.set_adapter("second"),
    "second merged": lambda model: model.merge_adapter(["second"]),
    "second unmerged": lambda model: model.unmerge_adapter(),
}
"""Run in this order."""


@KINDS
def test_a_full_budget_gives_the_tokens_of_transformers_cache(kind):
    """The block is on the model inside PEFT's; the call may go to either."""
    model, call = make(kind)
    for change in CHANGES.values():
        change(model)
        expected = model.generate(**call)
        with enable(model.get_base_model(), LABELS, budget=1.0):
            assert torch.equal(model.generate(**call), expected)
            assert torch.equal(model.get_base_model().generate(**call), expected)


@KINDS
@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_compiler)], ids=["eager", "fast"])
def test_adapters_change_inside_one_block(kind, fast):
    """Merging changes weights without torch's count of changes; switching changes no weight, but the compiled step."""
    torch._dynamo.reset()
    model, call = make(kind)
    base, expected, found = model.get_base_model(), [], []
    for change in CHANGES.values():
        change(model)
        with enable(base, LABELS, budget=0.4, buffer=4):
            expected.append(model.generate(**call))
    assert not torch.equal(expected[0], expected[1]), "the adapters do not matter"
    with warnings.catch_warnings(), enable(base, LABELS, budget=0.4, buffer=4, fast=fast) as block:
        warnings.filterwarnings("error", "fast_decode continues")
        for change in CHANGES.values():
            change(model)
            found.append(model.generate(**call))
        assert block is base
    for name, ours, theirs in zip(CHANGES, found, expected, strict=True):
        assert torch.equal(ours, theirs), name


def test_an_adapter_of_transformers_own_methods():
    """`model.add_adapter` puts PEFT's layers into the model itself."""
    model, call = tiny_llama(), {**left_padded_prompts((6, 4)), "do_sample": False, "max_new_tokens": SIDE**2}
    before = model.generate(**call)
    model.add_adapter(lora(), adapter_name="first")
    model.eval()
    with enable(model, LABELS, budget=1.0):
        attached = model.generate(**call)
        model.disable_adapters()
        assert torch.equal(model.generate(**call), before)
        model.enable_adapters()
    assert not torch.equal(attached, before)
    assert torch.equal(model.generate(**call), attached)


def test_a_model_with_its_adapter_merged_for_good():
    model, call = make("llama")
    plain = model.merge_and_unload(adapter_names=["second"])
    expected = plain.generate(**call)
    with enable(plain, LABELS, budget=1.0):
        assert torch.equal(plain.generate(**call), expected)


def test_the_error_for_pefts_model_names_the_model_inside():
    model, _ = make("llama")
    with pytest.raises(TypeError, match=r"enable got a PeftModel; give its autoregressive model, \.model"):
        enable(model, LABELS, budget=0.4, buffer=4)
    enable(model.model, LABELS, budget=0.4, buffer=4)
