"""DeepSeek's own `janus` package: its script's loop with an `SSDCache`, and ours, token for token.

A small random `MultiModalityCausalLM` with its real processor and VQ decoder. Skipped where the package cannot be
imported; docs/models.md says how to have it. Not skipped: what is told to those who lack it.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import words_tokenizer
from transformers import DynamicCache

from ssd_cache import HeadMap, SSDCache, measure_heads
from ssd_cache.evaluation.fidelity import measure_fidelity
from ssd_cache.models import DeepSeekJanusGenerator, GeneratorError, find_generator

try:
    import janus.models as theirs
    from janus.models.modeling_vlm import MultiModalityConfig

    reason = ""
except Exception as error:
    reason = f"DeepSeek's janus package cannot be imported ({error!r}); it is on GitHub alone, see docs/models.md"
needs_janus = pytest.mark.skipif(bool(reason), reason=reason)

HIDDEN, LAYERS, HEADS = 32, 2, 4
PROMPT = "a photo of a red circle"
HEAD_MAP = HeadMap(torch.tensor([[True, False, True, False], [False, False, True, True]]))
SPECIAL = ["<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>"]  # noqa: RUF001, theirs
CACHE_LINE = "past_key_values=outputs.past_key_values if i != 0 else "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    projector = {"depth": 2, "n_embed": HIDDEN, "projector_type": "mlp_gelu"}
    tower = {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": 1}
    config = MultiModalityConfig(
        vision_config={"cls": "CLIPVisionTower", "params": tower},
        aligner_config={"cls": "MlpProjector", "params": projector | {"input_dim": 1024}},
        gen_vision_config={"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        gen_aligner_config={"cls": "MlpProjector", "params": projector | {"input_dim": 8}},
        gen_head_config={
            "cls": "vision_head",
            "params": {"image_token_embed": HIDDEN, "image_token_size": 16384, "n_embed": HIDDEN},
        },
        language_config={
            "vocab_size": 64,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
        },
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deepseek")
    theirs.MultiModalityCausalLM(config).save_pretrained(folder)
    words = ["a", "photo", "of", "red", "blue", "circle", "square", "User", "Assistant", ":", "."]
    tokenizer = words_tokenizer(words, {}, more=SPECIAL)
    theirs.VLChatProcessor(theirs.VLMImageProcessor(image_size=384), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    return find_generator(str(folder)).load()


def run_script(generator, monkeypatch, tmp_path, cache=None, number=2):
    """Tokens that the script's own `generate` generates, without its GPU; with a cache, after the two-line change."""
    script = Path(theirs.__file__).parents[2] / "generation_inference.py"
    if not script.is_file():
        pytest.skip("DeepSeek's generation_inference.py is not beside their package")
    text = script.read_text("utf-8").replace(".cuda()", "")
    assert CACHE_LINE + "None" in text
    if cache is not None:
        text = text.replace(CACHE_LINE + "None", CACHE_LINE + "cache")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    nodes += [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "generate"]
    namespace = {"cache": cache}
    exec(compile(ast.Module(nodes, []), str(script), "exec"), namespace)
    found = []

    def decode(tokens, shape):
        found.append(tokens)
        return torch.zeros(shape[0], 3, 384, 384)

    monkeypatch.setattr(generator.model.gen_vision_model, "decode_code", decode)
    monkeypatch.chdir(tmp_path)
    processor = generator.processor
    chat = [{"role": "User", "content": PROMPT}, {"role": "Assistant", "content": ""}]
    prompt = processor.apply_sft_template_for_multi_turn_prompts(
        conversations=chat, sft_format=processor.sft_format, system_prompt=""
    )
    torch.manual_seed(3)
    namespace["generate"](generator.model, processor, prompt + processor.image_start_tag, parallel_size=number)
    return found[0].long()


def generate(generator, cache=None, prompts=(PROMPT, PROMPT)):
    return generator.generate(prompts, cache, seed=3)


@needs_janus
def test_visual_embeddings_get_the_generated_tokens(generator):
    seen = []
    handle = generator.visual_embeddings.register_forward_pre_hook(lambda module, ids: seen.append(ids[0]))
    tokens = generate(generator)
    handle.remove()
    assert torch.equal(torch.cat(seen, 1)[~generator.is_unconditional(2)], tokens)


@needs_janus
def test_the_loop_is_that_of_the_script(generator, monkeypatch, tmp_path):
    expected = run_script(generator, monkeypatch, tmp_path)
    assert expected.shape == (2, 576)
    assert torch.equal(generate(generator), expected)
    assert torch.equal(generate(generator, SSDCache(HEAD_MAP, 1.0)), expected)
    assert torch.equal(run_script(generator, monkeypatch, tmp_path, SSDCache(HEAD_MAP, 1.0)), expected)


@needs_janus
def test_the_script_takes_a_small_cache_after_two_lines(generator, monkeypatch, tmp_path):
    cache = SSDCache(HEAD_MAP, 0.2)
    tokens = run_script(generator, monkeypatch, tmp_path, cache)
    assert {store.plan.num_slots for layer in cache.layers for store in layer.stores} == {115}
    assert torch.equal(generate(generator, SSDCache(HEAD_MAP, 0.2)), tokens)
    assert not torch.equal(generate(generator), tokens)


@needs_janus
def test_prompts_of_unequal_length_are_padded(generator):
    prompts = [PROMPT, "a blue square"]
    mask = generator.prepare(prompts)["attention_mask"]
    assert mask[2].sum() == mask[3].sum() < mask.shape[1]
    expected = generate(generator, DynamicCache(), prompts)
    assert torch.equal(generate(generator, SSDCache(HEAD_MAP, 1.0), prompts), expected)


@needs_janus
def test_it_is_a_generator_like_all_others(folder, generator):
    checkpoint = find_generator(str(folder))
    assert checkpoint.family is DeepSeekJanusGenerator
    assert (checkpoint.grid, checkpoint.num_layers, checkpoint.num_kv_heads) == ((24, 24), LAYERS, HEADS)
    tokens = generator.generate([PROMPT], SSDCache(HEAD_MAP, 0.2), seed=1)
    assert generator.is_unconditional(2).tolist() == [False, True, False, True]
    assert generator.to_images(tokens)[0].size == (384, 384)
    statistics = measure_heads(generator, [PROMPT], progress=False)
    assert statistics.num_images == 1
    caches = {"full": lambda: SSDCache(HEAD_MAP, 1.0), "small": lambda: SSDCache(HEAD_MAP, 0.2)}
    found = measure_fidelity(generator, [PROMPT], caches)
    assert found["full"].mean_kl == 0 < found["small"].mean_kl
    assert generator.model.language_model.config._attn_implementation == "ssd"


def test_without_the_package_the_remedy_is_told(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
    monkeypatch.setitem(sys.modules, "janus.models", None)
    monkeypatch.setitem(sys.modules, "janus", None)
    with pytest.raises(GeneratorError, match="for DeepSeek's janus package, which cannot be imported here"):
        find_generator(str(tmp_path))
