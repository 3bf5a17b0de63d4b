"""Learning in bounded memory, and shared by processes: the same score as with everything kept, in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.children import run_two
from helpers.models import random_score
from helpers.peak_bytes import PeakBytes
from helpers.tiny_checkpoint import SIDE, write_checkpoint, write_family
from typer.testing import CliRunner

from ssd_cache import HeadMap, learn_score
from ssd_cache.cli import app
from ssd_cache.models import find_generator
from ssd_cache.runs.processes import Processes
from ssd_cache.training import memory, teacher_forcing
from ssd_cache.training.learning import check_learning
from ssd_cache.training.learning_state import LearningState
from ssd_cache.training.memory import step_nbytes
from ssd_cache.training.recording import replay_images, training_batches
from ssd_cache.training.teacher_forcing import Recording
from ssd_cache.training.trainer import Trainer, mean_attention

GRID = (SIDE, SIDE)
PROMPTS = ["a red circle", "a blue square and a red circle", "a blue circle"]
IS_SPATIAL = torch.tensor([[False, True], [False, False]])


def recorded(folder, family="janus", dtype="float32", **model):
    """A generator, and a recording of three images with guidance rows and prompts padded on the left."""
    if model:
        folder = write_checkpoint(folder / family, with_head_map=False, **model)
    else:
        folder = write_family(family, folder / family)
    generator = find_generator(str(folder), None if family == "janus" else GRID).load(dtype, "cpu")
    settings = {"seed": 1} if generator.default_guidance is None else {"seed": 1, "guidance_scale": 2.0}
    return generator, replay_images(generator, PROMPTS, generator.generate(PROMPTS, **settings), **settings)


def trainer_of(generator, num_at_once=3, processes=None):
    checkpoint = generator.checkpoint
    labels = HeadMap.uniform(
        "semantic", num_layers=checkpoint.num_layers, num_kv_heads=checkpoint.num_kv_heads, grid=checkpoint.grid
    )
    if checkpoint.num_layers == 2:
        labels = replace(labels, is_spatial=IS_SPATIAL)
    plans = check_learning(labels, 24, buffer=5, num_steps=2, learning_rate=0.02, batch_size=3)
    return Trainer(generator, plans, 2.0, 1.0, 0.02, 2, num_at_once, processes or Processes())


def first_state(generator):
    config = generator.language_model.get_decoder().config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    shape = generator.checkpoint.num_layers, generator.checkpoint.num_kv_heads
    return LearningState.beginning(random_score(*shape, head_dim, generator.checkpoint.grid))


def keep_everything(patch):
    patch.setattr(teacher_forcing, "recomputed", lambda function, *args, **kw: function(*args, **kw))
    patch.setattr(teacher_forcing, "BLOCK_BYTES", 1 << 40)


def compare(found, expected, bound):
    """Losses, and gradients (Adam's first means are a tenth of them), by their norms."""
    assert found[1] == pytest.approx(expected[1], rel=bound)
    for name in ("mean.row", "mean.column", "mean.key", "mean.value"):
        difference = found[0].tensors[name] - expected[0].tensors[name]
        assert difference.norm() <= bound * expected[0].tensors[name].norm()
        assert expected[0].tensors[name].norm() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["janus", "emu3", "llama"])
def test_gradients_are_those_of_a_pass_that_keeps_everything(family, dtype, tmp_path, monkeypatch):
    """Guidance rows, grouped heads, left padding; blocks of a few queries and of a few cells."""
    generator, recording = recorded(tmp_path, family, dtype)
    assert not recording.seen.all()
    state, trainer = first_state(generator), trainer_of(generator)
    with monkeypatch.context() as patch:
        keep_everything(patch)
        expected = trainer.step(state, recording)
    calls, recomputed = [], teacher_forcing.recomputed
    monkeypatch.setattr(teacher_forcing, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(teacher_forcing, "recomputed", lambda *args, **kw: calls.append(1) or recomputed(*args, **kw))
    # sums in another order: float32 has 24 bits, bfloat16 8
    compare(trainer.step(state, recording), expected, 1e-5 if dtype == "float32" else 0.02)
    assert len(calls) > 2 * 2 * 5  # layers, and blocks in each of them
    compare(trainer_of(generator, num_at_once=1).step(state, recording), expected, 1e-5 if dtype == "float32" else 0.05)
    assert not any("forward" in vars(module) for module in generator.model.modules())


def test_the_initial_score_does_not_depend_on_the_images_at_once(tmp_path, monkeypatch):
    generator, recording = recorded(tmp_path)
    labels = HeadMap(IS_SPATIAL, GRID)
    whole = mean_attention(generator, recording, labels, 3)
    monkeypatch.setattr(teacher_forcing, "BLOCK_BYTES", 20_000)
    for name, tensor in mean_attention(generator, recording, labels, 2).tensors().items():
        torch.testing.assert_close(tensor, getattr(whole, name))


def step_peak(generator, recording, num_at_once=3):
    state = first_state(generator)
    before = [*generator.model.parameters(), *generator.model.buffers(), *recording.inputs.values()]
    with PeakBytes([*before, *state.tensors.values()]) as found:
        trainer_of(generator, num_at_once).step(state, recording)
    return found.peak


@pytest.mark.parametrize("block_bytes", [1 << 26, 20_000], ids=["one block", "several blocks"])
def test_a_further_layer_takes_the_bytes_of_its_input(block_bytes, tmp_path, monkeypatch):
    """And a further image nothing, where one is taken at once."""
    monkeypatch.setattr(teacher_forcing, "BLOCK_BYTES", block_bytes)
    peaks, kept = {}, {}
    for layers in (2, 6):
        monkeypatch.setattr("helpers.tiny_checkpoint.LAYERS", layers)
        generator, recording = recorded(tmp_path / str(layers), guidance_scale=2.0)
        peaks[layers] = step_peak(generator, recording)
        with monkeypatch.context() as patch:
            keep_everything(patch)
            kept[layers] = step_peak(generator, recording)
    of_input = recording.inputs["inputs_embeds"].nbytes
    assert of_input <= (peaks[6] - peaks[2]) / 4 <= 1.5 * of_input  # the rest is the layer's part of the score
    assert (kept[6] - kept[2]) / 4 > 10 * of_input
    assert step_peak(generator, recording.split(1)[0], 1) > 0.9 * step_peak(generator, recording, 1)
    assert peaks[6] > 1.5 * step_peak(generator, recording, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_formula_bounds_the_measured_peak(dtype, tmp_path, monkeypatch):
    """Where blocks are as small as the model, the formula is close."""
    generator, recording = recorded(tmp_path, dtype=dtype)
    rows, num_prompt = recording.seen.shape
    for bound in (1 << 26, 1 << 18):
        for module in (teacher_forcing, memory):
            monkeypatch.setattr(module, "BLOCK_BYTES", bound)
        peak = step_peak(generator, recording)
        found = step_nbytes(generator.checkpoint, generator.model.dtype, rows, num_prompt, 5)
        assert peak <= found
    assert found <= 2 * peak


def test_batches_are_copied_one_at_a_time_in_the_order_of_the_seed():
    recordings = []
    for images in (7, 7, 3):  # two batches of four and three images, and a smaller one
        rows = torch.arange(2 * images)
        inputs = {"inputs_embeds": torch.randn(len(rows), 50, 8)}
        recordings.append(Recording(inputs, rows[:, None] > 2, rows >= images))
    parts = [part for recording in recordings for part in recording.split(4)]
    assert [len(part.seen) for part in parts] == [8, 6, 8, 6, 6]
    order = torch.Generator().manual_seed(9)
    expected = [parts[index] for _ in range(3) for index in torch.randperm(5, generator=order).tolist()]
    with PeakBytes([]) as copied:
        for found, part in zip(training_batches(recordings, 4, 9), expected, strict=False):
            for name in ("seen", "is_unconditional"):
                assert torch.equal(getattr(found, name), getattr(part, name))
            assert torch.equal(found.inputs["inputs_embeds"], part.inputs["inputs_embeds"])
    largest = parts[0].inputs["inputs_embeds"].nbytes
    assert largest < copied.peak < 2.1 * largest  # the loop holds a batch while the next one is made


def test_images_are_taken_one_by_one_where_memory_is_short(tmp_path, monkeypatch):
    generator, _ = recorded(tmp_path)
    labels, settings = HeadMap(IS_SPATIAL, GRID), {"budget": 24, "buffer": 5, "num_steps": 2, "progress": False}
    sizes, parts_of = [], teacher_forcing.Recording.parts
    with monkeypatch.context() as patch:
        patch.setattr(teacher_forcing.Recording, "parts", lambda part, size: sizes.append(size) or parts_of(part, size))
        whole = learn_score(generator, PROMPTS, labels, batch_size=3, guidance_scale=2.0, **settings)
        assert set(sizes) == {3}
        sizes.clear()
        patch.setattr(memory, "MEMORY", 1)
        parts = learn_score(generator, PROMPTS, labels, batch_size=3, guidance_scale=2.0, **settings)
        assert set(sizes) == {3, 1}  # the batches, and the images of each
    for name, tensor in whole.learned.tensors().items():
        torch.testing.assert_close(getattr(parts.learned, name), tensor, rtol=1e-4, atol=1e-5)


def test_draft_grids_are_refused_with_the_reason():
    labels = HeadMap(torch.zeros(2, 2, dtype=torch.bool), (8, 4), previews=[(4, 2)])
    with pytest.raises(ValueError, match="has draft grids, and a score is learned for .* a single grid"):
        check_learning(labels, num_steps=1, learning_rate=0.02, batch_size=1)


def test_two_processes_learn_the_score_of_one(tmp_path):
    found, expected = learn_in_two_processes_and_in_one(tmp_path, "--steps", "4")
    for name, tensor in expected.learned.tensors().items():
        # gradients are added in another order; Adam's first steps have the size of the learning rate in any case
        torch.testing.assert_close(getattr(found.learned, name), tensor, rtol=1e-4, atol=1e-5)
    held_out = [head_map.profile["learning"]["held_out"]["after"] for head_map in (found, expected)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_two_processes_move_the_slots_of_one(tmp_path):
    found, expected = learn_in_two_processes_and_in_one(tmp_path, "--steps", "28", "--slots")
    assert found.budget == expected.budget
    assert found.budget != [[25, 25], [25, 20]]  # the slots at the beginning


def learn_in_two_processes_and_in_one(folder, *options):
    """The two maps that `ssd-cache learn` writes."""
    pytest.importorskip("accelerate")
    model = write_checkpoint(folder / "model", guidance_scale=2.0)
    labels = HeadMap(IS_SPATIAL, GRID).save_pretrained(folder / "labels")
    arguments = ["--model", str(model), "--head-map", str(labels), "--budget", "24", "--buffer", "5"]
    arguments += ["--batch-size", "3", "--device", "cpu", *options]
    both = run_two(["learn", *PROMPTS, *arguments, "-o", "both"], cwd=folder)
    assert [code for code, _, _ in both] == [0, 0], both
    assert both[0][1].endswith("wrote both\n")
    assert both[1][1] == ""  # the main process alone prints and writes
    alone = CliRunner().invoke(app, ["learn", *PROMPTS, *arguments, "-o", str(folder / "alone")])
    assert alone.exit_code == 0, alone.output
    return [HeadMap.from_pretrained(folder / name) for name in ("both", "alone")]
