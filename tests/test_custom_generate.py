"""hub/generate/ as the Hub would serve it: `model.generate(custom_generate=<folder>)` of a saved Llama.

What the cache keeps is for other tests; here is the road to it, and what comes back.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import left_padded_prompts, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache

from ssd_cache import HeadMap, HeadMapError, SSDCache

HUB = Path(__file__).parents[1] / "hub" / "generate"
SIDE = 8
MAP = HeadMap(torch.tensor([[True, False], [False, False]]), (SIDE, SIDE))
CALL = {"max_new_tokens": SIDE * SIDE, "do_sample": True, "top_k": 0, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, with the Hub repository's files beside the weights."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    tiny_llama(attn_implementation="sdpa").save_pretrained(folder)
    MAP.save_pretrained(folder / "map")
    shutil.copytree(HUB / "custom_generate", folder / "custom_generate")
    return folder


@pytest.fixture(autouse=True)
def _own_modules(tmp_path, monkeypatch):
    """transformers copies remote code into a cache; here into one of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def generate(model, **kwargs):
    torch.manual_seed(0)
    return model.generate(**left_padded_prompts([5, 9]), **CALL, **kwargs)


def generate_ssd(model, **kwargs):
    return generate(model, custom_generate=str(HUB), trust_remote_code=True, **kwargs)


def test_a_full_budget_gives_the_tokens_of_a_dynamic_cache(model, folder):
    full = generate(model, past_key_values=DynamicCache(config=model.config))
    ours = generate_ssd(model, head_map=str(folder / "map"), budget=1.0)
    torch.testing.assert_close(ours.sequences, full.sequences, rtol=0, atol=0)
    assert isinstance(ours.past_key_values, SSDCache)


@pytest.mark.parametrize("head_map", ["map", "online", MAP], ids=["folder", "online", "HeadMap"])
def test_a_fifth_of_the_tokens_takes_fewer_bytes(model, folder, head_map):
    head_map = str(folder / "map") if head_map == "map" else head_map
    grid = {"grid": (SIDE, SIDE)} if head_map == "online" else {}
    output = generate_ssd(model, head_map=head_map, budget=26, buffer=4, **grid)
    cache = output.past_key_values
    assert output.sequences.shape == (2, 9 + SIDE * SIDE)
    assert cache.nbytes == 2 * 2 * 2 * 2 * (9 + 26) * 8 * 4  # K and V, layers, rows, heads, tokens, head_dim, bytes
    assert cache.memory_stats().full_cache > 2 * cache.nbytes
    assert cache.buffer == 4


def test_the_attention_is_switched_for_the_call_alone(model, folder):
    assert model.config._attn_implementation == "sdpa"
    generate_ssd(model, head_map=str(folder / "map"), budget=26, buffer=4)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="budget"):
        generate_ssd(model, head_map=str(folder / "map"), budget=1.5)
    assert model.config._attn_implementation == "sdpa"
    assert "generate" not in vars(model)


def test_a_model_whose_own_repository_holds_the_file_needs_no_word_of_it(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    own = model.generate
    assert own.keywords == {"model": model}  # transformers put it there
    output = generate(model, head_map=str(folder / "map"), budget=26, buffer=4)
    assert output.past_key_values.layers[0].plan.num_slots == (26, 26)
    assert model.generate is own


def test_what_is_missing_or_wrong_is_said_before_anything_is_generated(model, folder, tmp_path):
    with pytest.raises(ValueError, match="no head map: give head_map='user/head-map'"):
        generate_ssd(model)
    with pytest.raises(ValueError, match="(past_key_values|cache) is a DynamicCache"):
        generate_ssd(model, head_map=MAP, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(HeadMapError, match="has 3 layers x 2 KV heads.*LlamaForCausalLM has 2 x 2"):
        generate_ssd(model, head_map=HeadMap.uniform("spatial", num_layers=3, num_kv_heads=2))
    with pytest.raises(HeadMapError, match="no-such-map"):
        generate_ssd(model, head_map=str(tmp_path / "no-such-map"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        generate(model, custom_generate=str(HUB), head_map=MAP, trust_remote_code=False)


def test_the_folder_has_the_hubs_shape():
    """What transformers and the Hub look for: the file, its requirements, the tag."""
    assert (HUB / "custom_generate" / "requirements.txt").read_text().split() == ["ssd-cache"]
    head = (HUB / "README.md").read_text().split("---\n")[1]
    assert "library_name: transformers" in head
    assert "  - custom_generate" in head
