"""`ssd-cache generate --output-dir`: a file per image with its metadata, in a folder that a second call completes."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.children import Forked, run_two
from helpers.tiny_checkpoint import SIDE, head_map, write_checkpoint
from PIL import Image
from typer.testing import CliRunner

from ssd_cache import SSDCache
from ssd_cache.cli import app
from ssd_cache.cli.plan import COMPARED
from ssd_cache.evaluation.image_folders import find_captioned, find_images
from ssd_cache.models import Checkpoint, find_generator

CIRCLE, SQUARES = "a photo of a red circle", "a photo of two squares"
IMAGES = ("00000.png", "00001.png", "00002.png", "00003.png")
OPTIONS = ("--num-images", 2, "--batch-size", 3, "--budget", "0.5", "--seed", 5, "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", guidance_scale=3.0)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder, and one thread, so that a child process rounds as this one does."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(model):
    def invoke(*arguments, options=OPTIONS):
        return CliRunner().invoke(app, ["generate", *map(str, arguments), "--model", str(model), *map(str, options)])

    return invoke


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A folder of four images in batches of three and one."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = ["generate", CIRCLE, SQUARES, "--model", str(model), "--output-dir", str(folder), *map(str, OPTIONS)]
    result = CliRunner().invoke(app, arguments)
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert f"{folder}: 4 of 4 images (4 generated now; " in result.stdout
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def test_each_image_is_the_librarys_own_and_carries_its_metadata(whole, model):
    assert sorted(contents(whole)) == [*IMAGES, "metadata.jsonl", "prompts.jsonl", "settings.json"]
    generator, texts = find_generator(str(model)).load(), [CIRCLE, CIRCLE, SQUARES, SQUARES]
    images = []
    for batch, part in enumerate((texts[:3], texts[3:])):
        images += generator.to_images(generator.generate(part, SSDCache(head_map(), 0.5), seed=5 + batch))
    listed = [json.loads(line) for line in (whole / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert [line["file_name"] for line in listed] == list(IMAGES)
    for number, (name, line) in enumerate(zip(IMAGES, listed, strict=True)):
        with Image.open(whole / name) as image:
            np.testing.assert_array_equal(image, images[number])
            assert json.loads(image.text["ssd-cache"]) == line
        expected = {"prompt": texts[number], "index": number, "sample": number % 2, "batch_seed": 5 + number // 3}
        expected |= {"seed": 5, "policy": "ssd", "budget": 0.5, "num_slots": SIDE**2 / 2, "guidance_scale": 3.0}
        expected |= {"buffer": 8, "kv_dtype": None}
        expected |= {"model": str(model), "batch_size": 3, "head_map": head_map().digest, "dtype": "float32"}
        assert expected.items() <= line.items()
        assert {"ssd_cache", "torch", "transformers", "temperature", "device", "num_slots"} <= line.keys()
    assert [(image.name, image.caption) for image in find_captioned(whole)] == list(zip(IMAGES, texts, strict=True))
    assert [image.name for image in find_images(whole)] == list(IMAGES)


def test_a_second_call_generates_what_is_missing_and_nothing_else(whole, run, monkeypatch):
    shutil.copytree(whole, "out")
    before = contents("out")
    Path("out/00001.png").unlink()
    Path("out/.00001.png.0a.part").write_bytes(b"half")  # a run was killed while it wrote
    times = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    result = run(CIRCLE, SQUARES, "--output-dir", "out")
    assert result.exit_code == 0, result.output
    assert "out: 4 of 4 images (3 generated now; " in result.stdout  # the batch is generated whole
    assert contents("out") == before
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    without_batch_size = (*OPTIONS[:2], *OPTIONS[4:])
    result = run(CIRCLE, SQUARES, "--output-dir", "out", options=without_batch_size)  # the folder's own is kept
    assert "(0 generated now; " in result.stdout, result.output
    assert contents("out") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", 6), "seed 5 there, 6 now"),
        (("--budget", "0.6"), "budget 0.5 there, 0.6 now"),
        (("--policy", "h2o"), "policy 'ssd' there, 'h2o' now"),
        (("--num-images", 3), "num_images 2 there, 3 now"),
        (("--batch-size", 2), "batch_size 3 there, 2 now"),
        (("--guidance", 2), "guidance_scale 3.0 there, 2.0 now"),
        (("--kv-dtype", "int8"), "kv_dtype"),
        (("more prompts",), "num_prompts 2 there, 3 now"),
        (("-o", "a.png"), "--output a.png and --output-dir out: give one of them"),
    ],
    ids=str,
)
def test_other_settings_are_refused_before_weights_are_loaded(whole, run, monkeypatch, arguments, message):
    shutil.copytree(whole, "out")
    before = contents("out")
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    result = run(CIRCLE, SQUARES, "--output-dir", "out", options=(*OPTIONS, *arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert contents("out") == before
    assert not Path("a.png").exists()


@pytest.mark.parametrize("options", [OPTIONS, ()])
def test_a_folder_of_something_else_is_refused(run, monkeypatch, options):
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("no image")
    Path("file").write_text("no folder")
    for place, message in (("mine", "it is not empty and has no settings.json"), ("file", "is a file; give a folder")):
        result = run(CIRCLE, "--output-dir", place, options=options)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


def test_compare_has_a_folder_for_each_policy(run):
    result = run(CIRCLE, SQUARES, "--compare", "--output-dir", "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(COMPARED)
    images = {policy: contents(Path("out") / policy) for policy in COMPARED}
    for policy in COMPARED:
        assert sorted(images[policy]) == [*IMAGES, "metadata.jsonl", "prompts.jsonl", "settings.json"]
        assert f"out/{policy}: 4 of 4 images" in result.stdout
    assert len({files["00000.png"] for files in images.values()}) == len(COMPARED)
    alone = run(CIRCLE, SQUARES, "--policy", "h2o", "--output-dir", "alone")
    assert alone.exit_code == 0, alone.output
    assert contents("alone") == images["h2o"]
    assert run(CIRCLE, SQUARES, "--output-dir", "out").exit_code == 2  # one policy into the folder of several
    assert "(0 generated now; " in run(CIRCLE, SQUARES, "--compare", "--output-dir", "out").stdout


def test_prompts_may_hold_any_characters(run):
    texts = [
        "a/b\\c: *?<>|",
        "quotes \" and '",
        "two\nlines",
        "émoji 🦊 日本",
        "sep\u2028arator \x0b\x85",
        "nul\0",
        "x" * 900,
    ]
    Path("p.jsonl").write_text(
        "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8"
    )
    result = run("--prompts-file", "p.jsonl", "--output-dir", "out", options=("--budget", "0.5"))
    assert result.exit_code == 0, result.output
    for number, text in enumerate(texts):
        with Image.open(f"out/{number:05}.png") as image:
            assert json.loads(image.text["ssd-cache"])["prompt"] == text.strip()
    assert (
        "(0 generated now; "
        in run("--prompts-file", "p.jsonl", "--output-dir", "out", options=("--budget", "0.5")).stdout
    )
    Path("p.jsonl").write_text('{"prompt": "a \\ud800 surrogate"}\n')
    for options in (("--output-dir", "other"), ("-o", "a.png")):
        result = run("--prompts-file", "p.jsonl", *options)
        assert result.exit_code == 2
        assert "line 1: the text 'a \\ud800 surrogate' holds half of a surrogate pair" in " ".join(
            result.stderr.split()
        )


def test_ctrl_c_leaves_a_folder_that_the_same_command_completes(run, model):
    options = ("--num-images", 24, "--batch-size", 1, "--policy", "full", "--device", "cpu")
    process = Forked("generate", CIRCLE, "--model", model, "--output-dir", "out", *options)
    while not list(Path().glob("out/0*.png")):
        assert process.returncode is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 1
    kept = contents("out")
    names = sorted(name for name in kept if name.endswith(".png"))
    assert 0 < len(names) < 24, "it was too fast to be interrupted"
    last = f"ssd-cache: interrupted; out keeps {len(names)} of 24 images: run the same command again to resume"
    assert rest.splitlines()[-1] == last
    assert [json.loads(line)["file_name"] for line in kept["metadata.jsonl"].decode().splitlines()] == names
    result = run(CIRCLE, "--output-dir", "out", options=options)
    assert f"24 of 24 images ({24 - len(names)} generated now; " in result.stdout, result.output
    assert all(contents("out")[name] == kept[name] for name in names)
    generator = find_generator(str(model)).load()
    for number in (0, len(names) - 1, len(names), 23):
        tokens = generator.generate([CIRCLE], SSDCache.from_policy("full", head_map()), seed=number)
        np.testing.assert_array_equal(Image.open(f"out/{number:05}.png"), generator.to_images(tokens)[0])


def test_two_processes_make_the_folder_that_one_makes(whole, model):
    pytest.importorskip("accelerate")
    answers = run_two(["generate", CIRCLE, SQUARES, "--model", model, "--output-dir", "both", *OPTIONS])
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert "both: 4 of 4 images (2 processes; " in answers[0][1]
    assert answers[1][1] == ""
    assert contents("both") == contents(whole)
