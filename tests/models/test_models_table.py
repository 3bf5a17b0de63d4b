"""The table of docs/models.md: a test a column, a family a row. What is special about a family is tested beside it.

Small random checkpoints of the real classes, saved and loaded back, each in a grid of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.compiling import needs_compiler
from helpers.tiny_checkpoint import write_family
from transformers import DynamicCache, GlmImageConfig

from ssd_cache import HeadMap, SSDCache
from ssd_cache.bench import SHAPES
from ssd_cache.kernels import dispatch
from ssd_cache.models import FAMILIES, Checkpoint, find_generator, generator_of
from ssd_cache.models.causal_lm import CausalLMGenerator

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
PROMPTS = ["a red circle", "a blue square and a circle"]
GRIDS = {"janus": (8, 8), "emu3": (6, 7), "glm": (8, 4), "llama": (6, 6)}
LAYERS = {"janus": "model.language_model", "emu3": "model.text_model", "glm": "model.language_model", "llama": "model"}
"""Where a family's layers are in its model."""


@pytest.fixture(scope="module", params=GRIDS)
def family(request, tmp_path_factory):
    """Name, generator, and the labels in its grid."""
    name = request.param
    folder = write_family(name, tmp_path_factory.mktemp("table") / name)
    generator = find_generator(str(folder), GRIDS[name]).load()
    assert (generator.prepare(PROMPTS)["attention_mask"] == 0).any()  # left-padded
    checkpoint = generator.checkpoint
    labels = HeadMap(torch.tensor([[True, False], [False, True]])).with_layout(checkpoint.layout)
    return name, generator, labels


def test_budget_1_is_dynamic_cache_bit_for_bit(family):
    _, generator, labels = family
    expected = generator.generate(PROMPTS, DynamicCache(), seed=1)
    assert expected.shape == (2, generator.checkpoint.num_visual_tokens)
    assert torch.equal(generator.generate(PROMPTS, SSDCache(labels, 1.0), seed=1), expected)


def test_a_fifth_generates_whole_images(family):
    _, generator, labels = family
    cells = generator.checkpoint.num_visual_tokens
    cache = SSDCache(labels, 0.2, buffer=2)
    tokens = generator.generate(PROMPTS, cache, seed=1)
    assert tokens.shape == (2, cells)
    assert not torch.equal(tokens, generator.generate(PROMPTS, DynamicCache(), seed=1))
    assert {store.plan.num_slots for layer in cache.layers for store in layer.stores} == {round(0.2 * cells)}
    stats = cache.memory_stats()
    prompt = cache.layers[0].num_prompt
    assert stats.key_value / stats.full_cache == pytest.approx((prompt + round(0.2 * cells)) / (prompt + cells - 1))


@needs_compiler
def test_at_a_fifth_the_cpu_loop_generates_the_tokens_of_torchs_attention(family, monkeypatch):
    _, generator, labels = family
    tokens, backends = [], []
    for _ in range(2):
        cache = SSDCache(labels, 0.2, buffer=2)
        tokens.append(generator.generate(PROMPTS, cache, temperature=0))
        backends.append({layer.backend for layer in cache.layers})
        monkeypatch.setattr(dispatch, "can_serve", lambda *states, **options: False)
    assert backends == [{"CPU loop"}, {"torch's attention"}]
    assert torch.equal(*tokens)


def test_visual_embeddings_get_the_generated_tokens(family):
    """Every token but perhaps the last, in the row of its prompt."""
    _, generator, _ = family
    seen = []
    handle = generator.visual_embeddings.register_forward_pre_hook(lambda module, ids: seen.append(ids[0]))
    tokens = generator.generate(PROMPTS, DynamicCache(), seed=1)
    handle.remove()
    found = torch.cat([ids for ids in seen if ids.shape[1] == 1], 1)[~generator.is_unconditional(len(PROMPTS))]
    assert torch.equal(found[:, : tokens.shape[1] - 1], tokens[:, :-1])


def test_prompts_padded_on_the_left_are_those_alone(family):
    name, generator, labels = family
    if name == "janus":
        pytest.skip("transformers' Janus lets unconditional rows see the padding; test_cache.py has the padded rows")
    together = generator.generate(PROMPTS, SSDCache(labels, 0.3, buffer=2), temperature=0)
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        assert torch.equal(generator.generate([prompt], SSDCache(labels, 0.3, buffer=2), temperature=0)[0], tokens)


def test_layers_on_several_devices_generate_the_same(family, tmp_path):
    """The second one is a disk: accelerate brings a layer from there for each step."""
    pytest.importorskip("accelerate")
    name, generator, labels = family
    layer, whole = f"{LAYERS[name]}.layers.1", generator.model
    weights = [each for each, _ in (*whole.named_parameters(), *whole.named_buffers()) if not each.startswith(layer)]
    parts = {each.rpartition(".")[0]: "cpu" for each in (*weights, "lm_head.weight")} | {layer: "disk"}
    model = (
        type(generator.model)
        .from_pretrained(generator.checkpoint.source, device_map=parts, offload_folder=tmp_path / "off")
        .eval()
    )
    model.set_attn_implementation({"text_config": "ssd"} if hasattr(model.config, "text_config") else "ssd")
    assert next(model.get_decoder().layers[1].parameters()).device.type == "meta"  # it really is not here
    split = generator_of(model, generator.processor, GRIDS[name])
    for budget in (1.0, 0.2):
        tokens = [each.generate(PROMPTS, SSDCache(labels, budget, buffer=2), seed=1) for each in (split, generator)]
        torch.testing.assert_close(*tokens, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "config", "grid", "num_rows"),
    [
        ("Janus-Pro-1B", SHAPES["janus-pro-1b"].make_config(), (24, 24), 2),
        ("Janus-Pro-7B", SHAPES["janus-pro-7b"].make_config(), (24, 24), 2),
        ("Emu3", SHAPES["emu3"].make_config(), (90, 91), 2),
        ("GLM-Image, 1152 x 768 pixels", GlmImageConfig(), (36, 24), 1),
        ("GLM-Image, 1024 x 1024 pixels", GlmImageConfig(), (32, 32), 1),
    ],
)
def test_bytes_of_an_image(name, config, grid, num_rows):
    """The row of docs/models.md, from the configuration of the real size."""
    checkpoint = Checkpoint(name, "", config, FAMILIES.get(config.model_type, CausalLMGenerator), grid)
    text = config.get_text_config(decoder=True)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    uniform = HeadMap.uniform("semantic", num_layers=checkpoint.num_layers, num_kv_heads=checkpoint.num_kv_heads)
    cache = SSDCache(uniform.with_layout(checkpoint.layout), 0.2)
    slots = sum(slots for layer in cache.layers for slots in layer.plan.num_slots)
    of_slot = 2 * size * 2 * num_rows  # K and V, bfloat16
    full = checkpoint.num_layers * checkpoint.num_kv_heads * checkpoint.num_visual_tokens * of_slot
    lines = DOCS.read_text("utf-8").splitlines()
    [row] = [line for line in lines if line.startswith(f"| {name} |") and line.endswith(" MiB |")]
    shape = f"{checkpoint.num_layers} x {checkpoint.num_kv_heads} x {size}"
    assert row.split(" | ")[1] == shape
    amounts = f"{full / 2**20:,.0f} MiB | {slots * of_slot / 2**20:.0f} MiB"
    assert row.endswith(f" = {checkpoint.num_visual_tokens:,} | {num_rows} | {amounts} |")


def test_the_tests_that_the_table_names_are_there():
    tests = {path.name: path for path in Path(__file__).parents[1].rglob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", DOCS.read_text("utf-8"))
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in tests[file].read_text("utf-8"), f"{file}::{name}"
