"""Language models that ssd-cache has no file for: full attention works as it is, all else is refused in clear words."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import left_padded_prompts, tiny_causal, words_tokenizer
from helpers.tiny_checkpoint import write_family
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    T5Config,
    T5ForConditionalGeneration,
)

from ssd_cache import HeadMap, HeadMapError, SSDCache, enable, profile_heads
from ssd_cache.models import CausalLMGenerator, GeneratorError, find_generator, generator_of

GRID = (12, 8)
HEAD_MAP = HeadMap(torch.tensor([[True, False], [False, True]]), GRID)
TEXTS = ["a red circle", "a blue square and a circle"]


def generate(model, cache, **settings):
    torch.manual_seed(2)
    inputs = left_padded_prompts([5, 9])
    return model.generate(
        **inputs, past_key_values=cache, min_new_tokens=96, max_new_tokens=96, do_sample=True, **settings
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "gemma"])
def test_full_attention_is_dynamic_cache_at_a_full_budget_and_works_at_a_fifth(model_type):
    model = tiny_causal(model_type)
    expected = generate(model, DynamicCache())
    assert torch.equal(generate(model, SSDCache(HEAD_MAP, 1.0)), expected)
    cache = SSDCache(HEAD_MAP, 0.2, buffer=2)
    assert not torch.equal(generate(model, cache), expected)
    assert {store.plan.num_slots for layer in cache.layers for store in layer.stores} == {19}


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "gemma"])
def test_guidance_of_any_of_them_is_generated_in_one_batch(model_type):
    model = tiny_causal(model_type)
    inputs, negative = left_padded_prompts([5, 9]), left_padded_prompts([3, 3], seed=1)
    call = inputs | {"negative_prompt_ids": negative["input_ids"], "guidance_scale": 2.0, "do_sample": False}
    expected = model.generate(**call, max_new_tokens=60, return_dict_in_generate=True, output_scores=True)
    with enable(model, HEAD_MAP, budget=1.0):
        found = model.generate(**call, max_new_tokens=60, return_dict_in_generate=True, output_scores=True)
    # float32 sums in another order; the tokens are the same, so that every step sees the same
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_layers_of_sliding_attention_are_refused_before_anything_is_generated(model_type):
    model = tiny_causal(
        model_type, sliding_window=16, query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"]
    )
    with pytest.raises(ValueError, match="has layers of kind sliding_attention"):
        with enable(model, HEAD_MAP):
            pass
    with pytest.raises(ValueError, match="layer 0 attends a sliding window of 16 tokens, and prompt and image are 105"):
        generate(model, SSDCache(HEAD_MAP, 0.3, buffer=2))
    assert model.config._attn_implementation == "ssd"


def test_a_window_that_holds_the_whole_image_never_slides():
    model = tiny_causal("mistral", sliding_window=105)
    assert torch.equal(generate(model, SSDCache(HEAD_MAP, 1.0)), generate(model, DynamicCache()))
    with pytest.raises(ValueError, match="sliding window of 104 tokens"):
        generate(tiny_causal("mistral", sliding_window=104), SSDCache(HEAD_MAP, 1.0))


def test_plain_tokens_with_a_count_for_a_budget():
    model = tiny_causal("llama")
    plain = HeadMap.online(num_layers=2, num_kv_heads=2, grid=(96, 1))
    with enable(model, plain, budget=24, buffer=4):
        assert generate(model, None).shape == (2, 9 + 96)


def test_a_map_of_another_model_is_refused_by_both_roads():
    model, other = tiny_causal("llama"), HeadMap(torch.zeros(3, 2, dtype=torch.bool), GRID)
    with pytest.raises(HeadMapError, match="3 layers x 2 KV heads, but LlamaForCausalLM has 2 x 2"):
        with enable(model, other):
            pass
    with pytest.raises(HeadMapError, match="3 layers, but the model used 2"):
        generate(model, SSDCache(other))


def encoder_and_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "deepseek-community/Janus-Pro-1B", "a str, which has no autoregressive part"),
        (lambda: tiny_causal("llama").model, "a LlamaModel, which has no autoregressive part: it needs .* generate"),
        (lambda: encoder_and_decoder().encoder, "a T5Stack, which has no autoregressive part"),
        (lambda: torch.nn.Linear(2, 2), "a Linear, which has no autoregressive part"),
        (encoder_and_decoder, "a T5ForConditionalGeneration, whose prompts go through an encoder"),
    ],
    ids=["name", "no generate", "encoder", "layer", "encoder and decoder"],
)
def test_what_is_no_generating_decoder_is_refused(make, message):
    with pytest.raises(TypeError, match=f"enable got {message}"):
        with enable(make(), HEAD_MAP):
            pass


@pytest.mark.parametrize(
    ("made_for", "model_id", "warns"),
    [
        ("user/Some-Llama", "user/Some-Llama", False),
        ("user/Some-Llama", "/models/some-llama-copy", False),
        ("/models/Some-Llama/", "user/Some-Llama", False),
        (None, "user/Some-Llama", False),
        ("user/Some-Llama", "", False),  # a model made in memory
        ("user/Some-Llama", "user/Other", True),
    ],
)
def test_a_map_that_fits_but_names_another_model_is_warned_of(recwarn, made_for, model_id, warns):
    model, head_map = tiny_causal("llama"), HeadMap(HEAD_MAP.is_spatial, GRID, model_id=made_for)
    model.name_or_path = model_id
    with enable(model, head_map):
        pass
    texts = [str(warning.message) for warning in recwarn if "was made for" in str(warning.message)]
    assert len(texts) == warns
    assert all(f"was made for {made_for}, and the model is {model_id}" in text for text in texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_family("llama", tmp_path_factory.mktemp("llama"))


def test_a_stated_grid_makes_a_generator_of_any_of_them(folder):
    with pytest.raises(GeneratorError, match="is of type 'llama'; .* that you state: grid=\\(rows, columns\\)"):
        find_generator(str(folder))
    checkpoint = find_generator(str(folder), grid=GRID)
    assert checkpoint.family is CausalLMGenerator
    with pytest.warns(UserWarning, match="does not know as an image generator: each prompt is followed by 12 x 8"):
        generator = checkpoint.load()
    expected = generator.generate(TEXTS, DynamicCache(), seed=1)
    assert expected.shape == (2, 96)
    assert torch.equal(generator.generate(TEXTS, SSDCache(HEAD_MAP, 1.0), seed=1), expected)
    with pytest.raises(GeneratorError, match="generates tokens, and ssd-cache cannot decode them"):
        generator.to_images(expected)
    with pytest.warns(UserWarning, match="plain tokens"):
        again = generator_of(generator.model, generator.processor, GRID)
    head_map = profile_heads(again, TEXTS, progress=False)
    assert (head_map.grid, head_map.model_type) == (GRID, "llama")


def test_a_grid_is_for_models_that_generate_in_several_sizes():
    with pytest.raises(
        GeneratorError, match="grid=\\(10, 10\\): model 'shapes-janus' always generates 24 x 24 visual tokens"
    ):
        find_generator("shapes-janus", grid=(10, 10))
    assert find_generator("shapes-janus", grid=(24, 24)).grid == (24, 24)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AutoConfig.for_model("vit").to_dict(), "'vit', which is not a causal language model of transformers"),
        (AutoConfig.for_model("chameleon").to_dict(), "'chameleon', which is not a causal language model"),
        ({"model_type": "nobody"}, "its config.json cannot be read: .*nobody"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "c.Config"}}, "code of its own.*grid=\\(rows, columns\\)"),
    ],
    ids=["images in", "no causal head", "unknown type", "remote code"],
)
def test_a_grid_makes_no_generator_of_other_models(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GeneratorError, match=message):
        find_generator(str(tmp_path), grid=GRID)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        ("gpt_neox", {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}),
    ],
)
def test_a_configuration_that_names_no_kv_heads_has_one_for_each_query_head(model_type, sizes):
    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, vocab_size=64, **tokens, **sizes)).eval()
    expected = generate(model, DynamicCache())
    head_map = HeadMap(torch.tensor([[True, False, True, False]] * 2), GRID)
    with enable(model, head_map, budget=1.0):
        assert torch.equal(generate(model, None), expected)
        assert torch.equal(generate(model, SSDCache.online(model, 1.0, grid=GRID)), expected)
        assert not torch.equal(generate(model, SSDCache(head_map, 0.2, buffer=2)), expected)


def test_attention_code_of_a_model_that_passes_no_queries_takes_spatial_heads_only():
    """ImageGPT computes attention itself, not through transformers' AttentionInterface."""
    torch.manual_seed(0)
    sizes = {"n_positions": 65, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 17, "initializer_range": 0.2}
    model = ImageGPTForCausalImageModeling(ImageGPTConfig(**sizes)).eval()
    shape = {"num_layers": 2, "num_kv_heads": 4, "grid": (8, 8)}

    def generate(cache=None):
        torch.manual_seed(2)
        start, own = torch.full((2, 1), 16), {"min_new_tokens": 64, "max_new_tokens": 64, "suppress_tokens": [16]}
        return model.generate(start, do_sample=True, past_key_values=cache, **own)

    expected = generate()
    for kind in ("spatial", "semantic"):
        assert torch.equal(generate(SSDCache(HeadMap.uniform(kind, **shape), 1.0)), expected)
    for head_map in (HeadMap.uniform("spatial", **shape), HeadMap.online(**shape)):
        block = enable(model, head_map, budget=0.4)
        with block:
            assert not torch.equal(generate(), expected)
        assert block.memory_stats().key_value == block.memory_stats().full_cache * (1 + 26) // 64
    semantic = HeadMap.uniform("semantic", **shape)
    with pytest.raises(ValueError, match="ImageGPTModel has attention code of its own, .* HeadMap.online"):
        with enable(model, semantic, budget=0.4):
            pass
    with pytest.raises(ValueError, match="layer 0 of SSDCache does not get to see the model's queries"):
        generate(SSDCache(semantic, 0.4))
    assert torch.equal(generate(), expected)
    assert not {"generate", "_attention_in_force"} & (vars(model).keys() | vars(model.transformer).keys())


TAR_GRID = (9, 9)  # of <S2>; <S0> has 27 x 27, <S1> 13 x 13


def test_tar_generates_through_its_own_prompt_format():
    """`t2i_inference.py` of csuhan/Tar: a chat template, <im_start><S0>, plain generate, codes <I0> to <I65535>."""
    codes = [f"<I{code}>" for code in range(16)]
    marks = {
        "chat_start": "<|im_start|>",
        "chat_end": "<|im_end|>",
        "image_start": "<im_start>",
        "image_end": "<im_end>",
    }
    words = ["system", "user", "assistant", "You", "are", "a", "helpful", "photo", "of", "macaw"]
    tokenizer = words_tokenizer(words, marks, more=["<S0>", "<S1>", "<S2>", *codes])
    tokenizer.add_tokens(["<S0>", "<S1>", "<S2>", *codes])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    model = tiny_causal("qwen2", vocab_size=len(tokenizer))
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "a macaw"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + "<im_start><S2>"
    inputs = tokenizer(text, return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist())[-2:] == ["<im_start>", "<S2>"]
    length, cells = inputs.input_ids.shape[1], TAR_GRID[0] * TAR_GRID[1]

    def generate():
        torch.manual_seed(2)
        own = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 1200}
        return model.generate(inputs.input_ids, max_new_tokens=cells, **own)

    expected = generate()
    with enable(model, HEAD_MAP.with_grid(TAR_GRID), budget=1.0):
        assert torch.equal(generate(), expected)
    block = enable(model, HEAD_MAP.with_grid(TAR_GRID), budget=0.2)
    with block:
        tokens = generate()
    assert tokens.shape == (1, length + cells)
    assert not torch.equal(tokens, expected)
    stats = block.memory_stats()
    assert stats.key_value * (length + cells - 1) == stats.full_cache * (length + 16)  # 16 = round(.2 * 81)
