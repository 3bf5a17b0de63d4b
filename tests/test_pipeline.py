"""`enable` inside transformers' own any-to-any pipeline: one prompt, and a list of prompts.

With torchvision the pipelines of Janus and Emu3 run as they are (docs/models.md, "Pipelines"). Without it, Janus's runs
with the replacements that `helpers/janus_pipeline.py` names.
"""

from __future__ import annotations

import pytest
import torch
from helpers.janus_pipeline import janus_pipeline
from helpers.tiny_checkpoint import head_map, write_checkpoint, write_family
from transformers import pipeline
from transformers.utils import is_torchvision_available

from ssd_cache import HeadMap, enable
from ssd_cache.models import generator_of

PROMPTS = ["a photo of a red circle", "a photo of three squares", "a photo of a circle left of a triangle"]
SETTINGS = {"budget": 30, "buffer": 4, "num_recent": 4}
needs_torchvision = pytest.mark.skipif(
    not is_torchvision_available(), reason="the pipeline needs torchvision (`make test-newest` installs it)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipe(folder):
    with janus_pipeline(folder) as made:
        yield made


def generate(pipe, prompts):
    torch.manual_seed(0)
    return pipe(prompts, generation_mode="image")


@pytest.mark.parametrize(
    ("prompts", "num_calls"),
    [(PROMPTS[0], 1), (PROMPTS[:1], 1), (PROMPTS, 1), ([{"text": prompt} for prompt in PROMPTS], 3)],
    ids=["one", "list of one", "list in one batch", "one call each"],
)
def test_every_call_of_a_pipeline_gets_a_cache_of_its_own(pipe, prompts, num_calls, made):
    with enable(pipe.model, head_map(), **SETTINGS):
        results = generate(pipe, prompts)
        again = generate(pipe, prompts)
    number = len(prompts) if isinstance(prompts, list) else 1
    assert len(results) == number
    used = [cache for cache in made if cache.get_seq_length()]  # the first was made to check the settings
    assert len(used) == 2 * num_calls
    assert all(store.plan.num_slots == 30 for cache in used for layer in cache.layers for store in layer.stores)
    for result, repeated in zip(results, again, strict=True):
        first, second = (entry[0] if isinstance(entry, list) else entry for entry in (result, repeated))
        assert first["generated_image"].size == (128, 128)
        assert first["generated_image"].tobytes() == second["generated_image"].tobytes()
    assert "generate" not in vars(pipe.model)


def test_a_full_budget_changes_no_pixel(pipe):
    plain = generate(pipe, PROMPTS[0])[0]["generated_image"]
    with enable(pipe.model, head_map(), budget=1.0):
        assert generate(pipe, PROMPTS[0])[0]["generated_image"].tobytes() == plain.tobytes()
    with enable(pipe.model, head_map(), budget=10, buffer=2):
        assert generate(pipe, PROMPTS[0])[0]["generated_image"].tobytes() != plain.tobytes()


def tokens_of(pipe, prompts, num_tokens, **arguments):
    """Visual tokens `[prompts, num_tokens]` of a pipeline's call that returns token ids."""
    torch.manual_seed(0)
    results = pipe(prompts, return_tensors=True, **arguments)
    return torch.stack([result["generated_token_ids"][-num_tokens:] for result in results])


@needs_torchvision
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "several"])
def test_januss_own_pipeline_returns_tokens_of_images(folder, prompts, made):
    pipe = pipeline("any-to-any", model=str(folder))
    given = prompts if len(prompts) > 1 else prompts[0]
    arguments = {"num_tokens": 64, "generate_kwargs": {"generation_mode": "image"}}
    plain = tokens_of(pipe, given, **arguments)
    with enable(pipe.model, head_map(), budget=1.0):
        assert torch.equal(tokens_of(pipe, given, **arguments), plain)
    with enable(pipe.model, head_map(), **SETTINGS):
        tokens = tokens_of(pipe, given, **arguments)
    assert tokens.shape == plain.shape == (len(prompts), 64)
    assert not torch.equal(tokens, plain)
    assert {store.plan.num_slots for layer in made[-1].layers for store in layer.stores} == {30}
    images = generator_of(pipe.model, pipe.processor).to_images(tokens)
    assert [image.size for image in images] == [(128, 128)] * len(prompts)


@needs_torchvision
def test_januss_own_pipeline_cannot_return_images(folder):
    """An error of transformers, without ssd-cache. When it is mended, change docs/models.md and `janus_pipeline`."""
    with pytest.raises(ValueError, match=r"PIL\.Image\.Image is not a valid TensorType"):
        pipeline("any-to-any", model=str(folder))(PROMPTS[0], generation_mode="image")


@needs_torchvision
@pytest.mark.parametrize("num_prompts", [1, 2], ids=["one", "several"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_emu3s_own_pipeline_returns_tokens_of_images(tmp_path, num_prompts, guidance, made):
    pipe = pipeline("any-to-any", model=str(write_family("emu3", tmp_path / "emu3")))
    prompts = ["a photo of a red circle", "a square"][:num_prompts]
    generator = generator_of(pipe.model, pipe.processor, grid=(4, 5))  # 4 x 4 visual tokens, and a column of line ends
    size = {"return_for_image_generation": True, "ratio": "4:4", "image_area": 16 * 8 * 8}
    grammar = generator.grammar(generator.prepare(prompts)["input_ids"].shape[1])
    call = {"prefix_allowed_tokens_fn": grammar, "max_new_tokens": 20, "do_sample": False}
    if guidance > 1:
        call |= {
            "guidance_scale": guidance,
            "negative_prompt_ids": generator.prepare(["lowres"] * num_prompts)["input_ids"],
        }
    arguments = {"num_tokens": 20, "generate_kwargs": call, "padding_side": "left", **size}
    given = prompts if num_prompts > 1 else prompts[0]
    plain = tokens_of(pipe, given, **arguments)
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), (4, 5))
    with enable(pipe.model, labels, budget=1.0):
        assert torch.equal(tokens_of(pipe, given, **arguments), plain)
    with enable(pipe.model, labels, budget=12, buffer=2):
        tokens = tokens_of(pipe, given, **arguments)
    assert tokens.shape == (num_prompts, 20)
    assert {store.plan.num_slots for layer in made[-1].layers for store in layer.stores} == {12}
    assert [image.size for image in generator.to_images(tokens)] == [(32, 32)] * num_prompts
