"""Calls of `generate` as users and pipelines make them: chunked prompts, positional arguments, settings of caches."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers.models import (
    emu3_processor,
    glm_image_processor,
    left_padded_prompts,
    tiny_emu3,
    tiny_glm_image,
    tiny_janus,
    tiny_llama,
)
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

from ssd_cache import HeadMap, SSDCache, enable, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.decode.guidance import batched_guidance

GRID = (8, 8)
LABELS = HeadMap(torch.tensor([[True, False], [False, True]]), grid=GRID)
SETTINGS = {"budget": 24, "buffer": 8, "num_recent": 4}
OPTIONS = {"do_sample": False, "max_new_tokens": 40}


def generate(model, cache=None, lengths=(5, 9), **options):
    given = {} if cache is None else {CACHE: cache}
    return model.generate(**left_padded_prompts(lengths), **given, **{**OPTIONS, **options})


# --- prompts in chunks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 9, 20])
@pytest.mark.parametrize("lengths", [(9, 9), (5, 9)], ids=["no padding", "padding"])
def test_a_prompt_in_chunks_is_the_prompt(chunk, lengths):
    model = tiny_llama()
    whole, chunked = SSDCache(LABELS, **SETTINGS), SSDCache(LABELS, **SETTINGS)
    expected = generate(model, whole, lengths)
    assert torch.equal(generate(model, chunked, lengths, prefill_chunk_size=chunk), expected)
    for ours, theirs in zip(chunked.layers, whole.layers, strict=True):
        assert (ours.num_prompt, ours.num_visual) == (theirs.num_prompt, theirs.num_visual) == (9, 39)
        assert ours.prompt_mask is None or torch.equal(ours.prompt_mask, theirs.prompt_mask)
    with enable(model, LABELS, **SETTINGS):
        assert torch.equal(generate(model, None, lengths, prefill_chunk_size=chunk), expected)
    dynamic = generate(model, DynamicCache(), lengths)
    assert torch.equal(generate(model, SSDCache(LABELS, 1.0), lengths, prefill_chunk_size=chunk), dynamic)


def test_a_prompt_of_one_token_is_a_prompt():
    model = tiny_llama()
    cache = SSDCache(LABELS, 1.0)
    assert torch.equal(generate(model, cache, (1, 1)), generate(model, DynamicCache(), (1, 1)))
    assert (cache.layers[0].num_prompt, cache.layers[0].num_visual) == (1, 39)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_guidance_refuses_a_prompt_in_chunks(chunk):
    model = tiny_llama()
    with enable(model, LABELS, **SETTINGS), pytest.raises(ValueError, match="guidance takes a prompt whole"):
        generate(model, guidance_scale=2.0, prefill_chunk_size=chunk)
    with batched_guidance(model, 2.0), pytest.raises(ValueError, match="leave prefill_chunk_size out"):
        generate(model, SSDCache(LABELS, **SETTINGS), prefill_chunk_size=chunk)


# --- arguments by position, in a config, or by another name ---------------------------------------------------


@pytest.mark.parametrize("where", ["keyword", "position", "model", "both"])
def test_a_guidance_scale_is_found_wherever_it_stands(where):
    model = tiny_llama()
    inputs = left_padded_prompts((9, 9))["input_ids"]
    with enable(model, LABELS, **SETTINGS):
        expected = model.generate(inputs, guidance_scale=3.0, **OPTIONS)
        assert not torch.equal(model.generate(inputs, **OPTIONS), expected)
        config = GenerationConfig(**OPTIONS, guidance_scale=None if where == "both" else 3.0)
        if where == "keyword":
            found = model.generate(inputs=inputs, generation_config=config)
        elif where == "position":
            found = model.generate(inputs, config)
        else:
            model.generation_config.guidance_scale = 3.0
            found = model.generate(inputs, config) if where == "both" else model.generate(inputs, **OPTIONS)
            # 1 is no guidance, whatever the model's own settings say
            plain = model.generate(inputs, guidance_scale=1.0, **OPTIONS)
            assert not torch.equal(plain, expected)
    assert torch.equal(found, expected)


def test_a_wrapper_of_generate_that_names_no_arguments_is_looked_through():
    model = tiny_llama()
    inputs, own = left_padded_prompts((9, 9))["input_ids"], model.generate
    model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    with enable(model, LABELS, **SETTINGS):
        guided = model.generate(inputs, GenerationConfig(**OPTIONS, guidance_scale=3.0))
        assert torch.equal(guided, model.generate(inputs, guidance_scale=3.0, **OPTIONS))
        with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
            model.generate(inputs, inputs=inputs)


def test_emu3_and_glm_image_are_known_by_positional_arguments():
    model = tiny_emu3(emu3_processor())
    inputs = left_padded_prompts((9, 9))["input_ids"] % 20 + 10
    config = GenerationConfig(**OPTIONS, return_dict_in_generate=True)
    with enable(model, LABELS, **SETTINGS):
        output = model.generate(inputs, config, None, None, lambda batch_id, ids: list(range(20)))
        assert isinstance(output.past_key_values, SSDCache)
        assert isinstance(model.generate(inputs, config).past_key_values, DynamicCache)  # text
    processor = glm_image_processor()
    model = tiny_glm_image(processor)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a red circle"}]}]
    inputs = processor.apply_chat_template(
        [chat], tokenize=True, target_h=128, target_w=64, return_dict=True, return_tensors="pt"
    )
    with enable(model, LABELS, budget=0.5, buffer=2):
        ids = inputs.pop("input_ids")
        output = model.generate(ids, **inputs, **OPTIONS, return_dict_in_generate=True)
        assert output.past_key_values.head_map.grid == (4, 2)


# --- settings that ask for another cache ----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["model", "config"])
@pytest.mark.parametrize("setting", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_generation_configs_give_way_to_the_block(where, setting):
    model, config = tiny_llama(), GenerationConfig(**OPTIONS, return_dict_in_generate=True)
    expected = generate(model, SSDCache(LABELS, **SETTINGS))
    changed = model.generation_config if where == "model" else config
    for name, value in setting.items():
        setattr(changed, name, value)
    with enable(model, LABELS, **SETTINGS):
        output = model.generate(**left_padded_prompts((5, 9)), generation_config=config)
    assert isinstance(output.past_key_values, SSDCache)
    assert torch.equal(output.sequences, expected)
    assert all(getattr(changed, name) == value for name, value in setting.items())


@pytest.mark.parametrize(
    "setting", [{"cache_implementation": "static"}, {"cache_implementation": "paged"}, {"use_cache": False}]
)
def test_arguments_that_ask_for_another_cache_are_refused(setting):
    model = tiny_llama()
    (name,) = setting
    with enable(model, LABELS, **SETTINGS):
        with pytest.raises(ValueError, match=f"{name}=.* inside `enable`, which gives the call an SSDCache: leave"):
            generate(model, **setting)
        assert generate(model, cache_implementation=None, use_cache=True).shape == (2, 49)


def test_janus_text_keeps_its_cache_implementation():
    model = tiny_janus(grid_side=8)
    with enable(model, LABELS, **SETTINGS):
        assert generate(model, cache_implementation="static").shape == (2, 49)


def generate_batch(model):
    """Tokens of two prompts by continuous batching, on a paged cache that takes little memory."""
    config = GenerationConfig(**OPTIONS, eos_token_id=63, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    prompts = [[1, 12, 13, 14, 4], [1, 20, 21, 4]]
    return list(model.generate_batch(prompts, config, continuous_batching_config=small).values())


def test_continuous_batching_is_refused():
    model = tiny_llama()
    with enable(model, LABELS, **SETTINGS), pytest.raises(ValueError, match="ssd.* is not supported"):  # transformers'
        generate_batch(model)
    model = tiny_emu3(emu3_processor())  # whose text tower alone is set to "ssd": transformers does not see it
    expected = generate_batch(tiny_emu3(emu3_processor(), attn_implementation="sdpa"))
    for output, served in zip(generate_batch(model), expected, strict=True):
        if output.error is None:  # until 5.18, which sets the attention of the text tower itself
            assert output.generated_tokens == served.generated_tokens
        else:
            assert not output.generated_tokens
            assert "generate_batch works on a paged cache of its own, which the attention 'ssd'" in output.error


# --- names and bytes ------------------------------------------------------------------------------------------


def test_enable_takes_a_name_and_tells_the_bytes(tmp_path):
    model = tiny_llama()
    LABELS.save_pretrained(tmp_path / "map")
    expected = SSDCache(LABELS, **SETTINGS)
    sequences = generate(model, expected)
    for name in (str(tmp_path / "map"), tmp_path / "map"):
        block = enable(model, name, **SETTINGS)
        with pytest.raises(RuntimeError, match="no generate call inside this block has generated images"):
            block.memory_stats()
        with block as given:
            assert given is model
            assert torch.equal(generate(model), sequences)
        assert block.memory_stats() == expected.memory_stats()
    with pytest.raises(importlib.import_module("ssd_cache").HeadMapError, match="3 layers|4 layers|layers x"):
        enable(model, "shapes-janus")  # found, and not for this model


def test_fast_decode_leaves_arguments_it_does_not_serve_as_they_are():
    model = tiny_llama(attn_implementation="sdpa")
    expected = [output.generated_tokens for output in generate_batch(model)]
    with fast_decode(model), batched_guidance(model, 2.0, cache=DynamicCache()):
        assert [output.generated_tokens for output in generate_batch(model)] == expected
    assert all(expected)
