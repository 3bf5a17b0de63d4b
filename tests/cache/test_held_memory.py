"""What a cache holds between steps: no memory but its own, in tensors that code in any grad mode may write."""

from __future__ import annotations

import pytest
import torch
from helpers.models import left_padded_prompts, tiny_causal, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from ssd_cache import HeadMap, SSDCache
from ssd_cache._compat import CACHE

GRID = (8, 8)
LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=GRID)
SETTINGS = {"budget": 24, "buffer": 8, "num_recent": 4}


def storage_bytes(cache):
    """Bytes of all memory that a cache's K and V hold, each piece counted once."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    tensors += [getattr(store, name) for layer in cache.layers for store in layer.stores for name in store.STATES]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def tiny_gpt2():
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=256)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "make", [tiny_gpt2, lambda: tiny_causal("phi3"), lambda: tiny_causal("llama")], ids=["gpt2", "phi3", "llama"]
)
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_nbytes_is_what_is_held_at_each_moment(make, kv_dtype):
    model = make()
    model.set_attn_implementation("ssd")
    cache = SSDCache(LABELS, kv_dtype=kv_dtype, **SETTINGS)
    tokens = left_padded_prompts((20, 12))
    with torch.no_grad():
        model(**tokens, **{CACHE: cache})
        assert cache.nbytes == storage_bytes(cache) > 0
        for _ in range(30):
            model(tokens["input_ids"][:, :1], **{CACHE: cache})
            assert cache.nbytes == storage_bytes(cache)
    held = [layer.prompt_mask for layer in cache.layers]
    assert all(mask.untyped_storage().nbytes() == mask.nbytes for mask in held)


# --- inference mode -------------------------------------------------------------------------------------------


MODES = (torch.inference_mode, torch.no_grad)


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "int8"}, {"online": True}], ids=["plain", "int8", "online"])
def test_modes_may_change_between_images_and_in_mid_image(is_fast, settings):
    model, tokens = tiny_llama(), left_padded_prompts((60, 60))["input_ids"]
    labels = HeadMap.online(num_layers=2, num_kv_heads=2, grid=GRID) if settings.get("online") else LABELS
    kv_dtype = settings.get("kv_dtype")
    cache = SSDCache(labels, budget=24, buffer=8, kv_dtype=kv_dtype)
    # the real steps of fast_decode, without waiting for the compiler
    forward = model.model

    def image(modes):
        states = []
        for step, mode in zip([6, *range(7, 61)], modes, strict=True):
            with mode():
                first = 0 if step == 6 else step - 1
                ids = tokens[:, first:step]
                if is_fast and cache.can_step_statically:
                    with cache.static_step():
                        mask, position = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.full((1, 1), first)
                        output = forward(ids, attention_mask=mask, position_ids=position, **{CACHE: cache})
                else:
                    output = forward(ids, **{CACHE: cache})
                states.append(output.last_hidden_state[:, -1].clone())
        cache.reset()
        return torch.stack(states)

    expected = image([torch.no_grad] * 55)
    cache = SSDCache(labels, budget=24, buffer=8, kv_dtype=kv_dtype)
    for modes in ([MODES[0]] * 55, [MODES[1]] * 55, [MODES[step % 2] for step in range(55)]):
        assert torch.equal(image(modes), expected)
    rows = SSDCache(labels, budget=24, buffer=8, kv_dtype=kv_dtype)
    with torch.inference_mode():
        forward(tokens[:, :6], **{CACHE: rows})
        forward(tokens[:, 6:7], **{CACHE: rows})
        rows.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        forward(tokens[:, 7:8], **{CACHE: rows})
