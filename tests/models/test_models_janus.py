"""Janus set to "ssd" still answers about images, with every cache, and `enable` leaves such calls alone.

A small random Janus with its real processor, saved to a folder and loaded back; generating is for test_models.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny_checkpoint import SIDE, head_map, write_checkpoint
from PIL import Image
from transformers import DynamicCache, JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.utils import is_torchvision_available

from ssd_cache import SSDCache, enable
from ssd_cache.models import find_generator

QUESTIONS = ["a photo of a red circle", "a square"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A model, and inputs that ask it about two images, left-padded."""
    folder = write_checkpoint(tmp_path_factory.mktemp("janus"))
    processor = JanusProcessor.from_pretrained(folder)
    processor.image_processor.size = {"height": 16 * SIDE, "width": 16 * SIDE}
    processor.num_image_tokens = SIDE * SIDE
    inputs = processor(
        images=[Image.new("RGB", (100, 80), color) for color in ("red", "blue")],
        text=[processor.image_token + question for question in QUESTIONS],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert (inputs["attention_mask"] == 0).any()
    model = JanusForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.max_length = None
    return model, inputs


def answer(asked, **settings):
    model, inputs = asked
    return model.generate(**inputs, max_new_tokens=40, min_new_tokens=40, do_sample=False, **settings)


@pytest.fixture(scope="module")
def expected(asked):
    model, inputs = asked
    text = answer(asked)
    black = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    other = model.generate(**black, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert not torch.equal(text, other)  # it does look at the images
    return text


@pytest.mark.parametrize("make", [lambda: None, DynamicCache, lambda: SSDCache(head_map(), 1.0)])
def test_a_model_that_stays_ssd_answers_as_before(asked, expected, make):
    model, _ = asked
    model.set_attn_implementation({"text_config": "ssd"})
    try:
        assert torch.equal(answer(asked, past_key_values=make()), expected)
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


def test_enable_leaves_text_to_the_models_own_cache(asked, expected, made):
    model, _ = asked
    with enable(model, head_map(), budget=12, buffer=2):
        assert torch.equal(answer(asked), expected)
        assert torch.equal(answer(asked, generation_mode="text"), expected)
    assert len(made) == 1  # to check the settings


def test_a_small_cache_given_by_hand_to_a_call_for_text_is_used(asked, expected):
    model, _ = asked
    model.set_attn_implementation({"text_config": "ssd"})
    try:
        cache = SSDCache(head_map(), 12, buffer=2)
        assert answer(asked, past_key_values=cache).shape == expected.shape
        assert {store.plan.num_slots for layer in cache.layers for store in layer.stores} == {12}
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
def test_images_are_decoded_with_torchvision_as_without(tmp_path):
    generator = find_generator(str(write_checkpoint(tmp_path / "janus"))).load()
    tokens = torch.arange(2 * SIDE * SIDE).view(2, -1) % 16
    with_torchvision = generator.to_images(tokens)
    assert type(generator.processor.image_processor) is not JanusImageProcessorPil
    generator.processor.image_processor = JanusImageProcessorPil()
    plain = generator.to_images(tokens)
    assert [image.size for image in plain] == [(16 * SIDE, 16 * SIDE)] * 2
    # pixels are cut to 8 bits after float32 sums in another order, so some differ by the last bit
    difference = np.abs(np.stack(plain).astype(int) - np.stack(with_torchvision).astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01
