"""Every `ssd-cache` command line in README.md, docs/ and hub/ is accepted on models of the shapes that the pages name.

A page's commands run in order in one folder that holds the models, maps and prompt files which the pages mention; the
models are small and random. `profile` and `fit` run whole, since later commands read their maps. The others run until
they load weights, so all that a command refuses is checked. Of commands that score images, the options are checked.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from helpers.tiny_checkpoint import head_map, write_checkpoint, write_family
from typer.testing import CliRunner

from ssd_cache import HeadMap
from ssd_cache.bench import subject
from ssd_cache.cli import app
from ssd_cache.evaluation.fidelity import divergence
from ssd_cache.evaluation.geneval import DETECTOR
from ssd_cache.evaluation.judge_models import CLIP
from ssd_cache.models import BUNDLED, BUNDLED_MODELS, Checkpoint

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "hub").rglob("*.md"))]
SHELL = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`ssd-cache ([^`]+)`")
PROMPT = "a photo of a red circle"
TAKES_PROMPTS = ("generate", "profile", "fit", "learn")
SCORES = ("score", "compare", "report", "fid", "clipscore", "similarity")
"""Commands of `eval` over files that other commands wrote; only their options are checked."""


class LoadedError(Exception):
    """The command was accepted: it went on to load weights."""


def _block_commands(text: str) -> list[list[str]]:
    """Arguments of all `ssd-cache` commands in shell blocks, also of those behind a launcher."""
    found = []
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for name in ("ssd-cache", "ssd_cache.cli"):
                if name in words:
                    found.append(words[words.index(name) + 1 :])
    return found


def _span_commands(text: str) -> list[list[str]]:
    """Arguments of commands within sentences that have options; dots stand for what the reader adds."""
    spans = [shlex.split(span) for span in SPAN.findall(text.replace("\n", " "))]
    return [
        [word for word in words if word != "..."]
        for words in spans
        if any(word.startswith("--") for word in words) and not {"COMMAND", "--help", "--version"} & set(words)
    ]


def _parse(arguments: list[str]) -> None:
    """Have the command line's own parser read the arguments; raises what it finds wrong."""
    command, context = typer.main.get_command(app), None
    while hasattr(command, "resolve_command"):
        context = typer.Context(command, parent=context, info_name=command.name)
        _, command, arguments = command.resolve_command(context, arguments)
    command.make_context(command.name, arguments, parent=context)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """The models, maps and prompt files that the pages name."""
    shelf = tmp_path_factory.mktemp("shelf")
    write_checkpoint(shelf / "deepseek-community" / "Janus-Pro-1B", with_head_map=False, side=24)
    write_family("emu3", shelf / "BAAI" / "Emu3-Gen-hf")
    write_family("llama", shelf / "some" / "llama")
    for name in ("prompts.txt", "few.txt", "captions.txt"):
        (shelf / name).write_text(f"{PROMPT}\na photo of two squares\n")
    line = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
    (shelf / "evaluation_metadata.jsonl").write_text(line)
    pairs = {"vqa_list": [["Is the circle red?", "Yes"]], "skills": ["attribute"]}
    (shelf / "geneval2_data.jsonl").write_text(json.dumps({"prompt": "a red circle", "atom_count": 2, **pairs}) + "\n")
    (shelf / "dpg_bench.csv").write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
        "\na,a red circle,,1,0,entity,whole,entity - whole (circle),Is there a circle?\n"
    )
    for name in ("prompts", "results", "more-results"):
        (shelf / name).mkdir()
    (shelf / "prompts" / "a.txt").write_text("a red circle")
    for judge in (DETECTOR, CLIP, "Salesforce/blip-vqa-capfilt-large"):  # `reproduce` looks for them
        (shelf / judge).mkdir(parents=True)
        (shelf / judge / "config.json").write_text("{}")
    (shelf / "dpg_bench").mkdir()
    shutil.copytree(shelf / "prompts", shelf / "dpg_bench" / "prompts")
    shutil.copy(shelf / "dpg_bench.csv", shelf / "dpg_bench")
    (shelf / "examples").mkdir()
    for name in ("captions.txt", "emoji-captions.txt"):
        shutil.copy(ROOT / "examples" / name, shelf / "examples")
    for name in ("my-head-map", "my-map"):
        head_map(24).save_pretrained(shelf / name)
    HeadMap.uniform("semantic", num_layers=2, num_kv_heads=2, grid=(8, 9)).save_pretrained(shelf / "emu3-map")
    made = ("profiled", "fitted", "coverage", "window", "slots-map", "first-map", "shapes-map", "map-10", "map-15")
    for name in made:
        shutil.copytree(BUNDLED_MODELS[BUNDLED].folder / "head_map", shelf / name)
    return shelf


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page, shelf, tmp_path, monkeypatch):
    place = tmp_path / "place"
    shutil.copytree(shelf, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    load = Checkpoint.load

    def stop(*_, **__):
        raise LoadedError

    monkeypatch.setattr(subject, "load_subject", stop)
    monkeypatch.setattr("ssd_cache.cli.bench.load_subject", stop)
    monkeypatch.setattr("ssd_cache.cli.demo.find_spec", lambda name: True)  # Gradio, which only the page needs
    monkeypatch.setattr(divergence, "NEGLIGIBLE", float("inf"))  # `fit` measures one level of each head, not five
    text = page.read_text("utf-8")
    for arguments in _block_commands(text) + _span_commands(text):
        _parse(arguments)
        command, is_score = arguments[0], bool(set(arguments[:3]) & set(SCORES))
        if is_score:
            continue
        is_option_first = arguments[1:] == [] or arguments[1].startswith("-")
        if command in TAKES_PROMPTS and "--prompts-file" not in arguments and is_option_first:
            arguments = [*arguments, PROMPT]
        is_bundled = "--model" not in arguments or bool(BUNDLED_MODELS.keys() & set(arguments))
        runs_whole = command in ("profile", "fit") and not is_bundled
        monkeypatch.setattr(Checkpoint, "load", load if runs_whole else stop)
        result = CliRunner().invoke(app, arguments)
        accepted = result.exit_code == 0 or isinstance(result.exception, LoadedError)
        assert accepted, f"{page.name}: ssd-cache {shlex.join(arguments)}\n{result.output}\n{result.exception!r}"


def test_the_pages_have_commands():
    found = [command for page in PAGES for command in _block_commands(page.read_text("utf-8"))]
    assert len(found) > 30
    assert {command[0] for command in found} == {command.name for command in app.registered_commands} | {"eval"}
