"""Files that anyone may have written: every format is read whole or refused with its documented error, before any work.

Each file is first written by the library itself and then changed, by a seed. What the numbers mean is tested elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hostile import mutants
from helpers.tiny_checkpoint import SIDE, write_checkpoint
from PIL import Image

from ssd_cache import HeadMap, HeadMapError, SSDCache, learn_score, profile_heads
from ssd_cache.evaluation.comparing import read_results
from ssd_cache.evaluation.export import ExportError, claim_folder, read_settings
from ssd_cache.evaluation.fidelity import measure_divergence, measure_fidelity
from ssd_cache.evaluation.results_folder import Record, ResultsError, ResultsFolder
from ssd_cache.evaluation.scoring import judge_files
from ssd_cache.evaluation.tables import read_summary, to_json, to_markdown, write_report
from ssd_cache.io.showing import ReadableError
from ssd_cache.models import find_generator
from ssd_cache.runs.run_state import ProfilingError

PROMPTS = ["a photo of a red circle", "a photo of two triangles"]
QUIET = {"progress": False, "batch_size": 2}
NORMAL, MANY = 60, 1500
LONGEST = 2200
"""Characters of a message: 2000 of the library's own, and what a caller puts around it."""


class WouldGenerate(Exception):
    """The file was accepted, and there is work left."""


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), guidance_scale=2.0)
    return find_generator(str(checkpoint)).load("float32", "cpu")


@pytest.fixture(scope="module")
def profiled(generator):
    return profile_heads(generator, PROMPTS, budget=24, levels=(16,), num_recent=0.5, **QUIET)


@dataclass
class Format:
    """A file that the library wrote at `path`, how it is read back, and the errors that reading documents."""

    path: Path
    read: Callable[[], Any]
    errors: tuple[type[Exception], ...]
    names_file: bool = True
    prepare: Callable[[], None] = lambda: None
    """What is done to a hostile version before it is read."""


@pytest.fixture
def formats(generator, profiled, tmp_path, request) -> Format:
    return {
        "profile": _profile,
        "learn": _learn,
        "fit": _fit,
        "fidelity": _fidelity,
        "head map config": _map_config,
        "head map tensors": _map_tensors,
        "shapes run": _shapes_run,
        "shapes lines": _shapes_lines,
        "export": _export,
        "results of images": _scoring,
        "compared results": _compared,
    }[request.param](generator, profiled, tmp_path)


FORMATS = (
    *(
        "profile",
        "learn",
        "fit",
        "fidelity",
        "head map config",
        "head map tensors",
        "shapes run",
        "shapes lines",
        "export",
    ),
    *("results of images", "compared results"),
)


def _profile(generator, profiled, tmp_path):
    path = tmp_path / "profile"

    def read():
        return profile_heads(generator, PROMPTS, state_file=path, **QUIET)

    read()
    return Format(path, read, (ProfilingError,))


def _learn(generator, profiled, tmp_path):
    path = tmp_path / "learn"
    head_map = HeadMap(torch.tensor([[False, True], [False, False]]), (SIDE, SIDE))

    def read():
        return learn_score(generator, PROMPTS, head_map, budget=24, buffer=5, num_steps=1, state_file=path, **QUIET)

    read()
    return Format(path, read, (ProfilingError,))


def _fit(generator, profiled, tmp_path):
    path = tmp_path / "fit"

    def read():
        return measure_divergence(generator, PROMPTS, profiled, state_file=path, **QUIET)

    read()
    return Format(path, read, (ProfilingError,))


def _fidelity(generator, profiled, tmp_path):
    path = tmp_path / "fidelity"

    def read():
        caches = {name: lambda: SSDCache(profiled, 24, buffer=5) for name in ("one", "other")}
        return measure_fidelity(generator, PROMPTS, caches, batch_size=1, state_file=path)

    read()
    return Format(path, read, (ProfilingError,))


def _saved_map(profiled, tmp_path):
    return profiled.save_pretrained(tmp_path / "map")


def _sign(folder):
    """Give a changed pair of files the right checksum, by the format's documentation, where it still is an object."""
    config, tensors = folder / "config.json", folder / "head_map.safetensors"
    with suppress(ValueError, RecursionError):
        facts = json.loads(config.read_bytes())
        if isinstance(facts, dict):
            facts.pop("sha256", None)
            canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
            facts["sha256"] = hashlib.sha256(canonical.encode() + tensors.read_bytes()).hexdigest()
            config.write_text(json.dumps(facts))


def _map_config(generator, profiled, tmp_path):
    folder = _saved_map(profiled, tmp_path)
    read, sign = lambda: HeadMap.from_pretrained(folder), lambda: _sign(folder)
    return Format(folder / "config.json", read, (HeadMapError,), names_file=False, prepare=sign)


def _map_tensors(generator, profiled, tmp_path):
    folder = _saved_map(profiled, tmp_path)
    read, sign = lambda: HeadMap.from_pretrained(folder), lambda: _sign(folder)
    return Format(folder / "head_map.safetensors", read, (HeadMapError,), names_file=False, prepare=sign)


def _record(prompt, correct=True):
    reason = "" if correct else "expected 1 circle, found nothing"
    caption = "a photo of a circle"
    return Record("full", {}, 1.0, 576, "0123", 0, prompt, "single_object", caption, correct, reason)


RUN: dict[str, Any] = {
    "conditions": {
        "bench": "shapes",
        "grid": [24, 24],
        "num_per_kind": 1,
        "prompt_seed": 1,
        "batch_size": 4,
        "settings": {},
        "guidance_scale": 3.0,
        "temperature": 1.0,
        "dtype": "float32",
        "device": "cpu",
    },
    "policies": {"full": {"settings": {}, "slots": {"1.0": 576}, "head_map": "0123"}},
    "command": {"model": "shapes-janus", "head_map": None},
}


def _shapes(tmp_path):
    folder = tmp_path / "run"
    with ResultsFolder(folder, RUN) as results:
        results.append([_record(number, number != 1) for number in range(3)])
    return folder


def _shapes_run(generator, profiled, tmp_path):
    folder = _shapes(tmp_path)

    def read():
        ResultsFolder(folder, RUN).close()
        write_report(read_summary([folder])[0], tmp_path / "report")

    return Format(folder / "run.json", read, (ResultsError,), names_file=False)


def _shapes_lines(generator, profiled, tmp_path):
    folder = _shapes(tmp_path)

    def read():
        with suppress(ResultsError):  # no line that can be read
            summary, _ = read_summary([folder])
            json.dumps(to_json(summary), allow_nan=False)
            to_markdown(summary).encode()
        with ResultsFolder(folder, RUN) as results:
            results.append([_record(number, number != 1) for number in range(3)])

    return Format(folder / "results-0.jsonl", read, (ResultsError,))


SETTINGS = {"format": "ssd-cache geneval export 1", "model": "m", "budget": 0.2, "seed": 0, "grid": [24, 24]}


def _export(generator, profiled, tmp_path):
    root = tmp_path / "images"
    claim_folder(root, SETTINGS, "{}\n")

    def read():
        read_settings(root)
        claim_folder(root, SETTINGS, "{}\n")

    return Format(root / "settings.json", read, (ExportError,), names_file=False)


JUDGE = {"benchmark": "GenEval", "detector": "d", "rules": {"threshold": 0.3}}


def _result_lines(tmp_path):
    """A file of results, and a function that judges the same images again."""
    path, files = tmp_path / "results.jsonl", []
    for number in range(3):
        image = tmp_path / f"0000{number}.png"
        Image.new("RGB", (2, 2)).save(image)
        files.append((image, {"filename": image.name, "tag": "colors", "metadata": "0"}))
    judge_files(files, lambda number, image: {"result": float(number > 0)}, JUDGE, path)

    def would_generate(number, image):
        raise WouldGenerate

    return path, lambda: json.dumps(judge_files(files, would_generate, JUDGE, path))


def _scoring(generator, profiled, tmp_path):
    path, judge_again = _result_lines(tmp_path)
    return Format(path, judge_again, (ValueError,))


def _compared(generator, profiled, tmp_path):
    path, _ = _result_lines(tmp_path)
    return Format(path, lambda: read_results(path), (ValueError,))


def attack(one: Format, generator, number: int, seed: int) -> int:
    """Read hostile versions of a file; returns how many were refused."""
    good, refused = one.path.read_bytes(), []
    with pytest.MonkeyPatch.context() as patch:

        def would_generate(*_, **__):
            raise WouldGenerate

        patch.setattr(type(generator), "generate", would_generate)
        for index, hostile in enumerate(mutants(good, number, seed)):
            one.path.write_bytes(hostile)
            one.prepare()
            written = one.path.read_bytes()
            unchanged = True
            try:
                one.read()
            except WouldGenerate:
                pass
            except one.errors as error:
                refused.append((index, error))
                unchanged = one.path.read_bytes() == written
            except Exception as error:
                error.add_note(f"mutant {index} of seed {seed}: {hostile[:300]!r}")
                raise
            assert unchanged, "a file that is refused stays as it is"
    for index, error in refused:
        message = str(error)
        assert isinstance(error, ReadableError), (index, type(error), message[:300])
        assert message.encode(), index
        assert len(message) <= LONGEST, (index, len(message), message[:300])
        assert all(char.isprintable() or char == "\n" for char in message), (index, message)
        assert not one.names_file or one.path.name in message, (index, message)
    return len(refused)


@pytest.mark.parametrize("formats", FORMATS, indirect=True)
def test_hostile_versions_of_a_file_are_read_or_refused(formats, generator):
    assert attack(formats, generator, NORMAL, seed=1) > NORMAL // 6


@pytest.mark.slow
@pytest.mark.parametrize("formats", FORMATS, indirect=True)
def test_many_hostile_versions_of_a_file_are_read_or_refused(formats, generator):
    attack(formats, generator, MANY, seed=2)
