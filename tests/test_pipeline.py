"""`enable` inside transformers' own any-to-any pipeline: one prompt, and a list of prompts."""

from __future__ import annotations

import pytest
import torch
from helpers.janus_pipeline import janus_pipeline
from helpers.tiny_checkpoint import head_map, write_checkpoint

from ssd_cache import enable

PROMPTS = ["a photo of a red circle", "a photo of three squares", "a photo of a circle left of a triangle"]
SETTINGS = {"budget": 30, "buffer": 4, "num_recent": 4}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    with janus_pipeline(write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", guidance_scale=3.0)) as made:
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
