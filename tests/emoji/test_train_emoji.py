"""examples/train_emoji_janus.py in small: stopped runs go on as if unbroken, and the checkpoint is real.

How well it trains is not tested here.
"""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch
import typer
from helpers.children import SERVER
from helpers.tiny_checkpoint import load_example
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_cache.emoji.captions import HELD_OUT, PROMPT_LENGTH, make_caption
from ssd_cache.emoji.icons import GRID, load_icons, make_image, to_pixels
from ssd_cache.emoji.judge import read_image

example = load_example("train_emoji_janus")
SIZE = {"hidden_size": 32, "num_layers": 1}
TOKENS = {"steps": 4, "low_steps": 2, "decay_steps": 2, "batch_size": 2, "dtype": "float32", **SIZE}
PIXELS = {"steps": 3, "decay_steps": 2, "batch_size": 1, "dtype": "float32"}


@pytest.fixture(scope="module")
def icons_file(tmp_path_factory):
    """The icons as their codebook decodes them, enlarged to 144 x 144: no package is needed."""
    icons = load_icons()
    table = np.concatenate([np.zeros((1, 4, 4, 4), np.float32), icons.codes])
    cells = table[np.where(icons.grids[:, :, 0] < 0, 0, icons.grids[:, :, 0] - 7)]
    rgba = cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(80, 2, 72, 72, 4).repeat(2, 2).repeat(2, 3)
    path = tmp_path_factory.mktemp("icons") / "icons_144.npy"
    np.save(path, (rgba * 255).round().astype(np.uint8))
    return path


def stop_at(monkeypatch, name, number):
    """Interrupt the run when its batch `number` is made."""
    make, seen = getattr(example, name), []

    def stop(*args):
        if len(seen) == number:
            raise KeyboardInterrupt
        seen.append(args)
        return make(*args)

    monkeypatch.setattr(example, name, stop)


def state_of(path):
    return torch.load(path, weights_only=True)


def assert_same(ours, theirs):
    assert ours["step"] == theirs["step"]
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(weight, theirs["model"][name]) for name, weight in ours["model"].items())


@pytest.mark.parametrize("stopped_at", [1, 3])
def test_a_stopped_run_of_tokens_goes_on_to_the_same_weights(tmp_path, monkeypatch, stopped_at):
    example.tokens(tmp_path / "unbroken", **TOKENS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "make_batch", stopped_at)
        example.tokens(tmp_path / "stopped", save_seconds=0, **TOKENS)
    assert state_of(tmp_path / "stopped" / "training.pt")["step"] == stopped_at
    example.tokens(tmp_path / "stopped", **TOKENS)
    assert_same(*(state_of(tmp_path / name / "training.pt") for name in ("stopped", "unbroken")))


def test_a_stopped_run_of_pixels_goes_on_to_the_same_weights(tmp_path, monkeypatch, icons_file):
    example.pixels(icons_file, tmp_path / "unbroken", **PIXELS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, "make_images", 2)
        example.pixels(icons_file, tmp_path / "stopped", save_seconds=0, **PIXELS)
    assert state_of(tmp_path / "stopped" / "pixels.pt")["step"] == 2
    example.pixels(icons_file, tmp_path / "stopped", **PIXELS)
    assert_same(*(state_of(tmp_path / name / "pixels.pt") for name in ("stopped", "unbroken")))


def die_in_a_save(folder, num_threads):
    save, saved = torch.save, []

    def save_half(state, file):
        save(state, file)
        saved.append(file)
        if len(saved) == 2:
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(num_threads)
    torch.save = save_half
    example.tokens(folder, save_seconds=0, **TOKENS)


def test_a_run_killed_in_the_middle_of_a_save_goes_on_to_the_same_weights(tmp_path):
    example.tokens(tmp_path / "unbroken", **TOKENS)
    process = SERVER.Process(target=die_in_a_save, args=(tmp_path / "killed", torch.get_num_threads()))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert state_of(tmp_path / "killed" / "training.pt")["step"] == 1
    example.tokens(tmp_path / "killed", **TOKENS)
    assert_same(*(state_of(tmp_path / name / "training.pt") for name in ("killed", "unbroken")))


def test_icons_of_another_size_are_refused(tmp_path):
    np.save(tmp_path / "icons.npy", np.zeros((80, 2, 72, 72, 4), np.uint8))
    with pytest.raises(typer.BadParameter, match="as prepare_emoji_data.py writes"):
        example.pixels(tmp_path / "icons.npy", tmp_path, **PIXELS)


def test_the_checkpoint_loads_generates_and_decodes_with_transformers_alone(tmp_path, icons_file):
    example.tokens(tmp_path, **TOKENS)
    example.pixels(icons_file, tmp_path, **PIXELS)
    example.export(tmp_path, **SIZE)
    folder = tmp_path / "checkpoint"
    model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = JanusProcessor.from_pretrained(folder)
    inputs = processor(
        text=["a cat, noto style, on a blue background"], generation_mode="image", max_length=None, return_tensors="pt"
    )
    generated = model.generate(**inputs, generation_mode="image")
    assert generated.shape == (1, GRID[0] * GRID[1])
    assert 0 <= int(generated.min()) <= int(generated.max()) < load_icons().num_tokens
    decoded = model.decode_image_tokens(generated)
    assert decoded.shape == (1, 96, 96, 3)
    trained = state_of(tmp_path / "pixels.pt")["model"]["decoder.conv_out.weight"]
    torch.testing.assert_close(model.model.vqmodel.decoder.conv_out.weight, trained, rtol=1e-3, atol=1e-4)  # float16


def test_training_sees_prompts_as_generation_gives_them():
    processor = example.build_processor()
    tokenizer = processor.tokenizer
    prompts, seen, images = example.make_batch(processor, 300, 24, "prompts")
    rng = random.Random("prompts")
    combinations = [rng.choice(example.TRAINED) for _ in range(300)]
    captions = [make_caption(rng, combination)[1] for combination in combinations]
    inputs = processor(
        text=captions, generation_mode="image", padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt"
    )
    assert prompts.shape == (300, PROMPT_LENGTH)
    assert tokenizer.unk_token_id not in inputs.input_ids
    np.testing.assert_array_equal(inputs.attention_mask.bool(), seen)
    blank = inputs.input_ids.clone()
    blank[(blank != tokenizer.bos_token_id) & (blank != tokenizer.boi_token_id)] = tokenizer.pad_token_id
    is_blank = (prompts != inputs.input_ids).any(1)
    np.testing.assert_array_equal(prompts, torch.where(is_blank[:, None], blank, inputs.input_ids))
    assert 3 <= int(is_blank.sum()) <= 40  # a twentieth of 300, and chance
    for combination, image in list(zip(combinations, images.numpy(), strict=True))[:20]:
        assert read_image(image)[:3] == combination
        assert combination not in HELD_OUT


def test_low_images_hold_the_whole_icon():
    rng = random.Random(0)
    combination = ("cat", "noto", "blue")
    low = [make_image(rng, combination, example.LOW_ROWS) for _ in range(50)]
    assert {image.shape for image in low} == {(20, 24)}
    assert len({int((image >= 8).sum()) for image in low}) <= 2  # the icon and its mirror image


def test_images_for_the_vq_decoder_are_those_of_their_tokens(icons_file):
    codes, images = example.make_images(random.Random(0), example.read_rendered(icons_file), 6)
    assert images.shape == (6, 3, 96, 96)
    errors, shifted = [], []
    for tokens, image in zip(codes.numpy().reshape(-1, *GRID), images.numpy(), strict=True):
        small = ((image + 1) / 2).transpose(1, 2, 0)
        errors.append(np.abs(small - to_pixels(tokens)).mean())
        shifted.append(np.abs(np.roll(small, 4, 1) - to_pixels(tokens)).mean())
    assert min(errors) < 1e-3  # these icons are their own codes; a mirror image has others, which are near
    assert (np.array(errors) < 0.5 * np.array(shifted)).all()


def test_the_rate_rises_stays_and_falls_to_zero():
    factors = [example.lr_factor(step, 1000, 200) for step in range(1000)]
    assert factors[0] == 0.01
    assert factors[99] == factors[800] == 1
    assert factors[900] == 0.5
    assert 0 < factors[-1] <= 0.005
    assert example.lr_factor(999, 1000, 0) == 1
