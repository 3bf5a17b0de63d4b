"""Generators: a name finds a checkpoint, a checkpoint generates, and every mistake is told before weights are loaded.

On a small random Janus with the words of shapes-janus; the Hub road is walked in test_cli.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_checkpoint import HEADS, LAYERS, SIDE, head_map, write_checkpoint
from transformers import AutoConfig, DynamicCache

from ssd_cache import HeadMap, HeadMapError, SSDCache
from ssd_cache.models import (
    BUNDLED,
    FAMILIES,
    GeneratorError,
    JanusGenerator,
    ResolvedSampling,
    find_generator,
    generator_of,
    resolve_device,
    resolve_dtype,
)

PROMPTS = ["a photo of a red circle", "a photo of a circle left of a blue square"]
CELLS = SIDE * SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def generator(folder):
    return find_generator(str(folder)).load()


def test_what_a_configuration_tells(folder):
    checkpoint = find_generator(str(folder))
    assert (checkpoint.grid, checkpoint.num_layers, checkpoint.num_kv_heads) == ((SIDE, SIDE), LAYERS, HEADS)
    assert checkpoint.family is JanusGenerator
    assert checkpoint.head_map() == head_map()


def test_the_bundled_model_is_found_by_its_name():
    checkpoint = find_generator(BUNDLED)
    assert checkpoint.grid == (24, 24)
    bundled = checkpoint.head_map()
    checkpoint.check_head_map(bundled)
    assert (bundled.num_layers, bundled.num_kv_heads) == (checkpoint.num_layers, checkpoint.num_kv_heads)


def _empty(path):
    pass


def _no_json(path):
    (path / "config.json").write_text('{"model_type": "janus", ')


def _no_type(path):
    (path / "config.json").write_text('{"hidden_size": 8}')


def _head_map(path):
    head_map().save_pretrained(path)


def _pipeline(path):
    (path / "model_index.json").write_text('{"_class_name": "GlmImagePipeline"}')


def _other_type(path):
    AutoConfig.for_model("llama").save_pretrained(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "no config.json in this folder"),
        (_no_json, "its config.json cannot be read"),
        (_no_type, "its config.json cannot be read"),
        (_head_map, "is a head map, not a model"),
        (_pipeline, r"is a diffusers pipeline: load it with diffusers, and call .*enable\(pipe.PART, head_map, ...\)"),
        (_other_type, f"is of type 'llama'; ssd-cache supports {', '.join(sorted(FAMILIES))}, and any other"),
    ],
)
def test_folders_without_a_checkpoint_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(GeneratorError, match=message) as error:
        find_generator(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_no_name_is_refused():
    with pytest.raises(GeneratorError, match=r"model '' is not a name \(it is empty\); give shapes-janus"):
        find_generator("")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "nowhere/"])
def test_names_that_can_only_be_folders_are_refused_as_such(name):
    with pytest.raises(GeneratorError, match="no such folder"):
        find_generator(name)


@pytest.mark.parametrize("name", ["no spaces", "user/na me", "user/na..me", "user/name.git", "-user/name"])
def test_names_that_can_be_nothing_are_refused(name):
    with pytest.raises(GeneratorError, match="nor the id of a repository"):
        find_generator(name)


def test_offline_a_hub_id_that_is_not_cached_is_a_connection_error():
    with pytest.raises(ConnectionError, match="'user/nowhere-at-all': no cached copy, and offline"):
        find_generator("user/nowhere-at-all")


@pytest.mark.parametrize(
    ("shape", "grid"), [((LAYERS + 1, HEADS), (SIDE, SIDE)), ((LAYERS, 1), (SIDE, SIDE)), ((LAYERS, HEADS), (4, 4))]
)
def test_a_map_of_another_shape_is_refused_with_both_shapes(folder, shape, grid):
    other = HeadMap(torch.zeros(shape, dtype=torch.bool), grid)
    with pytest.raises(
        HeadMapError, match=f"{shape[0]} layers x {shape[1]} KV heads and a grid of {grid[0]} x"
    ) as error:
        find_generator(str(folder)).check_head_map(other)
    assert f"has {LAYERS} x {HEADS} and {SIDE} x {SIDE}" in str(error.value)


def test_prompts_are_padded_on_the_left_and_end_in_begin_of_image(generator, recwarn):
    inputs = generator.prepare(PROMPTS)
    tokenizer = generator.processor.tokenizer
    rows = [[tokenizer.bos_token_id, *tokenizer.encode(p)[1:], tokenizer.boi_token_id] for p in PROMPTS]
    width = max(map(len, rows))
    assert inputs["input_ids"].tolist() == [[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
    assert inputs["attention_mask"].tolist() == [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    assert not recwarn.list


def test_a_chat_template_is_used_as_transformers_documents_it(folder):
    generator = find_generator(str(folder)).load()
    generator.processor.chat_template = (  # the part of Janus-Pro's that a single prompt passes through
        "{%for m in messages%}<|User|>: {{m['content'][0]['text']}}\n\n{%endfor%}"
        "{%if add_generation_prompt%}<|Assistant|>:{%endif%}"
    )
    with pytest.warns(UserWarning, match="does not know 'cat'"):
        ids = generator.prepare(["a photo of a cat"])["input_ids"][0]
    expected = generator.processor.tokenizer("<|User|>: a photo of a cat\n\n<|Assistant|>:<begin_of_image>").input_ids
    assert ids.tolist() == expected


def test_words_that_the_model_does_not_know_are_named(generator):
    with pytest.warns(UserWarning, match="does not know 'dog', 'sleeping' and will not see them"):
        generator.prepare(["a photo of a dog", "a photo of a sleeping red dog"])


def test_it_generates_what_the_models_own_generate_generates(generator):
    steps = []
    tokens = generator.generate(PROMPTS, guidance_scale=3.0, temperature=0.7, seed=5, on_tokens=steps.append)
    torch.manual_seed(5)
    expected = generator.model.generate(
        **generator.prepare(PROMPTS),
        generation_mode="image",
        guidance_scale=3.0,
        do_sample=True,
        temperature=0.7,
        top_k=0,
    )
    assert tokens.shape == (2, CELLS)
    assert torch.equal(tokens, expected)
    assert steps == [2] * CELLS


def test_a_full_ssd_cache_generates_the_same(generator):
    expected = generator.generate(PROMPTS, seed=1)
    cache = SSDCache.from_policy("full", head_map())
    assert torch.equal(generator.generate(PROMPTS, cache, seed=1), expected)
    assert cache.get_seq_length() > CELLS  # it was really used


def test_the_seed_decides_and_nothing_else_of_chance(generator):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = generator.generate(PROMPTS, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(generator.generate(PROMPTS, seed=1), one)
    assert not torch.equal(generator.generate(PROMPTS, seed=2), one)


def test_temperature_and_guidance_apply(generator):
    greedy = generator.generate(PROMPTS, temperature=0)
    assert torch.equal(generator.generate(PROMPTS, temperature=0, seed=7), greedy)
    assert torch.equal(generator.generate(PROMPTS, temperature=1e-4), greedy)
    assert not torch.equal(generator.generate(PROMPTS, temperature=1.0), greedy)
    assert not torch.equal(generator.generate(PROMPTS, temperature=0, guidance_scale=1.001), greedy)


def test_all_tokens_are_sampled_from_unless_the_checkpoint_says_otherwise(folder):
    generator = find_generator(str(folder)).load()
    greedy = generator.generate(PROMPTS, temperature=0)
    assert not torch.equal(generator.generate(PROMPTS, temperature=2.0), greedy)
    generator.model.generation_config.top_k = 1
    assert torch.equal(generator.generate(PROMPTS, temperature=2.0), greedy)


def test_a_checkpoints_own_settings_are_the_defaults(tmp_path, generator):
    assert generator.sampling() == ResolvedSampling(5.0, 1.0, 0)  # Janus-Pro's, for one without
    checkpoint = find_generator(str(write_checkpoint(tmp_path, guidance_scale=2.5, temperature=0.5)))
    own = checkpoint.load()
    assert own.sampling() == checkpoint.sampling() == ResolvedSampling(2.5, 0.5, 0)
    assert checkpoint.sampling(3.0, seed=4) == ResolvedSampling(3.0, 0.5, 4)
    assert torch.equal(own.generate(PROMPTS), own.generate(PROMPTS, guidance_scale=2.5, temperature=0.5))
    assert not torch.equal(own.generate(PROMPTS), own.generate(PROMPTS, guidance_scale=5.0, temperature=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 1.0}, "guidance_scale=1.0 is out of range.*1.001"),
        ({"guidance_scale": 0.0}, "guidance_scale=0.0 is out of range"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan is out of range"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf is out of range"),
        ({"temperature": -0.1}, "temperature=-0.1 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"seed": 1.5}, "seed=1.5 is out of range"),
        ({"seed": 2**63}, "seed=9223372036854775808 is out of range"),
        ({"prompts": PROMPTS[0]}, "is one text: give a list"),
        ({"prompts": []}, "give at least one prompt"),
        ({"prompts": ["a photo", " "]}, "none that is empty"),
        ({"prompts": ["a photo", None]}, "give at least one prompt"),
    ],
)
def test_settings_out_of_range_are_refused_before_a_step(generator, settings, message):
    steps = []
    with pytest.raises(GeneratorError, match=message):
        generator.generate(**{"prompts": PROMPTS, "on_tokens": steps.append, **settings})
    assert not steps


def test_images_do_not_depend_on_how_many_are_decoded(generator):
    tokens = torch.randint(0, 32, (9, CELLS), generator=torch.Generator().manual_seed(0))
    images = generator.to_images(tokens)
    assert [image.size for image in images] == [(SIDE * 16, SIDE * 16)] * 9
    assert {image.mode for image in images} == {"RGB"}
    alone = generator.to_images(tokens[7:8])[0]
    # convolutions of another batch size may round a level differently
    assert np.abs(np.asarray(images[7], dtype=int) - np.asarray(alone, dtype=int)).max() <= 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_images_are_decoded_in_float32_at_any_dtype(folder, generator, dtype):
    low = find_generator(str(folder)).load(dtype)
    wanted = resolve_dtype(dtype)
    assert {weight.dtype for weight in low.model.model.language_model.parameters()} == {wanted}
    assert low.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert low.model.lm_head.weight is low.model.model.language_model.embed_tokens.weight
    tokens = torch.arange(CELLS)[None] % 32
    assert np.array_equal(low.to_images(tokens)[0], generator.to_images(tokens)[0])
    assert low.generate(PROMPTS[:1], SSDCache(head_map(), 0.5)).shape == (1, CELLS)


def test_a_loaded_model_becomes_a_generator(folder, generator):
    around = generator_of(generator.model)
    assert torch.equal(around.generate(PROMPTS, seed=3), generator.generate(PROMPTS, seed=3))
    with pytest.raises(GeneratorError, match="no processor can be loaded"):
        generator.model.name_or_path, before = "/nowhere/at/all", generator.model.name_or_path
        try:
            generator_of(generator.model)
        finally:
            generator.model.name_or_path = before


def test_auto_is_float32_on_the_cpu_and_bfloat16_elsewhere():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(GeneratorError, match="unknown dtype 'int8'; give 'auto' or one of float32"):
        resolve_dtype("int8")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta:x", ""])
def test_devices_that_are_not_there_are_refused(device):
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(GeneratorError, match=f"device '{device}' cannot be used on this machine"):
        resolve_device(device)


@pytest.mark.parametrize("guidance_scale", [1.001, 5.0])
def test_the_bundled_model_with_a_full_budget_generates_what_dynamic_cache_generates(guidance_scale):
    bundled = find_generator(BUNDLED).load("float32", "cpu")
    captions = ["a photo of a red circle", "a photo of a square left of a triangle", "a photo of four circles"]
    settings = {"guidance_scale": guidance_scale, "temperature": 1.0, "seed": 3}
    expected = bundled.generate(captions, DynamicCache(), **settings)
    cache = SSDCache(bundled.checkpoint.head_map(), 1.0)
    assert torch.equal(bundled.generate(captions, cache, **settings), expected)
