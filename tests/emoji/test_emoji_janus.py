"""emoji-janus as a model of the package: found by its name, checked, prompted in its own words, and evaluated.

Most tests put the checkpoint that the example exports from small random weights in the place of the trained one. How
well the trained one generates is measured, not tested.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_checkpoint import load_example, write_emoji_janus
from PIL import Image
from transformers import JanusForConditionalGeneration
from typer.testing import CliRunner

from ssd_cache.cli import app
from ssd_cache.emoji.captions import BACKGROUNDS, HELD_OUT, KINDS, STYLES, TEMPLATES, parse_caption
from ssd_cache.emoji.icons import make_image
from ssd_cache.evaluation.exact import EMOJI, SHAPES
from ssd_cache.evaluation.results_folder import read_records
from ssd_cache.models import BUNDLED_MODELS, GeneratorError, find_generator, find_head_map
from ssd_cache.models.bundled import CHECKSUMS, check_checksums
from ssd_cache.preparing.stages import NUM_CHECKED, NUM_PROFILED
from ssd_cache.prompts import default_prompts

NAME = EMOJI.model
CAPTION = "a cat, noto style, on a blue background"
TRAINED = BUNDLED_MODELS[NAME].folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The checkpoint that the example exports, in the place of the trained one."""
    folder = write_emoji_janus(tmp_path_factory.mktemp("emoji-janus"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUNDLED_MODELS, NAME, replace(BUNDLED_MODELS[NAME], folder=folder))
        yield folder


@pytest.fixture(scope="module")
def generator(exported):
    return find_generator(NAME).load("float32", "cpu")


@pytest.fixture
def run(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def unloaded(monkeypatch):
    """Fails where weights are loaded."""
    monkeypatch.setattr(JanusForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))


def combination_of(caption):
    """What a caption names; a style or a background that it leaves open is the first one."""
    named = parse_caption(caption)
    return named.subject, named.style or STYLES[0], named.background or next(iter(BACKGROUNDS))


def test_an_exported_folder_is_the_model_of_its_name(exported):
    checkpoint = find_generator(NAME)
    assert checkpoint.source == str(exported)
    assert checkpoint.head_map().digest == find_head_map(NAME).digest
    EMOJI.check_model(checkpoint)
    with pytest.raises(GeneratorError, match="out of 1024; the judge of shapes reads 24 x 24 out of 21: give shapes-j"):
        SHAPES.check_model(checkpoint)
    with pytest.raises(GeneratorError, match="out of 21; the judge of emoji reads 24 x 24 out of 1024: give emoji-j"):
        EMOJI.check_model(find_generator(SHAPES.model))


def test_the_benchmark_is_of_one_piece():
    """Its captions alternate the kinds, and its judge accepts an image that shows what a caption names."""
    prompts, rng = EMOJI.prompts(2, 1), random.Random(0)
    assert [kind for kind, _ in prompts] == 2 * list(KINDS)
    for kind, caption in prompts:
        combination = combination_of(caption)
        assert kind != "unseen" or combination in HELD_OUT
        assert EMOJI.judge(make_image(rng, combination).reshape(-1), caption).correct
    assert not EMOJI.judge(np.zeros(576, dtype=np.int64), prompts[0][1]).correct


def test_decoded_images_have_the_colours_of_the_vq_decoder(generator):
    tokens = torch.from_numpy(make_image(random.Random(0), combination_of(CAPTION)).reshape(1, -1))
    [image] = generator.to_images(tokens)
    with torch.no_grad():
        decoded = generator.model.decode_image_tokens(tokens)[0].numpy()  # trained on images from -1 to 1
    assert image.size == (96, 96)
    np.testing.assert_allclose(np.asarray(image), ((decoded + 1) / 2 * 255).clip(0, 255), atol=1)  # rounded down


def test_its_own_prompts_are_captions_of_which_only_the_last_are_held_out(generator):
    prompts = default_prompts(generator.checkpoint)
    assert len(prompts) == 600
    is_held_out = [combination_of(caption) in HELD_OUT for caption in prompts]
    named = [parse_caption(caption) for caption in prompts]
    is_full = [each.style is not None and each.background is not None for each in named]
    held_out = [number for number in range(600) if is_full[number] and is_held_out[number]]
    assert held_out == list(range(600 - NUM_CHECKED, 600))
    kinds = Counter((each.style is not None, each.background is not None) for each in named[:NUM_PROFILED])
    assert set(kinds.values()) == {NUM_PROFILED // len(TEMPLATES)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none of unknown words
        generator.prepare(prompts)


def test_a_caption_outside_the_vocabulary_is_refused_before_weights_are_loaded(run, unloaded):
    Path("prompts.txt").write_text(f"{CAPTION}\n" * 24 + "".join(f"a dog number {n}\n" for n in range(24)))
    for arguments, message in (
        (("generate", "--model", NAME, CAPTION, "a catt on a blue background"), "'catt' is unknown (near: cat"),
        (("generate", "--model", NAME, "a cat on a cat"), "captions are like 'a cat'"),
        (("prepare", NAME, "--prompts-file", "prompts.txt"), "'number' is unknown"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["prompts.txt"]


def test_a_caption_outside_the_vocabulary_is_refused_by_the_library(generator, monkeypatch):
    monkeypatch.setattr(generator.model, "generate", lambda **_: pytest.fail("generated"))
    with pytest.raises(GeneratorError, match="emoji-janus: .* do not include 'a zebra': 'zebra' is unknown"):
        generator.generate([CAPTION, "a zebra"])


def test_an_image_is_generated_from_the_command_line(run):
    result = run("generate", "--model", NAME, CAPTION, "-o", "cat.png")
    assert result.exit_code == 0, result.output
    with Image.open("cat.png") as image:
        assert image.size == (96, 96)
    assert "emoji-janus on cpu" in result.stdout


def arguments_of(output, **options):
    options = {"policies": "h2o", "budgets": "0.2", "num-per-kind": 1, "output": output} | options
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def test_policies_are_evaluated_resumed_and_reported(run, monkeypatch):
    result = run("eval", "emoji", *arguments_of("results"))
    assert result.exit_code == 0, result.output
    records, problems = read_records([Path("results")], EMOJI)
    assert problems == []
    assert [(record.kind, record.caption) for record in records] == EMOJI.prompts(1, 1)
    assert not any(record.correct for record in records)  # random weights
    assert all(record.reason.startswith(("no ", "expected ")) for record in records)
    described = json.loads(Path("results/run.json").read_text())
    assert described["format"] == "ssd-cache eval emoji 1"
    page = Path("results/results.md").read_text()
    assert page.startswith("# Emoji: share of correct images")
    assert "| policy | budget | subject | style | background | all | unseen | overall |" in page
    assert "ssd-cache eval emoji --policies h2o --budgets 0.2 --model emoji-janus" in page

    monkeypatch.setattr(JanusForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    again = run("eval", "emoji", *arguments_of("results"))
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    other = run("eval", "shapes", *arguments_of("results"))
    assert other.exit_code == 2
    assert "results of other conditions (bench 'emoji' there, 'shapes' now" in other.stderr
    lines = Path("results/results-0.jsonl").read_text()
    Path("results/results-0.jsonl").write_text(lines.replace('"kind": "subject"', '"kind": "colors"'))
    report = run("eval", "report", "results")
    assert report.exit_code == 1
    assert "line 1: kind='colors'; the kinds are subject, style, background, all, unseen" in report.stderr


def test_a_model_of_other_images_is_refused(run, unloaded):
    result = run("eval", "emoji", *arguments_of("results", model="shapes-janus"))
    assert result.exit_code == 2
    assert "give emoji-janus, or a model trained on the same images" in result.stderr
    assert not Path("results").exists()


@pytest.mark.parametrize("name", [SHAPES.model, NAME])
def test_weights_without_their_checksum_are_refused(run, name, monkeypatch, unloaded):
    shutil.copytree(BUNDLED_MODELS[name].folder, "copy")
    folder = Path("copy")
    monkeypatch.setitem(BUNDLED_MODELS, name, replace(BUNDLED_MODELS[name], folder=folder))
    check_checksums(name, folder)
    weights, sums = folder / "model.safetensors", folder / CHECKSUMS
    content, lines = weights.read_bytes(), sums.read_text()
    for damage, message in (
        (lambda: weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1])), "has the SHA-256 checksum"),
        (lambda: weights.write_bytes(content[:4096]), "has the SHA-256 checksum"),
        (weights.unlink, "No such file"),
        (sums.unlink, "No such file"),
        (lambda: sums.write_text("?\n"), "lists no checksum of model.safetensors"),
        (lambda: sums.write_text(""), "lists no checksum of model.safetensors"),
        (lambda: sums.write_text(lines.replace("model", "mode1")), "lists no checksum of model.safetensors"),
        (lambda: sums.write_text(f"{lines}{'0' * 64}  ../copy/config.json\n"), "No such file of weights: '../copy"),
    ):
        damage()
        with pytest.raises(GeneratorError, match=f"weights of {name} in copy are damaged or incomplete: .*{message}"):
            find_generator(name).load()
        weights.write_bytes(content)
        sums.write_text(lines)
    weights.write_bytes(content[:-1])
    result = run("generate", "--model", name, CAPTION)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert f"the weights of {name} in copy are damaged or incomplete" in result.stderr
    assert not Path("picture.png").exists()


def test_a_bundled_model_whose_folder_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(BUNDLED_MODELS, NAME, replace(BUNDLED_MODELS[NAME], folder=tmp_path / "gone"))
    with pytest.raises(GeneratorError, match="model 'emoji-janus' comes with ssd-cache, but .*gone is missing"):
        find_generator(NAME)


@pytest.fixture
def trained(monkeypatch):
    """The checkpoint in the package, also while another one is in its place."""
    monkeypatch.setitem(BUNDLED_MODELS, NAME, replace(BUNDLED_MODELS[NAME], folder=TRAINED))
    return find_generator(NAME)


def test_the_trained_checkpoint_is_complete(trained):
    check_checksums(NAME, TRAINED)
    assert trained.source == str(TRAINED)
    EMOJI.check_model(trained)
    assert default_prompts(trained) == load_example("train_emoji_janus").own_prompts()
    assert trained.head_map().learned is not None
    assert sum(path.stat().st_size for path in TRAINED.rglob("*") if path.is_file()) < 15_000_000


def test_the_trained_model_generates_what_captions_ask_for(trained):
    captions = [caption for _, caption in EMOJI.prompts(2, seed=5)]
    tokens = trained.load("float32", "cpu").generate(captions, seed=0)
    verdicts = [EMOJI.judge(image, caption) for image, caption in zip(tokens.numpy(), captions, strict=True)]
    # 90% of images are correct; 5 or fewer of 10 would be an accident of about one in 500
    assert sum(verdict.correct for verdict in verdicts) >= 6, [verdict.reason for verdict in verdicts]
