"""Names that are misspelt or cannot be names: one line, soon, with one exit code for all commands.

The Hub is a server on the loopback, or an address where nothing listens. What a right name loads is tested elsewhere.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial

import huggingface_hub
import pytest
import torch
from helpers.children import Forked
from helpers.hub_server import HubServer, Repo, connect
from typer.testing import CliRunner

from ssd_cache import HeadMap, HeadMapError
from ssd_cache.cli import app
from ssd_cache.io.showing import ReadableError, printable, shown, suggestion
from ssd_cache.models import BUNDLED_MODELS, GeneratorError, find_generator, find_head_map

MAP = HeadMap(torch.tensor([[True, False]]), (4, 6))
SOON = 3.0
"""Seconds: huggingface_hub alone waits 23 s for a server that refuses connections."""

HOSTILE = ["a\0b", "\ud800", "x" * 5000, "x" * 300, "a/" + "b" * 300, "../" * 2000, "~nobody/x", "\x1b[31m", "\u202ea"]

PROMPT = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """huggingface_hub asks a port where nothing listens."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as hub:
        url = hub.url
    connect(url, monkeypatch, tmp_path / "cache")
    yield url
    huggingface_hub.utils.close_session()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that answers."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as hub:
        hub.repos["user/map"] = Repo()
        connect(hub.url, monkeypatch, tmp_path / "cache")
        yield hub
        huggingface_hub.utils.close_session()


def commands(tmp_path, option: str, name: str) -> dict[str, list[str]]:
    """Every command that takes a model, or a head map, with this name for it."""
    (tmp_path / "prompts.jsonl").write_text(PROMPT)
    (tmp_path / "dpg").mkdir(exist_ok=True)
    (tmp_path / "dpg" / "0.txt").write_text("a bench")
    given = [option, name]
    found = {
        "generate": ["generate", "a circle", "-o", "x.png", *given],
        "fit": ["fit", "a circle", "-o", "x", *given],
        "learn": ["learn", "a circle", "-o", "x", *given],
        "analyze": ["analyze", "a circle", "-o", "x", *given],
        "eval shapes": ["eval", "shapes", "-o", "x", *given],
        "eval fidelity": ["eval", "fidelity", "-o", "x", *given],
        "eval geneval export": ["eval", "geneval", "export", "--prompts-file", "prompts.jsonl", "-o", "x", *given],
        "eval dpg export": ["eval", "dpg", "export", "--prompts-file", "dpg", "-o", "x", *given],
    }
    if option == "--model":
        found["profile"] = ["profile", "a circle", "-o", "x", *given]
        found["bench"] = ["bench", "-o", "x", *given]
    else:
        found["inspect"] = ["inspect", name]
    return found


def lines_of(arguments: list[str]) -> tuple[int, list[str], float]:
    """Exit code, lines on stderr, seconds."""
    started = time.monotonic()
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    return result.exit_code, result.stderr.splitlines(), time.monotonic() - started


@pytest.mark.parametrize("option", ["--model", "--head-map"])
def test_a_misspelt_name_is_one_line_and_soon_when_the_hub_is_out_of_reach(nowhere, tmp_path, option):
    for command, arguments in commands(tmp_path, option, "shape-janus").items():
        code, lines, seconds = lines_of(arguments)
        assert (code, len(lines)) == (1, 1), (command, lines)
        assert "shape-janus" in lines[0], command
        assert lines[0].endswith("(did you mean 'shapes-janus'?)"), (command, lines)
        assert seconds < SOON, command
        assert not (tmp_path / "x").exists(), command


@pytest.mark.parametrize("option", ["--model", "--head-map"])
def test_a_name_that_the_hub_does_not_know_is_wrong_use(hub, tmp_path, option):
    for command, arguments in commands(tmp_path, option, "user/nothing").items():
        hub.requests.clear()
        code, lines, seconds = lines_of(arguments)
        assert (code, len(lines)) == (2, 1), (command, lines)
        assert "user/nothing" in lines[0], command
        assert 0 < len(hub.requests) <= 4, command
        assert seconds < SOON, command


@pytest.mark.parametrize("option", ["--model", "--head-map"])
def test_a_misspelt_folder_is_wrong_use(nowhere, tmp_path, option):
    MAP.save_pretrained(tmp_path / "maps" / "janus-map")
    for command, arguments in commands(tmp_path, option, "./maps/janus-mpa").items():
        code, lines, _ = lines_of(arguments)
        assert (code, len(lines)) == (2, 1), (command, lines)
        assert "no such folder" in lines[0], (command, lines)
        assert "maps/janus-mpa" in lines[0], (command, lines)


def test_models_of_the_families_and_of_the_cache_are_suggested(nowhere, tmp_path):
    for name, nearest in (
        ("deepseek-comunity/Janus-Pro-1B", "deepseek-community/Janus-Pro-1B"),
        ("janus-pro-7b", "deepseek-community/Janus-Pro-7B"),
        ("BAAI/Emu3-Gen", "BAAI/Emu3-Gen-hf"),
    ):
        with pytest.raises(ConnectionError, match=rf"the server cannot be reached .*\(did you mean '{nearest}'\?\)$"):
            find_generator(name)
    assert suggestion("something/else-entirely", ["shapes-janus", "deepseek-community/Janus-Pro-1B"]) == ""


def test_a_server_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path):
    import socket

    from ssd_cache.io import hub

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        connect(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch, tmp_path)
        monkeypatch.setattr(hub, "ATTEMPT_SECONDS", 0.5)
        started = time.monotonic()
        with pytest.raises(HeadMapError, match="the server cannot be reached and there is no cached copy"):
            HeadMap.from_pretrained("user/map")
        with pytest.raises(ConnectionError, match="the server cannot be reached"):
            find_generator("user/model")
        assert time.monotonic() - started < 2 * 0.5 + SOON
    huggingface_hub.utils.close_session()


def test_a_hub_in_trouble_is_asked_once(hub):
    hub.answer_always = 503
    with pytest.raises(HeadMapError, match="503; try again later"):
        HeadMap.from_pretrained("user/map")
    with pytest.raises(ConnectionError, match="503"):
        find_generator("user/model")
    assert len(hub.requests) == 2


@pytest.mark.parametrize("name", HOSTILE, ids=[f"{number}" for number in range(len(HOSTILE))])
def test_names_that_cannot_be_names_give_the_documented_error(hub, tmp_path, name):
    folder = MAP.save_pretrained(tmp_path / "map")
    calls = {
        "source": lambda: HeadMap.from_pretrained(name),
        "subfolder": lambda: HeadMap.from_pretrained(folder, subfolder=name),
        "subfolder of a repository": lambda: HeadMap.from_pretrained("user/map", subfolder=name),
        "revision": lambda: HeadMap.from_pretrained("user/map", revision=name),
        "repository": lambda: MAP.push_to_hub(name, token="hf_writer"),
        "branch": lambda: MAP.push_to_hub("user/map", revision=name, token="hf_reader"),
        "find_head_map": lambda: find_head_map(name),
    }
    for what, call in calls.items():
        with pytest.raises(HeadMapError) as caught:
            call()
        assert len(str(caught.value).encode()) < 3000, what
        assert str(caught.value).isprintable(), what
    with pytest.raises(GeneratorError) as refused:
        find_generator(name)
    assert len(str(refused.value).encode()) < 3000
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "x" * 300])
def test_a_folder_that_cannot_be_written_gives_the_documented_error(tmp_path, name):
    with pytest.raises(HeadMapError):
        MAP.save_pretrained(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# Values in messages


VALUES = ["x" * 900_000, {"a": ["\ud800" * 5000]}, "\x1b[2J\x07", 10**5000, ["\u202e", "\n"], b"\xff" * 5000]


@pytest.mark.parametrize("value", VALUES, ids=[f"{number}" for number in range(len(VALUES))])
def test_a_value_is_shown_short_and_printable(value):
    text = shown(value)
    assert 0 < len(text) <= 80
    assert text.isprintable()
    assert text.encode()


def test_a_message_keeps_its_place_and_its_remedy():
    message = str(ReadableError(f"here: {'x' * 900_000}; give less"))
    assert message.startswith("here: xxx")
    assert message.endswith("xxx; give less")
    assert len(message) == 2000
    assert printable("two\nlines, \N{SNOWMAN}, \ud800") == "two\nlines, \N{SNOWMAN}, \\ud800"


def set_encoding(name):
    """As PYTHONIOENCODING does."""
    sys.stdout.reconfigure(encoding=name, errors="strict")
    sys.stderr.reconfigure(encoding=name, errors="backslashreplace")


def test_names_that_no_terminal_shows_do_not_stop_a_command(tmp_path):
    """A path of bytes that are not UTF-8, a map whose model has a name beyond ASCII, an ASCII terminal."""
    name = os.fsdecode(b"map-\xff")
    head_map = HeadMap(torch.tensor([[True, False]]), (4, 6), model_id="\N{SNOWMAN}/model", method="caf\xe9")
    head_map.save_pretrained(tmp_path / name)
    for source, encoding, code in ((name, "ascii", 0), (f"./no-{name}", "utf-8", 2)):
        process = Forked("inspect", source, cwd=tmp_path, before=partial(set_encoding, encoding))
        stdout, stderr = process.communicate()
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr
        assert "map-" in stdout + stderr


def test_the_bundled_model_needs_no_hub(nowhere):
    assert find_generator("shapes-janus").source == str(BUNDLED_MODELS["shapes-janus"].folder)
