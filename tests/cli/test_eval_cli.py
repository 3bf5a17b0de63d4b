"""`ssd-cache eval geneval|dpg|fid|clipscore`, from options to files, with small random models that are saved on disk.

The images are noise and the scores mean nothing. That images are the library's own, survive a kill bit for bit, and
are scored by the rules is tested; the rules themselves are held in test_geneval.py and test_dpg.py.
"""

from __future__ import annotations

import csv
import json
import resource
import shutil
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.children import Forked, run_two
from helpers.models import random_score
from helpers.tiny_checkpoint import SIDE, head_map, write_checkpoint
from helpers.tiny_judges import write_blip, write_classifier, write_detector
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
from typer.testing import CliRunner

from ssd_cache import SSDCache
from ssd_cache.cli import app
from ssd_cache.evaluation.conditions import hashed_seed
from ssd_cache.evaluation.dpg import cut_sheet, prompt_lines
from ssd_cache.evaluation.export import ExportError, generate_images
from ssd_cache.evaluation.geneval import SCORER, SampleFolder
from ssd_cache.evaluation.geneval.prompts import parse_prompt
from ssd_cache.evaluation.image_folders import find_captioned, find_images
from ssd_cache.evaluation.metrics import MetricsError, clip_score, fid, load_inception
from ssd_cache.evaluation.vqa import load_vqa
from ssd_cache.models import find_generator

PIXELS = SIDE * 16
LINES = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "blue"}], "prompt": "a photo of a blue car"}',
    '{"tag": "two_object", "include": [{"class": "apple", "count": 1}, {"class": "car", "count": 1}], "prompt": '
    '"a photo of an apple and a car, side by side"}',
]
LONG = "a photo of a red square and a blue circle " * 3
PROMPTS = {"0": "a photo of a red circle", "whoops5": LONG.strip(), "vrd7": "a photo of two squares"}
QUESTIONS = [  # item, id, dependency, tuple, question
    ("0", "1", "0", "entity - whole (car)", "Is there a car ?"),
    ("0", "2", "1", "attribute - color (car, red)", "Is the car red ?"),
    ("whoops5", "1", "0", "global - - (photo)", "Is this a photo ?"),
    ("vrd7", "1", "0", "entity - whole (dog)", "Is there a dog ?"),
]
SETTINGS = ("--budget", "0.5", "--batch-size", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", guidance_scale=3.0)


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Folders of a detector, a CLIP and a BLIP."""
    folder = tmp_path_factory.mktemp("judges")
    return {
        "detector": write_detector(folder / "detector"),
        "clip": write_classifier(folder / "clip", seed=6),
        "vqa": write_blip(folder / "blip", 32),
    }


def write_inputs(folder):
    """The prompt files of both benchmarks, and questions."""
    (folder / "g.jsonl").write_text("\n".join(LINES) + "\n", "utf-8")
    lines = [json.dumps({"item_id": item_id, "prompt": text}) for item_id, text in PROMPTS.items()]
    (folder / "d.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    with (folder / "q.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("item_id", "proposition_id", "dependency", "tuple", "question_natural_language"))
        writer.writerows(QUESTIONS)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with the prompt files, and one thread, so that a child process rounds as this one does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    write_inputs(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    """`run("geneval", "export", ...)`: typer's result, warnings of unknown words not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def export_arguments(bench, model, output, *more):
    prompts = {"geneval": ("--prompts-file", "g.jsonl", "--samples", 2), "dpg": ("--prompts-file", "d.jsonl")}[bench]
    return [bench, "export", "--model", model, "--output", output, *prompts, *SETTINGS, *more]


@pytest.fixture
def export(model):
    """`export("geneval", output, ...)` of the small model with the prompts of this folder."""
    return lambda *arguments: run(*export_arguments(arguments[0], model, *arguments[1:]))


@pytest.fixture(scope="module")
def generated(tmp_path_factory, model):
    """Folders of both benchmarks, generated once; tests get copies."""
    folder = tmp_path_factory.mktemp("generated")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        results = {bench: run(*export_arguments(bench, model, bench)) for bench in ("geneval", "dpg")}
        torch.set_num_threads(threads)
    assert [result.exit_code for result in results.values()] == [0, 0], results["geneval"].output
    return folder


@pytest.fixture
def geneval(generated, tmp_path):
    """A copy of GenEval's folder, as `out`."""
    return shutil.copytree(generated / "geneval", tmp_path / "out")


@pytest.fixture
def dpg(generated, tmp_path):
    """A copy of DPG-Bench's folder, as `out`."""
    return shutil.copytree(generated / "dpg", tmp_path / "out")


def contents(folder):
    """All files of a folder by name, with their bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


# --- generating


def test_geneval_is_generated_into_the_official_layout(export, model):
    result = export("geneval", "out")
    assert result.exit_code == 0, result.output
    assert "out: 6 of 6 images (6 generated now; " in result.stdout
    places = [f"{prompt:05d}/{name}" for prompt in range(3) for name in ("metadata.jsonl", "samples/00000.png")]
    places += [f"{prompt:05d}/samples/00001.png" for prompt in range(3)]
    assert sorted(contents("out")) == sorted([*places, "prompts.jsonl", "settings.json"])
    for index, line in enumerate(LINES):
        assert json.loads(Path(f"out/{index:05d}/metadata.jsonl").read_text("utf-8")) == json.loads(line)
    assert not any(path.name.isdigit() for path in Path("out").iterdir() if path.is_file())
    texts = [json.loads(line)["prompt"] for line in LINES for _ in range(2)]
    generator = find_generator(str(model)).load(device="cpu")
    places = [f"out/{prompt:05d}/samples/{sample:05d}.png" for prompt in range(3) for sample in range(2)]
    for batch, part in enumerate((range(0, 4), range(4, 6))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = SSDCache(head_map(), 0.5)
            tokens = generator.generate([texts[i] for i in part], cache, seed=hashed_seed(42, batch))
        for number, image in zip(part, generator.to_images(tokens), strict=True):
            with Image.open(places[number]) as written:
                assert (written.format, written.mode, written.size) == ("PNG", "RGB", (PIXELS, PIXELS))
                assert written.tobytes() == image.convert("RGB").tobytes()
    settings = json.loads(Path("out/settings.json").read_text("utf-8"))
    expected = {"policy": "ssd", "budget": 0.5, "num_slots": 32, "seed": 42, "guidance_scale": 3, "dtype": "float32"}
    expected |= {"head_map": head_map().digest, "num_prompts": 3, "num_samples": 2, "batch_size": 4}
    assert expected.items() <= settings.items()
    assert {"ssd_cache", "torch", "transformers", "model_sha256", "prompts_sha256"} <= settings.keys()


def test_an_export_uses_a_maps_own_settings_and_names_them(export, model):
    """A fitted map with a learned score: its slots, its score, and the buffer that goes with it."""
    torch.manual_seed(0)
    own = replace(head_map(), budget=[[20, 40], [26, 18]], learned=random_score(2, 2, 16, (SIDE, SIDE)))
    own.save_pretrained("own")
    arguments = ("--prompts-file", "g.jsonl", "--samples", 2, *SETTINGS[2:], "--head-map", "own")  # without a budget
    result = run("geneval", "export", "--model", model, "--output", "default", *arguments)
    assert result.exit_code == 0, result.output
    settings = json.loads(Path("default/settings.json").read_text("utf-8"))
    assert (settings["policy"], settings["num_slots"], settings["budget"]) == ("learned", 26, 26)
    assert settings["slots"].startswith("fitted ")
    assert settings["settings"] == {
        "buffer": SIDE // 3, "num_recent": 0, "num_sinks": 0, "score": "learned", "kv_dtype": None,
    }  # fmt: skip
    assert "policy learned, budget 26 visual tokens (head by head, 26 slots a head" in " ".join(result.stdout.split())

    texts = [json.loads(line)["prompt"] for line in LINES for _ in range(2)]
    generator = find_generator(str(model)).load(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = generator.generate(texts[:4], SSDCache(own), seed=hashed_seed(42, 0))
    image = generator.to_images(tokens)[0]
    with Image.open("default/00000/samples/00000.png") as written:
        assert written.tobytes() == image.convert("RGB").tobytes()

    result = run("geneval", "export", "--model", model, "--output", "equal", *arguments, "--policy", "ssd")
    assert result.exit_code == 0, result.output
    equal = json.loads(Path("equal/settings.json").read_text("utf-8"))
    assert (equal["policy"], equal["settings"]["score"]) == ("ssd", "sum")
    assert equal["slots"].startswith("uniform ")


def test_dpg_is_generated_as_sheets(dpg, model):
    assert sorted(contents("out")) == sorted(["0.png", "vrd7.png", "whoops5.png", "prompts.jsonl", "settings.json"])
    generator = find_generator(str(model)).load(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens = generator.generate([PROMPTS["whoops5"]] * 4, SSDCache(head_map(), 0.5), seed=hashed_seed(42, 1))
    with Image.open("out/whoops5.png") as sheet:
        assert sheet.size == (2 * PIXELS, 2 * PIXELS)
        for crop, image in zip(cut_sheet(sheet), generator.to_images(tokens), strict=True):
            assert crop.tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("bench", ["geneval", "dpg"])
def test_only_missing_images_are_generated_again(generated, export, bench):
    shutil.copytree(generated / bench, "out")
    whole = contents("out")
    lost = Path("out/00001/samples/00000.png" if bench == "geneval" else "out/vrd7.png")
    lost.unlink()
    half = lost.with_name(f".{lost.name}.0a.part")  # a run was killed while it wrote
    half.write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}
    result = export(bench, "out")
    assert "(4 generated now; " in result.stdout
    assert contents("out") == whole
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    assert "(0 generated now; " in export(bench, "out").stdout


def test_a_killed_run_ends_like_an_uninterrupted_one(generated, export, model):
    process = Forked("eval", *export_arguments("geneval", model, "killed"))
    deadline = time.monotonic() + 300
    while not list(Path("killed").rglob("[!.]*.png")):
        assert process.returncode is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(Path("killed").rglob("[!.]*.png"))) < 6, "it was too fast to be killed in between"
    assert export("geneval", "killed").exit_code == 0
    assert contents("killed") == contents(generated / "geneval")


def test_two_processes_generate_the_same_as_one(generated, model):
    pytest.importorskip("accelerate")
    answers = run_two(["eval", *export_arguments("dpg", model, "both")])
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert "both: 12 of 12 images (2 processes; " in answers[0][1]
    assert (answers[1][1], "generating" in answers[1][2]) == ("", False)
    assert contents("both") == contents(generated / "dpg")


def test_a_folder_with_other_settings_is_refused(geneval, export):
    before = contents("out")
    for options, message in (
        (("--seed", 1), "seed 42 there, 1 now"),
        (("--policy", "h2o"), "policy 'ssd' there, 'h2o' now"),
        (("--policy", "ssd:buffer=4"), "policy 'ssd' there, 'ssd:buffer=4' now"),
        (("--budget", "0.6"), "budget 0.5 there, 0.6 now"),
        (("--guidance", "2"), "guidance_scale 3.0 there, 2.0 now"),
        (("--samples", "3"), "num_samples 2 there, 3 now"),
        (("--batch-size", "2"), "batch_size 4 there, 2 now"),
    ):
        result = export("geneval", "out", *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "give another folder" in result.stderr
    Path("g.jsonl").write_text(LINES[0] + "\n", "utf-8")
    assert "num_prompts 3 there, 1 now" in export("geneval", "out").stderr
    assert contents("out") == before
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("no image", "utf-8")
    assert "it is not empty and has no settings.json" in export("geneval", "mine").stderr


def test_a_full_disk_is_reported_and_images_are_kept(model, tmp_path):
    generator = find_generator(str(model)).load(device="cpu")
    folder = SampleFolder(tmp_path / "out", [parse_prompt(line) for line in LINES], 1)

    def generate():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return generate_images(
                generator, folder, lambda: SSDCache(head_map(), 0.5), batch_size=1, seed=0, progress=False
            )

    assert generate() == 3
    folder.path(1).unlink()
    before = contents(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the system refuses to write more, as on a full disk
    try:
        with pytest.raises(ExportError, match="cannot be written .* make room, and run the same command again"):
            generate()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "out") == before
    assert generate() == 1
    assert not folder.missing(range(3))


# --- wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("genevall",), "Did you mean 'geneval'"),
        (("geneval", "export", "--prompts-file", "g.jsonl"), "Missing option '--output'"),
        (("geneval", "export", "-o", "out", "--prompts-file", "no.jsonl"), "'no.jsonl' does not exist"),
        (("geneval", "export", "-o", "out", "--prompts-file", "bad.jsonl"), "bad.jsonl, line 2: tag='color'"),
        (("geneval", "export", "-o", "g.jsonl", "--prompts-file", "g.jsonl"), "--output g.jsonl is a file"),
        (("geneval", "export", "-o", "g.jsonl/x", "--prompts-file", "g.jsonl"), "cannot write into g.jsonl"),
        (
            ("geneval", "export", "-o", "out", "--prompts-file", "g.jsonl", "--samples", 0),
            "for '--samples'",
        ),
        (("geneval", "export", "-o", "out", "--prompts-file", "g.jsonl", "--policy", "sdd"), "did you mean 'ssd'"),
        (("geneval", "export", "-o", "out", "--prompts-file", "g.jsonl", "--budget", "2.0"), "--budget 2.0"),
        (
            ("geneval", "export", "-o", "out", "--prompts-file", "g.jsonl", "--batch-size", 0),
            "Invalid value for '--batch-size'",
        ),
        (("geneval", "export", "-o", "out", "--prompts-file", "g.jsonl", "--model", "./no"), "no such folder"),
        (("geneval", "score", "no", "--detector", "x", "--clip", "x"), "'no' does not exist"),
        (("geneval", "score", ".", "--detector", "x", "--clip", "x"), "give the prompt file of its images"),
        (("dpg", "export", "-o", "out", "--prompts-file", "no.jsonl"), "'no.jsonl' does not exist"),
        (
            ("dpg", "export", "-o", "out", "--prompts-file", "twice.jsonl"),
            "item id 'a' occurs twice",
        ),
        (("dpg", "export", "-o", "out", "--prompts-file", "d.jsonl", "--batch-size", 6), "give a multiple of 4"),
        (("dpg", "export", "-o", "out", "--prompts-file", "d.jsonl", "--samples", 2), "a sheet of DPG-Bench has 4"),
        (("dpg", "score", "no", "--questions", "q.csv", "--vqa", "x"), "'no' does not exist"),
        (("dpg", "score", ".", "--questions", "no.csv", "--vqa", "x"), "'no.csv' does not exist"),
        (("dpg", "score", ".", "--questions", "short.csv", "--vqa", "x"), "short.csv: no column dependency"),
        (("fid", "no", "--reference", "."), "no has no images"),
        (("fid", ".", "--reference", "."), "has no images"),
        (("clipscore", "."), ". has no captions; give GenEval's layout"),
    ],
)
def test_wrong_use_is_reported_in_one_line_before_loading(arguments, message):
    Path("bad.jsonl").write_text(LINES[0] + "\n" + LINES[1].replace('"colors"', '"color"') + "\n", "utf-8")
    Path("twice.jsonl").write_text('{"item_id": "a", "prompt": "x"}\n' * 2, "utf-8")
    Path("short.csv").write_text("item_id,proposition_id,tuple,question_natural_language\n", "utf-8")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("bench", ["geneval", "dpg"])
def test_a_bench_alone_shows_its_commands(bench):
    result = run(bench)
    assert (result.exit_code, result.stderr) == (2, "")
    assert "export" in result.stdout
    assert "score" in result.stdout


# --- scoring


def test_geneval_from_images_to_a_table(geneval, judges):
    score = ("geneval", "score", "out", "--detector", judges["detector"], "--clip", judges["clip"])
    score += ("--short-side", 64, "--device", "cpu")
    result = run(*score)
    assert result.exit_code == 0, result.output
    assert SCORER in result.stdout
    lines = [json.loads(line) for line in Path("out/results/results.jsonl").read_text("utf-8").splitlines()]
    official = {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    assert all(line.keys() >= official for line in lines)
    assert {line["judge"]["scorer"] for line in lines} == {SCORER}
    summary = json.loads(Path("out/results/summary.json").read_text("utf-8"))
    means = [
        [line["correct"] for line in lines if line["tag"] == tag] for tag in ("single_object", "two_object", "colors")
    ]
    assert summary["overall"] == pytest.approx(sum(sum(part) / 2 for part in means) / 3)
    assert (summary["judge"]["scorer"], summary["settings"]["policy"]) == (SCORER, "ssd")
    table = Path("out/results/summary.md").read_text("utf-8")
    assert f"## {SCORER}" in table
    assert f"| overall | {summary['overall']:.4f} | - | 6 | 3 |" in table
    for words in ("6 images of 3 prompts (a part: GenEval has 553 prompts)", "policy ssd", "seed 42", "not official"):
        assert words in table
    assert "of the images" in table
    other = run(*score[:-4], "--short-side", 96, "--device", "cpu")
    assert other.exit_code == 2
    assert "a result of another run" in other.stderr


def test_geneval_images_that_are_missing_or_truncated(geneval, export, judges):
    score = ("geneval", "score", "out", "--detector", judges["detector"], "--clip", judges["clip"], "-o", "results")
    score += ("--short-side", 64, "--device", "cpu")
    cut = Path("out/00000/samples/00001.png")
    whole = cut.read_bytes()
    cut.write_bytes(whole[:300])
    result = run(*score)
    assert result.exit_code == 1
    assert "out/00000/samples/00001.png: the image cannot be read" in result.stderr
    assert "delete it, generate it again, and run the same command again" in result.stderr
    assert not Path("results/summary.json").exists()
    cut.unlink()
    result = run(*score)
    assert result.exit_code == 2
    assert "5 of 6 images (3 prompts x 2); missing: 00000/samples/00001.png" in result.stderr
    assert export("geneval", "out").exit_code == 0
    assert cut.read_bytes() == whole
    result = run(*score)
    assert (result.exit_code, result.stderr.count("could not be read")) == (0, 0)
    Path("full.jsonl").write_text("\n".join([*LINES, LINES[0]]) + "\n", "utf-8")
    result = run(*score, "--prompts-file", "full.jsonl")
    assert result.exit_code == 2
    assert "6 of 8 images (4 prompts x 2); missing: 00003/samples/00000.png" in result.stderr


def test_geneval_without_scipy_says_so(geneval, judges, monkeypatch):
    from ssd_cache.evaluation.geneval import detector

    monkeypatch.setattr(detector, "find_spec", lambda name: None)
    result = run("geneval", "score", "out", "--detector", judges["detector"], "--clip", judges["clip"])
    assert (result.exit_code, "pip install -e '.[eval]'" in result.stderr) == (1, True)


def test_a_missing_judge_is_named(geneval, judges):
    place = ("geneval", "score", "out", "--clip", judges["clip"], "--detector", "user/nowhere")
    for arguments, named in (
        (place, "--detector user/nowhere: "),
        ((*place[:4], "user/nothing", "--detector", judges["detector"]), "--clip user/nothing: "),
    ):
        result = run(*arguments, "--device", "cpu")
        assert (result.exit_code, result.stderr.count("ssd-cache: " + named)) == (1, 1), result.stderr


def test_dpg_from_sheets_to_a_table(dpg, judges):
    score = ("dpg", "score", "out", "--vqa", judges["vqa"], "--device", "cpu")
    result = run(*score, "--questions", "q.csv")
    assert result.exit_code == 0, result.output
    name = f"DPG rules (VQA = {judges['vqa']})"
    summary = json.loads(Path("out/results/summary.json").read_text("utf-8"))
    assert (summary["judge"]["scorer"], len(summary["prompts"]), summary["settings"]["seed"]) == (name, 3, 42)
    assert f"## {name}" in Path("out/results/summary.md").read_text("utf-8")
    vqa = load_vqa(judges["vqa"], device="cpu")
    crops = {item: cut_sheet(Image.open(f"out/{item}.png")) for item in PROMPTS}
    expected = []
    for item in PROMPTS:
        asked = [question for other, _, _, _, question in QUESTIONS if other == item]
        answers = [vqa.answers(crop, asked) for crop in crops[item]]
        expected.append(sum((row[0] + (row[0] and row[-1]) * (len(row) > 1)) / len(row) for row in answers) / 4)
    assert summary["overall"] == pytest.approx(100 * sum(expected) / 3)
    # questions about a prompt that was not generated do not count; the official quirks lose a prompt
    Path("more.csv").write_text(Path("q.csv").read_text("utf-8") + "more,1,0,global,Is it ?\n", "utf-8")
    result = run(*score, "--questions", "more.csv", "-o", "same")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("same/summary.json").read_text("utf-8"))["overall"] == summary["overall"]
    result = run(*score, "--questions", "q.csv", "--official", "-o", "official")
    assert result.exit_code == 0, result.output
    official = json.loads(Path("official/summary.json").read_text("utf-8"))
    assert official["judge"]["scorer"] == f"{name}, official quirks"
    assert official["dropped"] == {"0": "no question 1, on which others depend"}
    result = run(*score, "--questions", "q.csv", "--official")
    assert (result.exit_code, "a result of another run" in result.stderr) == (2, True)


def test_dpg_sheets_that_are_missing_or_truncated(dpg, judges):
    score = ("dpg", "score", "out", "--vqa", judges["vqa"], "--questions", "q.csv", "--device", "cpu")
    Path("out/0.png").write_bytes(Path("out/0.png").read_bytes()[:500])
    result = run(*score)
    assert result.exit_code == 1
    assert "out/0.png: the image cannot be read" in result.stderr
    Path("out/0.png").unlink()
    result = run(*score)
    assert (result.exit_code, "out has 2 of 3 sheets; missing: 0; generate them" in result.stderr) == (2, True)
    Image.new("RGB", (10, 12)).save("out/0.png")
    assert "out/0.png is 10 x 12, not four images in a square" in run(*score, "-o", "other").stderr


def test_a_model_that_answers_no_questions_is_refused(dpg, judges):
    result = run("dpg", "score", "out", "--vqa", judges["clip"], "--questions", "q.csv", "--device", "cpu")
    assert result.exit_code == 2
    assert "CLIPConfig" in result.stderr


# --- FID and CLIPScore


class Moments(torch.nn.Module):
    """Stands in for StyleGAN's Inception, with its signature: the mean of each colour."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = images.float().mean(dim=(2, 3))
        return means if return_features else means.softmax(-1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us export instead; the file's format is StyleGAN's
        torch.jit.script(Moments()).save(str(path))
    return path


def noise(folder, number, low, high, size=24, name="{}.png"):
    generator = np.random.default_rng(number)
    for index in range(number):
        path = Path(folder, name.format(index))
        path.parent.mkdir(parents=True, exist_ok=True)
        tint = generator.integers(low, high, (1, 1, 3))
        pixels = np.clip(tint + generator.integers(-20, 20, (size + index % 2, size, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_fid_is_the_frechet_distance_of_features(inception):
    pytest.importorskip("torchmetrics")
    scipy = pytest.importorskip("scipy.linalg")
    noise("a", 9, 40, 200)
    noise("b", 12, 90, 160, name="below/{}.jpg")
    features = []
    for folder in ("a", "b"):
        images = [np.array(image.open(), dtype=float) for image in find_images(folder)]
        features.append(np.array([image.mean((0, 1)) for image in images]))
    (first, second), covariances = [part.mean(0) for part in features], [np.cov(part.T) for part in features]
    root = scipy.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((first - second) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    result = run("fid", "a", "--reference", "b", "--inception", inception, "-o", "fid")
    assert result.exit_code == 0, result.output
    summary = json.loads(Path("fid/summary.json").read_text("utf-8"))
    assert summary["value"] == pytest.approx(expected, rel=1e-3)  # features and their mean in float32
    assert (summary["num_images"], summary["num_references"]) == (9, 12)
    assert "with fewer than 10000 images an FID is too high" in " ".join(result.stdout.split())
    Path("a/0.png").write_bytes(b"no image")
    result = run("fid", "a", "--reference", "b", "--inception", inception)
    assert result.exit_code == 2
    assert "a/0.png: the image cannot be read" in result.stderr


def test_fid_takes_any_module(inception):
    pytest.importorskip("torchmetrics")
    noise("a", 5, 40, 200)
    images = find_images("a")

    class Plain(torch.nn.Module):
        def forward(self, images):
            return images.float().mean((2, 3))

    assert fid(images, images, Plain()).value == pytest.approx(0, abs=0.05)  # of a spread of about 2000, in float32
    assert fid(images, images, load_inception(inception)).value == pytest.approx(0, abs=0.05)
    with pytest.raises(MetricsError, match="1 images and 5 references: FID needs two or more of each"):
        fid(images[:1], images, Plain())


def test_fid_says_what_is_missing(monkeypatch):
    pytest.importorskip("torchmetrics")
    noise("a", 3, 40, 200)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # Python's own way to make an import fail
    result = run("fid", "a", "--reference", "a")
    assert result.exit_code == 2
    assert "FID needs torchmetrics and an Inception-V3" in result.stderr
    assert "--inception" in result.stderr
    result = run("fid", "a", "--reference", "a", "--inception", "a/0.png")
    assert (result.exit_code, "a/0.png is not a TorchScript file" in result.stderr) == (2, True)


def test_clip_score_is_the_mean_cosine(geneval, judges):
    result = run("clipscore", "out", "--clip", judges["clip"], "-o", "clip", "--device", "cpu")
    assert result.exit_code == 0, result.output
    model, processor = CLIPModel.from_pretrained(judges["clip"]), CLIPProcessor.from_pretrained(judges["clip"])
    expected = []
    for index, line in enumerate(LINES):
        for sample in range(2):
            image = Image.open(f"out/{index:05d}/samples/{sample:05d}.png")
            inputs = processor(text=json.loads(line)["prompt"], images=image, return_tensors="pt")
            with torch.no_grad():
                outputs = model(**inputs)
            expected.append(100 * torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds).item())
    summary = json.loads(Path("clip/summary.json").read_text("utf-8"))
    assert summary["value"] == pytest.approx(sum(expected) / 6, abs=1e-3)  # of 100, in float32
    assert sum(expected) > 0  # below it stands for nothing: the score is cut at 0
    assert (summary["num_images"], summary["num_cut"]) == (6, 0)


def test_clip_score_of_long_prompts(judges):
    noise("a", 4, 40, 200)
    texts = ["a car", LONG, "a bench", LONG]
    lines = [json.dumps({"file_name": f"{number}.png", "prompt": text}) + "\n" for number, text in enumerate(texts)]
    Path("a/metadata.jsonl").write_text("".join(lines), "utf-8")
    captioned = find_captioned("a")
    result = clip_score(captioned, judges["clip"], device="cpu")
    assert (result.num_images, result.num_cut) == (4, 2)
    model, tokenizer = CLIPModel.from_pretrained(judges["clip"]), AutoTokenizer.from_pretrained(judges["clip"])
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(judges["clip"]), tokenizer)  # torchvision's differs
    expected = []
    for image in captioned:  # the end mark of a long prompt stays, or its features would be read elsewhere
        inputs = processor(text=image.caption, images=image.open(), return_tensors="pt", truncation=True, max_length=77)
        with torch.no_grad():
            outputs = model(**inputs)
        expected.append(100 * torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds).item())
    assert result.value == pytest.approx(max(0, sum(expected) / 4), abs=1e-3)  # of 100, in float32
    assert sum(expected) > 0  # below it stands for nothing: the score is cut at 0


class Patches(torch.nn.Module):
    """Stands in for StyleGAN's VGG-16, with its signature: means of patches."""

    def forward(self, images: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images / 255, 8).flatten(1)


def test_similarity_to_the_full_cache(geneval, export, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Patches()).save("patches.pt")
    assert export("geneval", "full", "--policy", "full").exit_code == 0
    shutil.copy("full/00000/samples/00000.png", "out/00000/samples/00000.png")  # equal images: infinite PSNR
    result = run("similarity", "out", "--reference", "full", "--lpips", "patches.pt", "-o", "same", "--device", "cpu")
    assert result.exit_code == 0, result.output
    psnr, lpips = {}, {}
    for one, other in zip(find_captioned("out"), find_captioned("full"), strict=True):
        first, second = (np.array(image.open(), dtype=float) for image in (one, other))
        error = ((first - second) ** 2).mean()
        if error:
            psnr.setdefault(one.caption, []).append(10 * np.log10(255**2 / error))
        patches = [image.reshape(PIXELS // 8, 8, PIXELS // 8, 8, 3).mean((1, 3)) / 255 for image in (first, second)]
        lpips.setdefault(one.caption, []).append(((patches[0] - patches[1]) ** 2).sum())
    summary = json.loads(Path("same/summary.json").read_text("utf-8"))
    for found, expected in zip(summary["results"], (psnr, lpips), strict=True):
        means = [np.mean(values) for values in expected.values()]
        assert found["mean"] == pytest.approx(np.mean(means), rel=1e-4)  # features in float32
        assert found["standard_error"] == pytest.approx(np.std(means) / len(means) ** 0.5, rel=1e-3)
        assert (found["num_images"], found["num_equal"]) == (6, 1)
        assert f"{found['mean']:.4f}" in result.stdout
    assert "images that equal their reference: 1; their PSNR" in result.stdout
    alone = run("similarity", "out", "--reference", "full", "--lpips", "none")
    assert ("PSNR, dB" in alone.stdout, "LPIPS " in alone.stdout) == (True, False)


def test_similarity_of_other_settings_is_refused(geneval, export, tmp_path):
    def refused(message, reference="full", lpips="none"):
        result = run("similarity", "out", "--reference", reference, "--lpips", lpips)
        assert (result.exit_code, message in " ".join(result.stderr.split())) == (2, True), result.stderr

    refused("out: its images have the policy ssd; give the folder of the full cache", "out")
    shutil.copytree("out", "full")
    settings = json.loads(Path("full/settings.json").read_text("utf-8")) | {"policy": "full", "budget": 1.0, "seed": 1}
    Path("full/settings.json").write_text(json.dumps(settings), "utf-8")
    refused("not only the cache differs (seed 1 in the reference, 42 here)")
    Path("full/settings.json").write_text(json.dumps(settings | {"seed": 42}), "utf-8")
    refused("0.png is not a TorchScript file", lpips="out/00000/samples/00000.png")
    pixels = Image.open("full/00001/samples/00000.png").resize((8, 8))
    pixels.save("full/00001/samples/00000.png")
    refused("00001/samples/00000.png: [32, 32] pixels, its reference has [8, 8]".replace("32", str(PIXELS)))
    Path("full/00002/samples/00001.png").unlink()
    refused("only one has 00002/samples/00001.png; generate what is missing")
    Path("full/settings.json").unlink()
    refused("full has no settings; give a folder that ssd-cache generated images into")


def test_lpips_says_which_file_to_put_where(geneval, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)  # Python's own way to make an import fail
    monkeypatch.setenv("TORCH_HOME", "torch")
    result = run("similarity", "out", "--reference", "out")
    assert result.exit_code == 2
    assert "needs torchmetrics, torchvision and alexnet-owt-7be5be79.pth in torch/hub/checkpoints" in result.stderr


def test_fid_refuses_sheets(dpg):
    result = run("fid", "out", "--reference", "out")
    assert (result.exit_code, "out has sheets of four images" in result.stderr) == (2, True)


def test_captions_from_a_list():
    noise("a", 2, 40, 200)
    lines = [{"file_name": "0.png", "prompt": "a car"}, {"file_name": "1.png", "text": "a bench"}]
    Path("a/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert [(image.name, image.caption) for image in find_captioned("a")] == [("0.png", "a car"), ("1.png", "a bench")]
    for broken, message in (
        ({"file_name": "2.png", "prompt": "a car"}, "line 3: the image '2.png' does not exist"),
        ({"file_name": "x" * 300, "prompt": "a car"}, "line 3: the image 'xxx"),
        ({"file_name": "../a/0.png", "prompt": "a car"}, "line 3: the image '../a/0.png' leaves the folder"),
        ({"file_name": "0.png", "prompt": "a car"}, "line 3: the image '0.png' is listed twice"),
        ({"file_name": "0.png"}, 'line 3: .* needs texts as "file_name" and "prompt"'),
    ):
        text = "".join(json.dumps(line) + "\n" for line in [*lines, broken])
        Path("a/metadata.jsonl").write_text(text, "utf-8")
        with pytest.raises(ValueError, match=message):
            find_captioned("a")


def test_the_prompts_of_sheets_are_written_as_json_lines():
    text = prompt_lines(PROMPTS)
    assert [json.loads(line) for line in text.splitlines()] == [
        {"item_id": item_id, "prompt": prompt} for item_id, prompt in PROMPTS.items()
    ]
