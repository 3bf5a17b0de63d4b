"""The command line, from arguments to files and exit codes, on a small random Janus; at the end as real processes.

The images themselves are noise. That they equal those of the library's own call is tested; what a trained model
generates is not.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.children import start_cli
from helpers.hub_server import Repo
from helpers.models import random_score
from helpers.tiny_checkpoint import SIDE, head_map, write_checkpoint
from PIL import Image
from rich.filesize import decimal
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from tqdm import tqdm
from typer.testing import CliRunner

import ssd_cache
from ssd_cache import POLICIES, HeadMap, SSDCache
from ssd_cache.cli import app
from ssd_cache.cli.plan import COMPARED, parse_budget
from ssd_cache.cli.sheet import contact_sheet
from ssd_cache.models import Checkpoint, find_generator
from ssd_cache.runs import batching
from ssd_cache.runs.processes import Processes

CIRCLE, SQUARES = "a photo of a red circle", "a photo of two squares"
PIXELS, CELLS = SIDE * 16, SIDE * SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def generator(folder):
    return find_generator(str(folder)).load()


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """`run(*arguments)` of generate with the small model, in an empty folder; gives typer's result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments, command="generate", model=str(folder)):
        options = ["--model", model] if command == "generate" and "--model" not in arguments else []
        return CliRunner().invoke(app, [command, *map(str, arguments), *options])

    return invoke


def files(path=Path()):
    return sorted(item.name for item in path.iterdir())


# --- what is printed


def test_version_is_the_packages(run):
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"ssd-cache {ssd_cache.__version__}\n")


def test_without_a_command_the_help_is_shown_and_the_use_is_wrong(run):
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    for name in ("generate", "inspect"):
        assert name in result.stdout


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_option_within_80_columns(run, flag):
    result = run(flag)
    assert result.exit_code == 0
    options = "prompts-file num-images output compare model grid head-map dtype device policy budget slots buffer"
    for name in (*options.split(), "kv-dtype", "output-dir", "guidance", "temperature", "seed", "batch-size"):
        assert f"--{name} " in result.stdout
    for policy in POLICIES:
        assert policy in result.stdout.replace("\n", " ")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Annotated" not in result.stdout


# --- wrong use: one line, before anything is loaded

BAD = [
    ([], "no prompt: give one or more"),
    ([""], "give at least one prompt, and none that is empty"),
    ([CIRCLE, "  "], "give at least one prompt, and none that is empty"),
    (["--prompts-file", "missing.txt"], "cannot read --prompts-file missing.txt: [Errno 2] No such file"),
    (["--prompts-file", "blank.txt"], "no prompt: give one or more"),
    (["--prompts-file", "latin.txt"], "cannot read --prompts-file latin.txt: 'utf-8' codec"),
    (["--prompts-file", "."], "cannot read --prompts-file .: [Errno 21] Is a directory"),
    ([CIRCLE, "-o", "picture"], "--output picture: give a name that ends with .png, .jpg"),
    ([CIRCLE, "-o", "picture.gif"], "--output picture.gif: give a name that ends with"),
    ([CIRCLE, "--grid", "8"], "--grid 8: give rows and columns of visual tokens with an x between"),
    ([CIRCLE, "--grid", "9x9"], "always generates 8 x 8 visual tokens; leave grid out"),
    ([CIRCLE, "-o", "nowhere/a.png"], "--output nowhere/a.png: cannot write into nowhere: No such file"),
    ([CIRCLE, "-o", "folder.png"], "--output folder.png is a folder; give a file"),
    ([CIRCLE, "-o", "blank.txt/a.png"], "cannot write into blank.txt: Not a directory"),
    ([CIRCLE, "--num-images", "0"], "Invalid value for '--num-images'"),
    ([CIRCLE, "--num-images", "two"], "Invalid value for '--num-images'"),
    ([CIRCLE, "--batch-size", "0"], "Invalid value for '--batch-size'"),
    ([CIRCLE, "--budget", "0"], "--budget 0: give a fraction of the grid above 0"),
    ([CIRCLE, "--budget", "-0.2"], "--budget -0.2: give a fraction"),
    ([CIRCLE, "--budget", "1.5"], "--budget 1.5: give a fraction"),
    ([CIRCLE, "--budget", "nan"], "--budget nan: give a fraction"),
    ([CIRCLE, "--budget", "20%"], "--budget 20%: give a fraction"),
    ([CIRCLE, "--budget", "0.1"], "fewer than buffer=8 and"),
    ([CIRCLE, "--budget", "20", "--buffer", "19"], "raise the budget, or lower buffer"),
    ([CIRCLE, "--buffer", "0"], "buffer=0 is out of range"),
    ([CIRCLE, "--kv-dtype", "int4"], "kv_dtype='int4' is unknown: did you mean 'int8'? give one of 'int8', 'fp8'"),
    (
        [CIRCLE, "--policy", "lru"],
        f"unknown policy 'lru'; the policies are {', '.join(POLICIES[:7])}",
    ),
    ([CIRCLE, "--policy", "ssd", "--compare"], "--compare generates with full, ssd, h2o, streaming-llm: leave"),
    ([CIRCLE, "--guidance", "1"], "guidance_scale=1.0 is out of range"),
    ([CIRCLE, "--guidance", "1.0"], "1.001 is almost no guidance"),
    ([CIRCLE, "--temperature", "-1"], "temperature=-1.0 is out of range"),
    ([CIRCLE, "--seed", "-1"], "seed=-1 is out of range"),
    ([CIRCLE, "--dtype", "int8"], "unknown dtype 'int8'"),
    ([CIRCLE, "--device", "gpu"], "device 'gpu' cannot be used on this machine"),
    ([CIRCLE, "--model", "./nowhere"], "model './nowhere': no such folder"),
    ([CIRCLE, "--model", "."], "no config.json in this folder"),
    ([CIRCLE, "--head-map", "./nowhere"], "no such folder or file"),
    ([CIRCLE, "--head-map", "other-map"], "2 layers x 3 KV heads and a grid of 8 x 8, but"),
    (
        [CIRCLE, "--model", "mapless"],
        "needs a head map, and mapless has none in its folder: give --head-map",
    ),
    ([CIRCLE, "--colour", "red"], "No such option: --colour"),
    ([CIRCLE, "--output"], "--output"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) or "nothing" for arguments, _ in BAD])
def test_a_mistake_is_one_line_and_nothing_is_loaded(run, folder, monkeypatch, arguments, message):
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    Path("blank.txt").write_text("\n  \n")
    Path("latin.txt").write_bytes("a photo of a café".encode("latin-1"))
    Path("folder.png").mkdir()
    HeadMap.uniform("spatial", num_layers=2, num_kv_heads=3, grid=(SIDE, SIDE)).save_pretrained("other-map")
    Path("mapless").mkdir()
    Path("mapless/config.json").write_bytes((folder / "config.json").read_bytes())
    before = files()
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("ssd-cache: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert files() == before


@pytest.mark.parametrize("place", ["--output=long.png", "--output-dir=long"])
def test_a_prompt_that_leaves_no_room_for_the_image_is_refused(run, place):
    result = run(CIRCLE, "red " * 961, place)  # 1024 positions, 64 of them the image's
    assert result.exit_code == 2, result.output
    assert "has 1024 positions, and the image leaves 960 for the prompt: shorten it" in result.stderr
    assert files() == []


def test_an_unknown_command_is_one_line(run):
    result = CliRunner().invoke(app, ["generat", CIRCLE])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "No such command 'generat'. Did you mean 'generate'?" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run(CIRCLE, "-o", "locked/a.png")
    assert result.exit_code == 2
    assert "cannot write into" in result.stderr


@pytest.mark.parametrize(
    ("text", "budget"), [("0.2", 0.2), ("1", 1.0), ("1.0", 1.0), (".5", 0.5), ("115", 115), ("2", 2), ("1e-1", 0.1)]
)
def test_a_budget_is_a_fraction_or_a_count(text, budget):
    assert parse_budget(text) == budget
    assert type(parse_budget(text)) is type(budget)


# --- generating


def table(stdout):
    """{policy: cells of its row} of the closing table."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines()]
    return {row[0]: row[1:] for row in rows if row[0] in POLICIES}


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler on the CPU"
)
def test_fast_generates_the_same_image(run):
    for name, options in (("a.png", []), ("b.png", ["--fast"])):
        torch._dynamo.reset()
        counters.clear()
        result = run(CIRCLE, "--budget", "0.4", "--temperature", "0", *options, "-o", name)
        assert result.exit_code == 0, result.output
        assert counters["stats"]["unique_graphs"] == len(options)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_one_image_is_the_librarys_own(run, generator):
    result = run(CIRCLE, "--budget", "0.4", "--seed", "3", "--guidance", "3", "--temperature", "0.9", "-o", "a.png")
    assert result.exit_code == 0, result.output
    assert files() == ["a.png"]
    cache = SSDCache(head_map(), 0.4)
    tokens = generator.generate([CIRCLE], cache, guidance_scale=3.0, temperature=0.9, seed=3)
    np.testing.assert_array_equal(Image.open("a.png"), generator.to_images(tokens)[0])
    stats = cache.memory_stats()
    now, ratio, speed = table(result.stdout)["ssd"]
    assert now == f"{stats.key_value / 1000:.1f} kB"
    assert ratio == f"{stats.full_cache / stats.key_value:.1f}x"
    assert float(speed) >= 1
    assert f"wrote a.png ({PIXELS} x {PIXELS})" in result.stdout
    for condition in ("float32", "guidance 3", "temperature 0.9", "seed 3"):
        assert condition in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert f"{CELLS}/{CELLS}" in result.stderr  # the bar


def test_budget_as_a_count_and_policies_differ(run):
    sizes = {}
    own = head_map()
    torch.manual_seed(0)
    replace(own, learned=random_score(2, 2, 16, own.grid)).save_pretrained("learned")
    for policy in POLICIES:
        result = run(CIRCLE, "--policy", policy, "--budget", "26", "--head-map", "learned", "-o", f"{policy}.png")
        assert result.exit_code == 0, result.output
        sizes[policy] = table(result.stdout)[policy][0]
    assert len({sizes[policy] for policy in POLICIES if policy != "full"}) == 1  # the same budget, the same bytes
    assert sizes["full"] != sizes["ssd"]
    assert len({Path(f"{policy}.png").read_bytes() for policy in POLICIES}) == len(POLICIES)
    assert "learned" in table(run(CIRCLE, "--head-map", "learned", "-o", "a.png").stdout)
    assert "ssd" in table(run(CIRCLE, "-o", "b.png").stdout)
    compared = table(run(CIRCLE, "--head-map", "learned", "--compare", "--budget", "26", "-o", "d.png").stdout)
    assert [name for name in compared if name in POLICIES] == ["full", "learned", "ssd", "h2o", "streaming-llm"]
    result = run(CIRCLE, "--policy", "learned", "-o", "c.png")
    assert result.exit_code == 2
    assert "carries no learned score" in result.stderr


def test_a_fitted_map_is_used_with_its_slots_unless_equal_ones_are_asked_for(run, generator):
    own = replace(head_map(), budget=[[20, 40], [26, 18]])
    own.save_pretrained("fitted")

    def generated(*options):
        result = run(CIRCLE, "--head-map", "fitted", *options, "-o", "a.safetensors")
        assert result.exit_code == 0, result.output
        return load_file("a.safetensors")

    def expected(*args, **settings):
        return generator.generate([CIRCLE], SSDCache(own, *args, **settings))

    for options in ((), ("--budget", "26"), ("--policy", "ssd", "--slots", "fitted")):
        [(name, tokens)] = generated(*options).items()
        assert name == "ssd:slots=fitted"
        assert torch.equal(tokens, expected())
    assert torch.equal(generated("--budget", "0.6")["ssd:slots=fitted"], expected(0.6))
    for options in (("--slots", "uniform"), ("--policy", "ssd"), ("--policy", "ssd", "--slots", "uniform")):
        [(name, tokens)] = generated(*options).items()
        assert name == "ssd"
        assert torch.equal(tokens, expected(slots="uniform"))
    assert not torch.equal(expected(), expected(slots="uniform")), "both generate the same, so this tests nothing"
    compared = generated("--compare")
    assert sorted(compared) == ["full", "h2o", "ssd", "ssd:slots=fitted", "streaming-llm"]
    assert torch.equal(compared["h2o"], generator.generate([CIRCLE], SSDCache.from_policy("h2o", own, 26)))
    for options, message in (
        (("--slots", "unifrom"), "slots='unifrom' is unknown: did you mean 'uniform'?"),
        (("--slots", "fitted", "--policy", "h2o"), "slots='fitted': the head map"),
        (("--slots", "fitted", "--head-map", "online"), "carries no slots"),
    ):
        result = run(CIRCLE, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in " ".join(result.stderr.split())


def test_the_same_command_generates_the_same_and_another_seed_does_not(run):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(CIRCLE, "--budget", "0.5", "--seed", seed, "-o", f"{name}.png").exit_code == 0
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "PNG"])
def test_formats_go_by_the_name_and_an_older_file_is_replaced(run, suffix):
    place = Path(f"a.{suffix}")
    place.write_text("older")
    assert run(CIRCLE, "--policy", "full", "-o", place).exit_code == 0
    with Image.open(place) as image:
        assert image.size == (PIXELS, PIXELS)
        assert image.format == {"png": "PNG", "PNG": "PNG", "webp": "WEBP"}.get(suffix, "JPEG")
    assert files() == [place.name]


def find_images(sheet, images):
    """Upper left corner (row, column) of every image on the sheet, each found exactly once."""
    pixels = np.asarray(sheet.convert("RGB"))
    corners = []
    for image in map(np.asarray, images):
        first = np.argwhere((pixels[: 1 - PIXELS, : 1 - PIXELS] == image[0, 0]).all(-1))
        found = [
            (int(row), int(column))
            for row, column in first
            if np.array_equal(pixels[row : row + PIXELS, column : column + PIXELS], image)
        ]
        assert len(found) == 1
        corners += found
    return corners


def test_several_images_come_as_a_sheet_of_a_row_for_each_prompt(run, generator):
    Path("prompts.txt").write_text(f"\ufeff{SQUARES}\n\n")
    result = run(CIRCLE, "--prompts-file", "prompts.txt", "--num-images", "2", "--budget", "0.5", "-o", "a.png")
    assert result.exit_code == 0, result.output
    tokens = generator.generate([CIRCLE, CIRCLE, SQUARES, SQUARES], SSDCache(head_map(), 0.5))
    corners = find_images(Image.open("a.png"), generator.to_images(tokens))
    assert corners[0][0] == corners[1][0] < corners[2][0] == corners[3][0]
    assert corners[0][1] == corners[2][1] < corners[1][1] == corners[3][1]
    assert f"{4 * CELLS}/{4 * CELLS}" in result.stderr  # the bar


def test_batches_have_seeds_of_their_own(run, generator):
    result = run(CIRCLE, "--num-images", "3", "--batch-size", "2", "--seed", "5", "--policy", "full", "-o", "a.png")
    assert result.exit_code == 0, result.output
    cache, tokens = SSDCache.from_policy("full", head_map()), []
    for seed, number in ((5, 2), (6, 1)):
        cache.reset()
        tokens.append(generator.generate([CIRCLE] * number, cache, seed=seed))
    find_images(Image.open("a.png"), generator.to_images(torch.cat(tokens)))


def test_many_prompts_come_in_batches_of_a_fixed_size(run):
    """40 prompts are two batches, as with the batch size named; they were one, whatever memory there was."""
    Path("prompts.txt").write_text(f"{CIRCLE}\n{SQUARES}\n" * 20)
    for name, options in (("a", ()), ("b", ("--batch-size", 32)), ("c", ("--batch-size", 40))):
        result = run("--prompts-file", "prompts.txt", "--budget", "0.5", *options, "-o", f"{name}.safetensors")
        assert result.exit_code == 0, result.output
        assert f"batch {40 if name == 'c' else 32}," in " ".join(result.stdout.split())
    a, b, c = (load_file(f"{name}.safetensors")["ssd"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_short_memory_makes_smaller_batches_and_says_so(run, monkeypatch):
    monkeypatch.setattr(batching, "free_memory", lambda device: 10**6)
    result = run(CIRCLE, SQUARES, "--num-images", 10, "--budget", "0.5", "-o", "a.safetensors")
    assert result.exit_code == 0, result.output
    match = re.search(r"warning: (\d+) image\(s\) are generated at once instead of 32: the free memory", result.stderr)
    assert f"batch {match[1]}," in " ".join(result.stdout.split())
    same = run(CIRCLE, SQUARES, "--num-images", 10, "--budget", "0.5", "--batch-size", match[1], "-o", "b.safetensors")
    assert same.exit_code == 0, same.output
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_compare_generates_a_row_a_policy_on_the_same_seed(run, generator):
    result = run(CIRCLE, SQUARES, "--compare", "--budget", "0.4", "--seed", "2", "-o", "a.png")
    assert result.exit_code == 0, result.output
    rows = table(result.stdout)
    assert tuple(rows) == COMPARED
    heights = []
    for policy in COMPARED:
        cache = SSDCache.from_policy(policy, head_map(), 0.4)
        images = generator.to_images(generator.generate([CIRCLE, SQUARES], cache, seed=2))
        first, second = find_images(Image.open("a.png"), images)
        assert first[0] == second[0]
        assert first[1] < second[1]
        heights.append(first[0])
        assert rows[policy][0] == decimal(cache.nbytes)
    assert heights == sorted(heights)


@pytest.mark.parametrize("policy", ["ssd", "full"])
def test_visual_tokens_can_be_stored_in_8_bits(run, generator, policy):
    result = run(CIRCLE, "--policy", policy, "--budget", "0.4", "--kv-dtype", "int8", "-o", "a.safetensors")
    assert result.exit_code == 0, result.output
    cache = SSDCache.from_policy(policy, head_map(), 0.4, kv_dtype="int8")
    assert torch.equal(load_file("a.safetensors")[policy], generator.generate([CIRCLE], cache))
    assert table(result.stdout)[policy][0] == decimal(cache.nbytes)


def test_compared_in_8_bits_the_full_cache_stays_whole(run, generator):
    result = run(CIRCLE, "--compare", "--budget", "0.4", "--kv-dtype", "int8", "-o", "a.safetensors")
    assert result.exit_code == 0, result.output
    for policy, tokens in load_file("a.safetensors").items():
        kv_dtype = None if policy == "full" else "int8"
        cache = SSDCache.from_policy(policy, head_map(), 0.4, kv_dtype=kv_dtype)
        assert torch.equal(tokens, generator.generate([CIRCLE], cache))
        assert table(result.stdout)[policy][0] == decimal(cache.nbytes)


def test_a_map_can_be_given_and_is_used(run, folder):
    (~head_map()).save_pretrained("inverted")
    for name, options in (("a", []), ("b", ["--head-map", "inverted"]), ("c", ["--head-map", folder])):
        assert run(CIRCLE, "--budget", "0.4", "-o", f"{name}.png", *options).exit_code == 0
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()
    assert Path("a.png").read_bytes() == Path("c.png").read_bytes()  # the folder of a model that carries its map


def test_a_model_without_a_map_generates_under_the_other_policies(run, tmp_path):
    model = write_checkpoint(tmp_path / "mapless", with_head_map=False)
    result = run(CIRCLE, "--model", model, "--policy", "h2o", "--budget", "0.4", "-o", "a.png")
    assert result.exit_code == 0, result.output
    result = run(CIRCLE, "--model", model, "--policy", "margin", "--budget", "0.4", "-o", "a.png")
    assert result.exit_code == 2
    assert "margin needs a head map" in " ".join(result.stderr.split())


def test_warnings_are_one_line_each(run):
    result = run("a photo of a purple dog", "--budget", "0.25", "-o", "a.png")
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.replace("\r", "\n").splitlines() if "warning" in line]
    assert [line.split(": ")[:2] for line in warnings] == [["ssd-cache", "warning"]] * 2
    assert "cannot see the token right above" in warnings[0]
    assert "does not know 'dog'" in warnings[1]


# --- what goes wrong on the way


@pytest.mark.parametrize(
    ("error", "line"), [(OSError(28, "No space left on device"), "[Errno 28] No space left"), (KeyboardInterrupt(), "")]
)
def test_a_full_disk_or_an_interruption_while_writing_leaves_the_older_file(run, monkeypatch, error, line):
    Path("a.png").write_text("older")

    def fail(descriptor):
        raise error

    monkeypatch.setattr("ssd_cache.io.writing.os.fsync", fail)
    result = run(CIRCLE, "--policy", "full", "-o", "a.png")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"ssd-cache: {line or 'interrupted'}")
    assert Path("a.png").read_text() == "older"
    assert files() == ["a.png"]


def test_a_bug_shows_its_traceback(run, monkeypatch):
    monkeypatch.setattr("ssd_cache.cli.generate.generate_file", lambda *_, **__: 1 / 0)
    result = run(CIRCLE, "--policy", "full")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


# --- inspect


def test_inspect_prints_a_map_and_finds_that_of_a_model(run, folder):
    result = run(folder, command="inspect")
    assert result.exit_code == 0, result.output
    assert "2 layers x 2 KV heads: 1 spatial, 3 semantic" in result.stdout
    assert re.search(r"^\s+0\s+#\.", result.stdout, re.MULTILINE)
    assert re.search(r"^\s+1\s+\.\.", result.stdout, re.MULTILINE)
    for fact in ("tiny", "8 x 8 visual tokens", "made up for tests", "0.5", head_map().digest):
        assert fact in result.stdout
    alone = run(folder / "head_map", command="inspect")
    assert alone.stdout == result.stdout


def test_inspect_says_how_a_map_is_used(run):
    plain = run(head_map().save_pretrained("plain"), command="inspect").stdout
    assert "slots      none of its own; 13.0 a head on average, 20.3% of the grid unless a budget is given" in plain
    assert "attention sum (this map carries no learned score)" in plain
    assert "policy ssd, buffer 8, num_recent 0.25, num_sinks 0" in plain
    assert "labels by  score, spatial above 0.5" in plain

    retained = {"retained_spatial-13": [[0.9, 0.2], [0.1, 0.4]], "retained_semantic-13": [[0.7, 0.8], [0.6, 0.9]]}
    retained |= {"retained_spatial-40": [[0.9, 0.3], [0.2, 0.5]], "retained_semantic-40": [[0.8, 0.9], [0.8, 0.95]]}
    scores = {name: torch.tensor(values) for name, values in retained.items()}
    scores["coverage"] = scores["retained_spatial-13"] - scores["retained_semantic-13"]
    own = HeadMap(
        torch.tensor([[True, False], [False, False]]),
        (SIDE, SIDE),
        scores=scores,
        budget=[[13, 40], [40, 13]],
        learned=random_score(2, 2, 16, (SIDE, SIDE)),
        method="fit, score learned",
    )
    fitted = run(own.save_pretrained("own"), command="inspect").stdout
    assert "slots      fitted, 13 to 40; 26.5 a head on average, 41.4% of the grid" in fitted
    assert "score      learned score (ranks the tokens of semantic heads)" in fitted
    assert "by default policy learned, buffer 2, num_recent 0, num_sinks 0" in fitted
    assert "labels by  coverage" in fitted
    assert re.search(r"^ +0 +#\. +13 40 +-0.600 to \+0.200", fitted, re.MULTILINE)
    assert re.search(r"^ +1 +\.\. +40 13 +-0.500 to -0.500", fitted, re.MULTILINE)

    short = replace(head_map(), budget=[[5, 40], [40, 13]]).save_pretrained("short")  # a map that no default serves
    result = run(short, command="inspect")
    assert result.exit_code == 0
    assert "by default refused: the budget gives a spatial head of layer 0 5 slots" in result.stdout


def test_inspect_keeps_the_slots_of_many_heads_on_a_line(run):
    many = HeadMap(torch.zeros(2, 32, dtype=torch.bool), (SIDE, SIDE), budget=[[*range(20, 52)]] * 2)
    lines = run(many.save_pretrained("many"), command="inspect").stdout.splitlines()
    assert sum(" ".join(map(str, range(20, 52))) in line for line in lines) == 2


@pytest.mark.parametrize("source", ["./nowhere", "."])
def test_inspect_refuses_what_is_no_map_in_one_line(run, source):
    result = run(source, command="inspect")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


# --- contact sheets


def squares(number, side=PIXELS):
    """Images of one colour each, none of them white."""
    return [Image.new("RGB", (side, side), (10 * index, 100, 200 - 10 * index)) for index in range(number)]


def corner_of(sheet, color):
    pixels = np.argwhere((np.asarray(sheet) == color).all(-1))
    return tuple(pixels.min(0).tolist()), tuple((pixels.max(0) + 1).tolist())


def test_what_does_not_fit_side_by_side_goes_on_below():
    images = squares(14)
    sheet = contact_sheet({"one": images[:7], "two": images[7:]}, [f"caption {n}" for n in range(7)], 3)
    corners = find_images(sheet, images)
    tops, lefts = (sorted({corner[axis] for corner in corners}) for axis in (0, 1))
    assert (len(tops), len(lefts)) == (6, 3)  # three blocks of two rows
    for index, (top, left) in enumerate(corners):
        row, place = divmod(index, 7)
        assert (top, left) == (tops[2 * (place // 3) + row], lefts[place % 3])


def test_nothing_touches_the_rim_and_captions_are_printed():
    sheet = contact_sheet({"policy\n12.3 MB\n4.5x": squares(2)}, ["a word", "another " * 200], 2)
    pixels = np.asarray(sheet)
    for rim in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (rim == 255).all()
    (top, left), _ = corner_of(sheet, (0, 100, 200))
    assert (pixels[:top, left:] < 128).any()  # ink above the images
    assert (pixels[top:, : left - 4] < 128).any()  # and at their left
    assert (pixels[:, left - 4 : left] == 255).all()


def test_captions_break_between_words_and_are_not_cut(monkeypatch):
    captions = ["a rocket, noto style, on a purple background", "mmmmmmmm WWWWWWWW iiiiiiii", "w" * 40]
    drawn = []

    def record(self, xy, text, fill, font):
        drawn.append((text, font.getlength(text)))

    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", record)
    contact_sheet({"": squares(3, side=96)}, captions, 3)
    lines = [line for line, _ in drawn]
    assert " ".join(lines).startswith(" ".join(captions[:2]))
    assert "".join(lines).endswith(captions[2])
    assert max(length for _, length in drawn) <= 96


def test_wide_sheets_shrink_by_whole_numbers():
    sheet = contact_sheet({"": squares(8, side=1024)}, ["caption"] * 8, 8)
    assert sheet.width < 4096 + 1024
    (top, left), (bottom, right) = corner_of(sheet, (0, 100, 200))
    assert (bottom - top, right - left) == (512, 512)


# --- real processes


@pytest.fixture
def child(tmp_path):
    """`child(*arguments, **environment)` starts the command line in an empty folder; it is gone when the test is."""
    started = []

    def start(*arguments, **environment):
        process = start_cli(*arguments, cwd=tmp_path, **{"COLUMNS": "80", **environment})
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_with_1_one_line_and_no_file(folder, child, tmp_path):
    """Also where SIGINT is ignored: a shell starts background jobs so, and what they start inherits it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        options = ("--num-images", 1000, "--batch-size", 1, "--budget", "0.4", "-o", "a.png")
        process = child("generate", CIRCLE, "--model", folder, *options)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen = ""
    while not re.search(r"[1-9]\d*/\d", seen):  # the bar has moved: it is generating
        character = process.stderr.read(1)
        assert character, f"it ended by itself: {seen}"
        seen += character
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate()
    assert process.returncode == 1
    assert rest.splitlines()[-1] == "ssd-cache: interrupted"
    assert "Traceback" not in rest
    assert out == ""
    assert files(tmp_path) == []


@pytest.mark.parametrize("drawn", ["inside tqdm", "before its block"])
def test_ctrl_c_while_a_bar_is_made_removes_it(run, monkeypatch, drawn):
    """The interruption comes after the bar is on the screen, and before a block would close it."""
    method = {"inside tqdm": "refresh", "before its block": "__enter__"}[drawn]
    real = getattr(tqdm, method)

    def interrupt(bar, *args, **kwargs):
        real(bar, *args, **kwargs)
        bars.append(bar)  # as the frames of a traceback do
        raise KeyboardInterrupt

    bars = []
    monkeypatch.setattr(tqdm, method, interrupt)
    result = run(CIRCLE, "--budget", "0.4")
    monkeypatch.undo()
    assert len(bars) == 1
    *shown, last = result.stderr.split("\r")
    assert last == "ssd-cache: interrupted\n"
    assert any(text.strip() for text in shown)


def test_the_bundled_model_generates_its_prompt_and_a_mistake_ends_with_2(child, tmp_path):
    process = child("generate", "a photo of a red circle and a blue square")
    refused = child("generate", CIRCLE, "--budget", "2.0")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert files(tmp_path) == ["picture.png"]
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (384, 384)
    assert "576/576" in err
    assert float(table(out)["learned"][1].removesuffix("x")) > 4
    assert "warning" not in err
    assert "Loading weights" not in err
    out, err = refused.communicate()
    assert (refused.returncode, out, err.count("\n")) == (2, "", 1)


def test_a_model_that_was_never_loaded_is_not_found_offline(run):
    result = run(CIRCLE, "--model", "user/nowhere")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_a_model_and_a_map_come_from_the_hub(run, hub, folder):
    hub.repos["user/tiny"], hub.repos["user/map"] = Repo(), Repo()
    hub.repos["user/tiny"].commit({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    hub.repos["user/map"].commit({path.name: path.read_bytes() for path in (folder / "head_map").iterdir()})
    result = run(CIRCLE, "--budget", "0.4", "--model", "user/tiny", "--head-map", "user/map")
    assert result.exit_code == 0, result.output
    assert "user/tiny on cpu" in result.stdout
    assert Path("picture.png").exists()
    hub.repos["user/pipe"] = Repo()
    hub.repos["user/pipe"].commit({"model_index.json": b'{"_class_name": "GlmImagePipeline"}'})
    result = run(CIRCLE, "--budget", "0.4", "--model", "user/pipe")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "'user/pipe' is a diffusers pipeline: load it with diffusers" in result.stderr
    assert "ssd_cache.enable(pipe.PART, head_map, ...)" in result.stderr
    for model, message in (("user/other", "no such repository on the Hub"), ("user/map", "is a head map")):
        result = run(CIRCLE, "--budget", "0.4", "--model", model)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert f"model '{model}'" in result.stderr
        assert message in result.stderr


def test_several_processes_share_a_folder_alone(run, monkeypatch):
    monkeypatch.setattr(Processes, "__init__", lambda self: vars(self).update(index=0, count=2, device=None))
    result = run(CIRCLE, "-o", "a.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "several processes can only share the images of a folder: give --output-dir" in result.stderr
