"""examples/train_shapes_janus.py in small: a stopped run goes on as if unbroken, and the checkpoint is real.

How well it trains is not tested here; the committed weights are measured.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_checkpoint import load_example
from PIL import Image
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_cache.shapes.judge import judge
from ssd_cache.shapes.scenes import GRID, KINDS, PALETTE, make_scene

example = load_example()
training = load_example("janus_training")
SMALL = {
    "draw_steps": 2,
    "bind_steps": 3,
    "middle_steps": 2,
    "full_steps": 2,
    "count_steps": 1,
    "count_rounds": 2,
    "batch_size": 2,
    "dtype": "float32",
    "compiled": False,
    "hidden_size": 64,
    "num_layers": 2,
    "save_every": 2,
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "deep" / "checkpoint"
    example.main(folder, **SMALL)
    return folder


@pytest.mark.parametrize("stopped_at", [1, 3, 5, 9])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(unbroken, tmp_path, monkeypatch, stopped_at):
    make_batch, steps = example.make_batch, []

    def stop(*args):
        if len(steps) == stopped_at:
            raise KeyboardInterrupt
        steps.append(args[-1])
        return make_batch(*args)

    monkeypatch.setattr(example, "make_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        example.main(tmp_path, **SMALL)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "training.pt").exists() == (stopped_at >= 2)
    monkeypatch.setattr(example, "make_batch", make_batch)
    torch.manual_seed(123)  # a new process has other chance before it
    example.main(tmp_path, **SMALL)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(unbroken / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert torch.load(tmp_path / "training.pt", weights_only=True)["step"] == 11
    assert not list(tmp_path.glob("*.part"))


def test_another_seed_trains_other_weights(unbroken, tmp_path):
    example.main(tmp_path, **SMALL, seed=1)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(
        load_file(tmp_path / "model.safetensors")[name], load_file(unbroken / "model.safetensors")[name]
    )


def test_a_start_gives_the_weights_that_training_goes_on_from(unbroken, tmp_path):
    example.main(tmp_path, start=unbroken, lr=0.0, **SMALL)
    before, after = load_file(unbroken / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failed_save_leaves_the_older_state(tmp_path):
    state = tmp_path / "training.pt"
    training.write(state, lambda path: path.write_bytes(b"old"))

    def break_off(path):
        path.write_bytes(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.write(state, break_off)
    assert state.read_bytes() == b"old"


def test_the_checkpoint_loads_and_generates_with_transformers_alone(unbroken):
    model = JanusForConditionalGeneration.from_pretrained(unbroken, dtype=torch.float32).eval()
    processor = JanusProcessor.from_pretrained(unbroken)
    inputs = processor(
        text=["a photo of a red circle", "a photo of two squares"],
        generation_mode="image",
        padding=True,
        max_length=None,
        return_tensors="pt",
    )
    assert model.generation_config.do_sample
    tokens = model.generate(**inputs, generation_mode="image", guidance_scale=5.0)
    assert tokens.shape == (2, GRID[0] * GRID[1])
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < len(PALETTE)
    pixels = model.decode_image_tokens(tokens)
    assert pixels.shape == (2, 384, 384, 3)


def test_every_token_comes_out_of_the_decoder_in_its_exact_colour(unbroken):
    model = JanusForConditionalGeneration.from_pretrained(unbroken, dtype=torch.float32).eval()
    processor = JanusProcessor.from_pretrained(unbroken)
    rng = random.Random(0)
    noise = [torch.tensor(rng.choices(range(len(PALETTE)), k=576)), torch.arange(576) % len(PALETTE)]
    scenes = [make_scene(rng, kind) for kind in KINDS]
    tokens = torch.stack(noise + [torch.from_numpy(scene.tokens) for scene in scenes])
    with torch.no_grad():
        pixels = model.decode_image_tokens(tokens).permute(0, 3, 1, 2)
    decoded = processor.postprocess(list(pixels))["pixel_values"]
    images = [Image.fromarray(np.asarray(image).transpose(1, 2, 0)) for image in decoded]
    for codes, image in zip(tokens.numpy(), images, strict=True):
        cells = np.array(PALETTE, dtype=np.uint8)[codes.reshape(24, 24)]
        np.testing.assert_array_equal(np.asarray(image), cells.repeat(16, 0).repeat(16, 1))
    for scene, image in zip(scenes, images[2:], strict=True):
        assert judge(image, scene.caption).correct


def test_training_sees_prompts_as_generation_gives_them():
    processor = example.build_processor()
    tokenizer, rng = processor.tokenizer, random.Random("prompts")
    captions = [make_scene(rng, rows=24).caption for _ in range(200)]
    prompts, seen, images, kinds = example.make_batch(processor, 200, 24, "prompts", example.EVEN)
    inputs = processor(
        text=captions,
        generation_mode="image",
        padding="max_length",
        max_length=example.PROMPT_LENGTH,
        return_tensors="pt",
    )
    assert images.shape == (200, 576)
    assert tokenizer.unk_token_id not in inputs.input_ids
    np.testing.assert_array_equal(inputs.attention_mask.bool(), seen)
    blank = inputs.input_ids.clone()  # as Janus's own generate blanks the unconditional rows
    blank[(blank != tokenizer.bos_token_id) & (blank != tokenizer.boi_token_id)] = tokenizer.pad_token_id
    is_blank = (prompts != inputs.input_ids).any(1)
    np.testing.assert_array_equal(prompts, torch.where(is_blank[:, None], blank, inputs.input_ids))
    assert [kind == "unconditional" for kind in kinds] == is_blank.tolist()
    assert 5 <= int(is_blank.sum()) <= 40  # a tenth of 200, and chance


@pytest.mark.parametrize("length", [1, 2, 3, 7, 24])
def test_blockwise_attention_is_attention(length):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, length, 8, dtype=torch.float64)
    seen = torch.ones(2, length, dtype=torch.bool)
    seen[1, : length // 3] = False
    allowed = seen[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e30)
    expected = F.scaled_dot_product_attention(query, key, value, allowed, scale=0.3).transpose(1, 2)
    output, _ = training.blockwise_attention(None, query, key, value, mask, scaling=0.3)
    mine, theirs = output[seen], expected[seen]  # what a padded column attends to is never read
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48)])
def test_muon_is_torchs_own_in_another_precision(shape):
    ours, exact, theirs = (torch.nn.Parameter(torch.full(shape, 0.1)) for _ in range(3))
    optimizers = [
        training.Muon([ours], lr=0.1, weight_decay=0.01, dtype=torch.bfloat16),
        training.Muon([exact], lr=0.1, weight_decay=0.01, dtype=torch.float32),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        gradient = torch.randn(shape)
        for weight, optimizer in zip((ours, exact, theirs), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(exact, theirs, rtol=0, atol=0.05)
    assert (exact.detach() - 0.1).abs().max() > 0.1
