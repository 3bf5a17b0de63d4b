"""The rival over torch's `varlen_attn`, without a GPU: its tokens with a stand-in, its shapes on meta tensors.

The stand-in reads its arguments as torch documents them. What the kernel itself computes is not tested.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.models import left_padded_prompts, tiny_llama
from transformers import DynamicCache

from ssd_cache._compat import CACHE

varlen = pytest.importorskip("ssd_cache.bench.varlen", reason="torch has no varlen_attn")


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the calls of `varlen_attn`, which a loop over the rows replaces."""
    calls = []

    def attend(query, key, value, *, cu_seq_q, cu_seq_k, max_q, max_k, scale, enable_gqa, seqused_k):
        calls.append((key, seqused_k))
        assert cu_seq_q.tolist() == list(range(len(query) + 1))
        assert (max_q, max_k, cu_seq_k[-1]) == (1, cu_seq_k[1], len(key))
        assert {given.dtype for given in (cu_seq_q, cu_seq_k, seqused_k)} == {torch.int32}
        rows = []
        for row, start, used in zip(query, cu_seq_k.tolist(), seqused_k.tolist(), strict=False):
            keys, values = (states[start : start + used].transpose(0, 1) for states in (key, value))
            rows.append(F.scaled_dot_product_attention(row[:, None], keys, values, scale=scale, enable_gqa=enable_gqa))
        return torch.stack(rows)[:, :, 0]

    monkeypatch.setattr(varlen, "varlen_attn", attend)
    return calls


def test_tokens_are_those_of_a_dynamic_cache(calls):
    model, prompts = tiny_llama(), left_padded_prompts((5, 5))
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    expected = model.generate(**prompts, **{CACHE: DynamicCache()}, do_sample=False, max_new_tokens=20)
    model.set_attn_implementation(varlen.ATTENTION)
    cache = varlen.varlen_cache(model.config, 40)
    for _ in range(2):
        cache.reset()
        tokens = model.generate(**prompts, **{CACHE: cache}, do_sample=False, max_new_tokens=20)
        assert torch.equal(tokens, expected)
    layers = model.config.num_hidden_layers
    assert [used.tolist() for _, used in calls[::layers][:19]] == [[length] * 2 for length in range(6, 25)]
    assert calls[0][0].data_ptr() == cache.layers[0].keys.data_ptr(), "K was copied"


def test_torchs_operator_takes_the_shapes():
    layer, options = varlen.VarlenLayer(10), {"device": "meta", "dtype": torch.bfloat16}
    states = torch.empty(3, 2, 4, 64, **options)
    layer.update(states, states)
    keys, values = layer.update(states[:, :, :1], states[:, :, :1])
    query, mask = torch.empty(3, 8, 1, 64, **options), torch.ones(3, 1, 1, 10, device="meta", dtype=torch.bool)
    output, weights = varlen.varlen_attention_forward(torch.nn.Module(), query, keys, values, mask, scaling=0.1)
    assert (output.shape, output.dtype, output.device.type, weights) == ((3, 1, 8, 64), torch.bfloat16, "meta", None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn runs on CUDA")
def test_the_operator_attends_to_the_stored_tokens():
    layer, options = varlen.VarlenLayer(10), {"device": "cuda", "dtype": torch.bfloat16}
    states, query = torch.randn(3, 2, 6, 64, **options), torch.randn(3, 8, 1, 64, **options)
    keys, values = layer.update(states, states.flip(0))
    for held in (keys, values):
        held[:, :, 6:] = 100  # of free slots
    mask = torch.arange(10, device="cuda").expand(3, 1, 1, 10) < 6
    output, _ = varlen.varlen_attention_forward(torch.nn.Module(), query, keys, values, mask, scaling=0.1)
    given = (given.double() for given in (query, states, states.flip(0)))
    expected = F.scaled_dot_product_attention(*given, scale=0.1, enable_gqa=True).transpose(1, 2)
    # a few roundings of bfloat16, relative to the largest value
    assert (output - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * states.abs().max()
