"""State files and folders of long runs: a changed one is resumed, or refused before any image is generated.

Each is first written by the run itself, finished or interrupted, and read by the same call again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzzing import WouldWork, check_both, fuzz_file
from helpers.tiny_checkpoint import SIDE, write_checkpoint

from ssd_cache import HeadMap, SSDCache, learn_score, profile_heads
from ssd_cache.evaluation.fidelity import measure_divergence, measure_fidelity
from ssd_cache.models import find_generator
from ssd_cache.preparing.check import check_fidelity
from ssd_cache.preparing.state import StateFolder
from ssd_cache.runs.metering import Cost
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.run_state import ProfilingError

PROMPTS = ["a photo of a red circle", "a photo of two triangles"]
QUIET = {"progress": False, "batch_size": 2}


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), guidance_scale=2.0)
    return find_generator(str(checkpoint)).load("float32", "cpu")


@pytest.fixture(scope="module")
def profiled(generator):
    return profile_heads(generator, PROMPTS, budget=24, levels=(16,), num_recent=0.5, **QUIET)


@dataclass
class Format:
    """A file that a run wrote at `path`, and the call that wrote it and reads it back."""

    path: Path
    read: Callable[[], Any]


@pytest.fixture
def run(generator, profiled, tmp_path, request) -> Format:
    return request.param(generator, profiled, tmp_path)


def _profile(generator, profiled, tmp_path):
    path = tmp_path / "profile"
    return Format(path, lambda: profile_heads(generator, PROMPTS, state_file=path, **QUIET))


def _learn(generator, profiled, tmp_path):
    path = tmp_path / "learn"
    head_map = HeadMap(torch.tensor([[False, True], [False, False]]), (SIDE, SIDE))

    def read():
        return learn_score(generator, PROMPTS, head_map, budget=24, buffer=5, num_steps=1, state_file=path, **QUIET)

    return Format(path, read)


def _fit(generator, profiled, tmp_path):
    path = tmp_path / "fit"
    return Format(path, lambda: measure_divergence(generator, PROMPTS, profiled, state_file=path, **QUIET))


def _fidelity(generator, profiled, tmp_path):
    path = tmp_path / "fidelity"

    def read():
        caches = {name: lambda: SSDCache(profiled, 24, buffer=5) for name in ("one", "other")}
        return measure_fidelity(generator, PROMPTS, caches, batch_size=1, state_file=path)

    return Format(path, read)


def _check(generator, profiled, tmp_path):
    options = {"batch_size": 2, "progress": False, "seed": 0, "guidance_scale": 2.0, "temperature": 1.0}

    def read():
        folder = StateFolder(tmp_path)
        return check_fidelity(
            generator, PROMPTS, profiled, [0.5, 1.0], folder=folder, processes=Processes(), **options
        ).profile["fidelity"]

    return Format(tmp_path / "check-0.json", read)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (_profile, "state of profile"),
        (_learn, "state of learn"),
        (_fit, "state of fit"),
        (_fidelity, "state of fidelity"),
    ],
    indirect=["run"],
    ids=["profile", "learn", "fit", "fidelity"],
)
def test_a_changed_state_is_resumed_or_refused(run, name, generator, monkeypatch):
    run.read()

    def work(*_, **__):
        raise WouldWork

    monkeypatch.setattr(type(generator), "generate", work)
    check_both(fuzz_file(name, run.path, run.read, errors=(ProfilingError,)))


@pytest.mark.parametrize("run", [_check], indirect=True)
def test_a_changed_check_of_a_preparation_is_used_or_measured_again(run, generator, monkeypatch):
    before = run.read()

    def work(*_, **__):
        raise WouldWork

    monkeypatch.setattr(type(generator), "generate", work)

    def read():
        found = run.read()
        assert found.keys() == before.keys()
        assert [point["budget"] for point in found["curve"]] == [0.5, 1.0]

    fuzz_file("check of a preparation", run.path, read, errors=())


def test_a_changed_plan_is_read_or_refused(tmp_path):
    folder = StateFolder(tmp_path)
    folder.begin({"model": "m", "budget": 0.2, "prompts": ["a", "b"]})
    folder.finished["profile"] = ""
    folder.add_cost("profile", Cost(1.5, 100))

    def read():
        folder = StateFolder(tmp_path)
        folder.begin({"model": "m", "budget": 0.2, "prompts": ["a", "b"]})
        folder.add_cost("profile", Cost(1.5, None))
        folder.result("profile", None)

    check_both(fuzz_file("plan of a preparation", folder.path / "plan.json", read, errors=(ProfilingError,)))
