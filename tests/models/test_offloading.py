"""Models whose weights accelerate brings from CPU memory or disk for each step, all of them or the decoder's.

The execution device is the CPU, so the hooks are accelerate's own and nothing is moved to a GPU. Single layers on a
disk are in test_models_table.py, diffusers' offloading in test_models_glm_image.py.
"""

from __future__ import annotations

import pytest
import torch
from helpers.compiling import needs_compiler
from helpers.tiny_checkpoint import head_map, write_checkpoint
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_cache import enable
from ssd_cache.models import GeneratorError, generator_of

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (pip install -e '.[distributed]')")
KINDS = ["cpu", "disk", "decoder"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("janus"), guidance_scale=3.0)


def load(folder, kind=None, place=None):
    model = JanusForConditionalGeneration.from_pretrained(folder).eval()
    if kind == "disk":
        accelerate.disk_offload(model, place, execution_device="cpu")
    elif kind is not None:
        accelerate.cpu_offload(model if kind == "cpu" else model.model.language_model, execution_device="cpu")
    weight = model.model.language_model.layers[1].self_attn.k_proj.weight
    assert weight.device.type == ("cpu" if kind is None else "meta")  # it really is not here
    return model


def generate(model, folder, **settings):
    inputs = JanusProcessor.from_pretrained(folder)(
        text=["a photo of a red circle", "a square"], generation_mode="image", padding=True, padding_side="left",
        max_length=None, return_tensors="pt",
    )  # fmt: skip
    torch.manual_seed(0)
    with enable(model, head_map(), buffer=4, num_recent=4, **settings):
        return model.generate(**inputs, generation_mode="image")


@pytest.mark.parametrize("budget", [1.0, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_generates_the_same(folder, tmp_path, kind, budget):
    tokens = [generate(model, folder, budget=budget) for model in (load(folder, kind, tmp_path), load(folder))]
    torch.testing.assert_close(*tokens, rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_an_offloaded_model_continue_uncompiled(folder, tmp_path, kind):
    with pytest.warns(UserWarning, match="fast_decode continues uncompiled: .*AlignDevicesHook"):
        tokens = generate(load(folder, kind, tmp_path), folder, budget=30, fast=True)
    assert torch.equal(tokens, generate(load(folder), folder, budget=30))


def test_a_generator_of_a_wholly_offloaded_model_is_refused(folder, tmp_path):
    processor = JanusProcessor.from_pretrained(folder)
    with pytest.raises(GeneratorError, match=r"all weights of .* are offloaded.*device_map"):
        generator_of(load(folder, "disk", tmp_path), processor)
    assert generator_of(load(folder, "decoder"), processor).prepare(["a square"])["input_ids"].device.type == "cpu"
