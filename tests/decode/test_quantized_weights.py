"""Quantized weights under `enable`, eager and fast, on the CPU: torchao's 8 and 4 bits, and bitsandbytes' NF4.

Only the decoder is quantized. Expected tokens come from the same quantized model with transformers' own cache, or
uncompiled. Skipped where the package is not installed.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.compiling import needs_compiler
from helpers.models import left_padded_prompts, tiny_janus

from ssd_cache import HeadMap, enable

SIDE = 8
LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(SIDE, SIDE))
CALL = {**left_padded_prompts((6, 4)), "do_sample": False, "generation_mode": "image"}


def torchao(name):
    """Quantizer of a decoder's linear layers with torchao's weight-only configurations."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if name == "int8":
        config = quantization.Int8WeightOnlyConfig()
    else:  # Int4WeightOnlyConfig has no kernel for CPUs in torchao 0.18
        config = quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))
    return lambda decoder: quantization.quantize_(decoder, config)


def nf4(decoder):
    """Replace a decoder's linear layers by those of bitsandbytes."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for module in list(decoder.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is torch.nn.Linear:
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
                )
                new.load_state_dict(layer.state_dict())
                setattr(module, name, new.to("cpu"))  # quantizes


def quantized_janus(name):
    model = tiny_janus(grid_side=SIDE)
    decoder = model.model.language_model
    plain = decoder.layers[0].mlp.down_proj.weight.detach().clone()
    (nf4 if name == "nf4" else torchao(name))(decoder)
    return model, plain


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_compiler)], ids=["eager", "fast"])
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_tokens_of_quantized_weights(name, fast):
    model, plain = quantized_janus(name)
    layer = model.model.language_model.layers[0].mlp.down_proj
    assert type(layer.weight) is not torch.nn.Parameter
    states = torch.randn(2, plain.shape[1])
    with torch.no_grad():
        difference = (layer(states) - states @ plain.mT).norm() / (states @ plain.mT).norm()
    assert 1e-3 < difference < 0.3, "not quantized, or not these weights"  # 8 bits round by about 0.5%, 4 by 10%

    full = model.generate(**CALL)
    with enable(model, LABELS, budget=0.4, buffer=4):
        less = model.generate(**CALL)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fast_decode continues")
        with enable(model, LABELS, budget=1.0, fast=fast):
            assert torch.equal(model.generate(**CALL), full)
        with enable(model, LABELS, budget=0.4, buffer=4, fast=fast):
            assert torch.equal(model.generate(**CALL), less)
