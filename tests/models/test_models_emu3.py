"""Emu3: grid with end-of-line tokens, grammar, and guidance of both branches in one batch against transformers' own.

A small random `Emu3ForConditionalGeneration` with its real processor and VQ, saved to a folder and loaded back.
"""

from __future__ import annotations

import time

import pytest
import torch
from helpers.compiling import needs_compiler
from helpers.models import emu3_processor, tiny_emu3
from helpers.tiny_checkpoint import write_family
from transformers import DynamicCache

from ssd_cache import HeadMap, HeadMapError, SSDCache, enable
from ssd_cache.decode.guidance import batched_guidance
from ssd_cache.models import Emu3Generator, GeneratorError, find_generator, generator_of

HEIGHT, WIDTH = 5, 6
GRID = (HEIGHT, WIDTH + 1)
CELLS = HEIGHT * (WIDTH + 1)
PROMPTS = ["a photo of a red circle", "a blue square"]
HEAD_MAP = HeadMap(torch.tensor([[True, False], [False, True]]), GRID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family("emu3", tmp_path_factory.mktemp("emu3"))


@pytest.fixture(scope="module")
def generator(folder):
    return find_generator(str(folder), grid=GRID).load()


def user_call(generator, prompts=PROMPTS, negative="lowres", extra=3, **settings):
    """The arguments of a call as transformers' documentation of Emu3 makes it."""
    call = generator.prepare(prompts)
    if negative is not None:
        unconditional = generator.prepare([negative] * len(prompts))
        call["negative_prompt_ids"] = unconditional["input_ids"]
        call["negative_prompt_attention_mask"] = unconditional["attention_mask"]
    call["prefix_allowed_tokens_fn"] = generator.grammar(call["input_ids"].shape[1])
    call |= {"guidance_scale": 3.0, "max_new_tokens": CELLS + extra, "do_sample": False}
    return call | {"return_dict_in_generate": True, "output_scores": True} | settings


def test_the_configuration_tells_the_real_grid_and_a_grid_may_be_asked_for(folder):
    assert find_generator(str(folder)).grid == (90, 91)
    checkpoint = find_generator(str(folder), grid=GRID)
    assert checkpoint.family is Emu3Generator
    assert (checkpoint.grid, checkpoint.num_layers, checkpoint.num_kv_heads) == (GRID, 2, 2)
    assert checkpoint.num_visual_tokens == CELLS
    with pytest.raises(HeadMapError, match="grid of 90 x 91, but .* 2 x 2 and 5 x 7"):
        checkpoint.check_head_map(HEAD_MAP.with_grid((90, 91)))
    with pytest.raises(GeneratorError, match="grid=\\(0, 7\\)"):
        find_generator(str(folder), grid=(0, 7))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_full_budget_generates_what_dynamic_cache_generates(generator, temperature):
    expected = generator.generate(PROMPTS, DynamicCache(), temperature=temperature, seed=1)
    cache = SSDCache(HEAD_MAP, 1.0)
    assert torch.equal(generator.generate(PROMPTS, cache, temperature=temperature, seed=1), expected)
    assert cache.layers[0].stores[0].keys.shape[0] == 2 * len(PROMPTS)  # both branches are in it
    assert cache.get_seq_length() > CELLS


def test_a_small_budget_generates_whole_images_with_all_slots_bounded(generator):
    cache = SSDCache(HEAD_MAP, 10, buffer=2)
    tokens = generator.generate(PROMPTS, cache, seed=1)
    assert all(store.num_stored <= 10 for layer in cache.layers for store in layer.stores)
    rows = tokens.view(len(PROMPTS), *GRID)
    mapping = generator.model.vocabulary_mapping
    assert (rows[..., -1] == mapping.eol_token_id).all()
    assert torch.isin(rows[..., :-1], torch.tensor(mapping.image_tokens)).all()
    assert not torch.equal(tokens, generator.generate(PROMPTS, seed=1))


def test_images_are_of_the_grids_size(generator):
    images = generator.to_images(generator.generate(PROMPTS, seed=1))
    assert [image.size for image in images] == [(8 * WIDTH, 8 * HEIGHT)] * 2
    assert images[0].tobytes() != images[1].tobytes()


@pytest.mark.parametrize(
    ("negative", "prompts"),
    [("lowres", PROMPTS), ("lowres text lowres text lowres", PROMPTS[1:]), (None, PROMPTS), ("lowres", PROMPTS[:1])],
    ids=["shorter", "longer", "none given", "one prompt"],
)
def test_guidance_in_one_batch_is_transformers_own(generator, negative, prompts):
    call = user_call(generator, prompts, negative)
    expected = generator.model.generate(**call)
    with enable(generator.model, HEAD_MAP, budget=1.0):
        found = generator.model.generate(**call)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in list(zip(found.scores, expected.scores, strict=True))[:CELLS]:
        # float32 sums in another order: rows are padded, and a product of four rows is not two of two
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(generator.model)
    assert "generate" not in vars(generator.model)


def test_the_image_is_closed_as_the_grammar_says(generator):
    call = user_call(generator)
    with enable(generator.model, HEAD_MAP, budget=0.3, buffer=2, num_recent=2):
        sequences = generator.model.generate(**call).sequences
    tokenizer = generator.processor.tokenizer
    closing = [tokenizer.eof_token_id, tokenizer.eoi_token_id, tokenizer.eos_token_id]
    assert sequences[:, -3:].tolist() == [closing] * 2


def test_enable_holds_both_branches_in_one_small_cache(generator, made):
    with enable(generator.model, HEAD_MAP, budget=10, buffer=2):
        generator.model.generate(**user_call(generator, num_return_sequences=2, do_sample=True))
    _, cache = made
    assert {store.keys.shape[0] for layer in cache.layers for store in layer.stores} == {2 * 2 * len(PROMPTS)}
    assert cache.nbytes < 0.6 * cache.memory_stats().full_cache


@needs_compiler
def test_enable_fast_generates_the_eager_tokens(generator):
    """With guidance in one batch and the grammar; every step but an image's first is compiled."""
    torch._dynamo.reset()
    call, settings = user_call(generator), {"budget": 10, "buffer": 2}
    with enable(generator.model, HEAD_MAP, **settings):
        expected = generator.model.generate(**call)
    block = enable(generator.model, HEAD_MAP, fast=True, **settings)
    with block:
        for _ in range(2):
            assert torch.equal(generator.model.generate(**call).sequences, expected.sequences)
            served = block.served_by()
            # the closing tokens come after the grid, and the last of them is not fed
            assert (served.attention, served.eager, served.compiled) == ("CPU loop", 1, CELLS + 1)


def test_a_call_without_guidance_and_one_for_text_are_left_alone(generator, made):
    call = user_call(generator, negative=None, guidance_scale=None)
    text = generator.prepare(PROMPTS) | {"max_new_tokens": 50, "do_sample": False}
    plain, said = generator.model.generate(**call).sequences, generator.model.generate(**text)
    with enable(generator.model, HEAD_MAP, budget=1.0):
        assert torch.equal(generator.model.generate(**call).sequences, plain)
        assert torch.equal(generator.model.generate(**text), said)
    assert [cache.get_seq_length() > 0 for cache in made] == [False, True]  # one checked settings; text got none


def test_what_guidance_cannot_double_is_refused(generator):
    model = generator.model
    call = user_call(generator)
    with enable(model, HEAD_MAP, budget=1.0):
        with pytest.raises(ValueError, match="num_beams=2 with guidance_scale=3.0"):
            model.generate(**call | {"num_beams": 2})
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            model.generate(**call | {"prefill_chunk_size": 4})
        three = {name: call[name][:1].repeat(3, 1) for name in call if name.startswith("negative")}
        with pytest.raises(ValueError, match="negative_prompt_ids has 3 rows and the batch 2"):
            model.generate(**call | three)
    with batched_guidance(model, 3.0), pytest.raises(ValueError, match="needs a cache"):
        model(input_ids=call["input_ids"])
    assert "forward" not in vars(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SSD 20%", "DynamicCache"])
def test_full_length(name):
    """8,190 tokens of one guided image; prints bytes and time (`pytest -m slow -s -k full_length`)."""
    generator = generator_of(tiny := tiny_emu3(emu3_processor(), heads=8, hidden=256), emu3_processor())
    cache = SSDCache(HEAD_MAP.with_grid((90, 91)), 0.2) if name == "SSD 20%" else DynamicCache()
    marks = []
    generator.generate(PROMPTS[:1], cache, on_tokens=lambda _: marks.append(time.perf_counter()))
    if isinstance(cache, SSDCache):
        held, num_prompt = cache.nbytes, cache.layers[0].num_prompt
        assert held == 2 * 2 * 2 * 2 * (num_prompt + 1638) * 32 * 4  # layers, K and V, rows, KV heads; float32
    else:
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    late = (marks[-1] - marks[-501]) / 500
    print(f"{name}: {tiny.dtype}, {held / 2**20:.1f} MiB, {late * 1e3:.1f} ms for each of the last 500 tokens")
