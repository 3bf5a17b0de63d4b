"""The command line with every family of generators: small random checkpoints in folders, and a stated grid.

That a family generates as it should is tested beside it (test_models_*.py); here, that each command gets there, and
what is refused before weights are loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_checkpoint import write_family
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

from ssd_cache import HeadMap, SSDCache
from ssd_cache.cli import app
from ssd_cache.models import Checkpoint, find_generator

PROMPTS = ["a red circle", "a blue square and a circle"]
LABELS = torch.tensor([[True, False], [False, True]])
GRIDS = {"emu3": (6, 7), "llama": (6, 6), "glm": (8, 4)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each family, and for two of them the map of a grid that is not the one asked for."""
    above = tmp_path_factory.mktemp("models")
    for name in GRIDS:
        write_family(name, above / name)
    HeadMap(LABELS, (90, 91)).save_pretrained(above / "map")
    HeadMap(LABELS, (90, 91), model_id="user/emu3").save_pretrained(above / "map-of-emu3")
    return above


@pytest.fixture
def run(folders, tmp_path, monkeypatch):
    """`run(command, name, *arguments)` with a family's checkpoint and grid, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def invoke(command, name, *arguments):
        rows, columns = GRIDS[name]
        options = ["--model", folders / name, "--grid", f"{rows}x{columns}"]
        return CliRunner().invoke(app, [*command.split(), *map(str, (*arguments, *options))])

    return invoke


def test_generate_runs_an_emu3_of_another_size_with_labels_of_its_own_grid(run, folders):
    result = run(
        "generate", "emu3", *PROMPTS, "--head-map", folders / "map", "--budget", 14, "--buffer", 4, "-o", "a.png"
    )
    assert result.exit_code == 0, result.output
    generator = find_generator(str(folders / "emu3"), GRIDS["emu3"]).load()
    cache = SSDCache(HeadMap(LABELS, GRIDS["emu3"]), 14, buffer=4)
    first, second = generator.to_images(generator.generate(PROMPTS, cache))
    sheet = Image.open("a.png")
    assert sheet.width > first.width + second.width
    pixels = sheet.tobytes()
    assert all(image.tobytes()[: 3 * image.width] in pixels for image in (first, second))  # their first rows


@pytest.mark.parametrize("name", ["emu3", "glm", "llama"])
def test_generate_writes_the_visual_tokens_of_every_family(run, folders, name):
    options = ["--head-map", "online", "--budget", "0.5", "--buffer", 4, "--seed", 3]
    result = run("generate", name, *PROMPTS, *options, "-o", "a.safetensors")
    assert result.exit_code == 0, result.output
    checkpoint = find_generator(str(folders / name), GRIDS[name])
    labels = HeadMap.online(num_layers=2, num_kv_heads=2).with_layout(checkpoint.layout)
    expected = checkpoint.load().generate(PROMPTS, SSDCache(labels, 0.5, buffer=4), seed=3)
    found = load_file("a.safetensors")
    assert set(found) == {"online"}
    assert torch.equal(found["online"], expected)
    assert f"wrote a.safetensors (2 x {checkpoint.num_visual_tokens} tokens)" in result.stdout


def test_the_tokens_of_a_comparison_are_named_by_policy(run):
    result = run(
        "generate", "llama", *PROMPTS, "--compare", "--head-map", "online", "--budget", 18, "-o", "A.SAFETENSORS"
    )
    assert result.exit_code == 0, result.output
    assert set(load_file("A.SAFETENSORS")) == {"full", "online", "ssd", "h2o", "streaming-llm"}
    assert "does not know as an image generator: each prompt is followed by 6 x 6 plain tokens" in result.stderr


def test_a_map_that_names_another_model_is_warned_of_and_used(run, folders):
    options = ["--head-map", folders / "map-of-emu3", "--budget", 14, "--buffer", 4, "-o", "a.safetensors"]
    for name, number in (("emu3", 0), ("llama", 1)):
        result = run("generate", name, *PROMPTS, *options)
        assert result.exit_code == 0, result.output
        assert result.stderr.count("was made for user/emu3, and the model is ") == number


@pytest.mark.parametrize("name", ["emu3", "llama"])
def test_profile_then_fidelity_then_fit(run, name):
    levels = ["--budget", 18, "--levels", "14,22", "--buffer", 4]
    result = run("profile", name, *PROMPTS, *levels, "-o", "map")
    assert result.exit_code == 0, result.output
    head_map = HeadMap.from_pretrained("map")
    assert (head_map.grid, head_map.num_kv_heads) == (GRIDS[name], 2)
    policies = ["--policies", "ssd,online,h2o", "--budgets", 18, "--buffer", 4, "--num-images", 2]
    result = run("eval fidelity", name, *PROMPTS, *policies, "--head-map", "map")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("fidelity/fidelity.json").read_text())["conditions"]
    assert written["guidance_scale"] == (3.0 if name == "emu3" else 1.0)
    assert written["grid"] == list(GRIDS[name])
    result = run("fit", name, PROMPTS[0], "--head-map", "map", "--budget", 18, "-o", "fitted")
    assert result.exit_code == 0, result.output
    assert HeadMap.from_pretrained("fitted").budget is not None


def test_profile_then_generate_then_fidelity_over_a_draft_grid_and_an_image(run, folders):
    result = run("profile", "glm", *PROMPTS, "--budget", 18, "--levels", 22, "--buffer", 4, "-o", "map")
    assert result.exit_code == 0, result.output
    head_map = HeadMap.from_pretrained("map")
    assert (head_map.grid, head_map.previews) == (GRIDS["glm"], ((22, 11),))
    result = run("generate", "glm", *PROMPTS, "--head-map", "map", "--budget", 18, "--buffer", 4, "-o", "a.safetensors")
    assert result.exit_code == 0, result.output
    expected = (
        find_generator(str(folders / "glm"), GRIDS["glm"]).load().generate(PROMPTS, SSDCache(head_map, 18, buffer=4))
    )
    assert torch.equal(load_file("a.safetensors")["ssd"], expected)
    few = ["--policies", "ssd", "--budgets", 18, "--buffer", 4, "--num-images", 1]
    result = run("eval fidelity", "glm", PROMPTS[0], *few, "--head-map", "map")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("fidelity/fidelity.json").read_text())
    assert written["previews"] == written["conditions"]["previews"] == [[22, 11]]
    assert len(written["results"]["ssd 18"]["retained_by_grid_row"]) == 22 + 8


@pytest.mark.slow
def test_fit_shares_slots_out_over_a_draft_grid_and_an_image(run):
    retained = {
        f"retained_{kind}-{slots}": torch.full((2, 2), 0.5) for kind in ("spatial", "semantic") for slots in (14, 22)
    }
    HeadMap(LABELS, GRIDS["glm"], previews=[(22, 11)], scores=retained, profile={"buffer": 4}).save_pretrained("map")
    result = run("fit", "glm", PROMPTS[0], "--head-map", "map", "--budget", 18, "-o", "fitted")
    assert result.exit_code == 0, result.output
    fitted = HeadMap.from_pretrained("fitted")
    assert (fitted.grid, fitted.previews) == (GRIDS["glm"], ((22, 11),))
    assert sorted(slots for layer in fitted.budget for slots in layer) == [14, 14, 22, 22]
    assert (fitted.scores["divergence-14"] > 0).all()


@pytest.mark.parametrize("name", ["emu3", "llama", "glm"])
def test_bench_measures_a_checkpoint_in_a_stated_grid(run, name):
    few = ["--batch-size", 1, "--rounds", 1, "--no-compiled", "--budgets", "0.5"]
    result = run("bench", name, *few, "--caches", "DynamicCache;ssd 50%", "-o", "bench")
    assert result.exit_code == 0, result.output
    rows, columns = GRIDS[name]
    preview, cells = ("22 x 11+", 22 * 11 + rows * columns) if name == "glm" else ("", rows * columns)
    assert f"{preview}{rows} x {columns} = {cells} visual tokens" in result.stdout
    guidance = "none, one row an image" if name == "glm" else "5, two rows an image"
    assert f"guidance: {guidance}\n" in result.stdout
    full, small = json.loads(Path("bench/bench.json").read_text())["rows"]
    assert full["cache"] == "DynamicCache"
    assert small["key_value"] < 0.7 * full["key_value"]
    assert f"--grid {rows}x{columns}" in result.stdout


def test_analyze_runs_an_emu3_in_a_stated_grid(run, folders):
    options = ["--head-map", folders / "map", "--budget", 18, "--buffer", 4, "--num-images", 2]
    result = run("analyze", "emu3", PROMPTS[0], *options)
    assert result.exit_code == 0, result.output
    assert Path("analysis/report.html").exists()


def test_inspect_finds_the_map_that_a_model_of_any_type_carries(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    HeadMap(LABELS, (6, 6), model_id="user/llama").save_pretrained(tmp_path / "head_map")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "user/llama" in result.stdout


GENEVAL = {"prompt": "a red circle", "tag": "single_object", "include": [{"class": "bench", "count": 1}]}


def test_geneval_is_exported_in_a_stated_grid(run):
    Path("p.jsonl").write_text(json.dumps(GENEVAL))
    options = ["--prompts-file", "p.jsonl", "--policy", "online", "--budget", "18", "--samples", 2, "-o", "images"]
    result = run("eval geneval export", "emu3", *options)
    assert result.exit_code == 0, result.output
    images = sorted(Path("images").rglob("*.png"))
    assert [Image.open(path).size for path in images] == [(48, 48)] * 2


REFUSED = [
    ("generate", "llama", ["--head-map", "online"], "cannot decode them: take the tokens .* .safetensors"),
    ("generate", "glm", ["--head-map", "online"], "pipe.vision_language_encoder"),
    ("profile", "glm", ["--method", "window", "--window", "10"], "window=10 is out of range: give 1 to 9 visual"),
    ("fit", "glm", [], "has no head map in its folder: give --head-map"),
    ("eval fidelity", "glm", ["--policies", "margin,h2o"], "margin needs a head map"),
    ("analyze", "glm", ["--head-map", "{map}"], "generates a draft grid first.*`ssd-cache profile` and `eval fid"),
    ("analyze", "llama", ["--head-map", "{map}"], "has no guidance, whose rows the analysis compares"),
    ("eval geneval export", "llama", ["--prompts-file", "p.jsonl"], "cannot decode them"),
    ("generate", "llama", ["--head-map", "{map}", "--grid", "6by6"], "--grid 6by6: give rows and columns"),
    ("generate", "emu3", ["--head-map", "{map}", "--grid", "0x7"], "integers from 1 to 4096"),
    ("generate", "emu3", ["--model", "shapes-janus"], r"always generates 24 x 24 visual tokens; leave grid out"),
    ("bench", "emu3", ["--model", "small-cpu"], "the shape small-cpu has a grid of 24 x 24; leave grid out"),
]


@pytest.mark.parametrize(("command", "name", "arguments", "message"), REFUSED)
def test_what_a_family_cannot_do_is_refused_before_weights_are_loaded(
    folders, tmp_path, monkeypatch, command, name, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    Path("p.jsonl").write_text(json.dumps(GENEVAL))
    rows, columns = GRIDS[name]
    given = [text.format(map=folders / "map") for text in arguments]
    options = [] if "--model" in given else ["--model", str(folders / name)]
    options += [] if "--grid" in given else ["--grid", f"{rows}x{columns}"]
    options += ["-o", "out.png" if command == "generate" else "out"] if "-o" not in given else []
    words = [] if command in ("bench", "eval geneval export") else ["a red circle"]
    result = CliRunner().invoke(app, [*command.split(), *words, *options, *given])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert [path.name for path in Path().iterdir()] == ["p.jsonl"]
