"""Long commands that are interrupted or killed in the middle of their work, and resumed by the same command.

Real processes and real signals, with a small model. How each state is made of parts is tested beside its function.
"""

from __future__ import annotations

import json
import signal

import pytest
import torch
from helpers.interrupting import ENDS, interrupt
from helpers.tiny_checkpoint import SIDE, write_checkpoint
from typer.testing import CliRunner

from ssd_cache import HeadMap, fit_heads, learn_score, profile_heads
from ssd_cache.cli import app
from ssd_cache.evaluation.fidelity import divergence, measure, measure_divergence
from ssd_cache.models import find_generator
from ssd_cache.profiling import measuring
from ssd_cache.profiling.state import FORMAT as PROFILE
from ssd_cache.runs.run_state import is_finished, read_state
from ssd_cache.training.learning_state import FORMAT, WHAT

PROMPTS = ["a photo of a red circle", "a photo of a circle left of a blue square", "a photo of two triangles"]


def slow(how):
    return pytest.param(how, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), guidance_scale=2.0)


@pytest.fixture(scope="module")
def generator(checkpoint):
    return find_generator(str(checkpoint)).load("float32", "cpu")


@pytest.fixture(scope="module")
def profiled(generator, tmp_path_factory):
    head_map = profile_heads(generator, PROMPTS, budget=24, levels=(16, 40), num_recent=0.5, progress=False)
    return HeadMap.from_pretrained(head_map.save_pretrained(tmp_path_factory.mktemp("maps") / "profiled"))


def ended(how, code, stderr, state):
    """Whether a run ended as its signal asks for."""
    assert code == ENDS[how], stderr
    if how != signal.SIGKILL:
        last = stderr.strip().splitlines()[-1]
        assert last == f"ssd-cache: interrupted; {state} keeps the finished parts: run the same command again to resume"
        assert "Traceback" not in stderr


@pytest.mark.parametrize("how", [signal.SIGKILL, slow(signal.SIGINT)])
def test_fit_goes_on_after_the_last_pass(checkpoint, generator, profiled, tmp_path, monkeypatch, how):
    output, state = tmp_path / "fitted", tmp_path / "fitted.state"
    command = ["fit", *PROMPTS, "--model", str(checkpoint), "--head-map", profiled.origin]
    command += ["--budget", "24", "--batch-size", "1", "--levels", "16,40", "-o", str(output)]

    def finished() -> int:
        if not state.exists():
            return 0
        tensors = read_state(state, divergence.FORMAT, divergence.WHAT).tensors
        return sum(int(tensor.sum()) for name, tensor in tensors.items() if name.startswith("done."))

    ended(how, *interrupt(command, lambda: finished() >= 3, how), state)
    kept, total = finished(), 2 * 4 * len(PROMPTS)
    assert 3 <= kept < total
    assert not output.exists()
    heads, real = [], divergence.compare_caches
    monkeypatch.setattr(
        divergence, "compare_caches", lambda *args, **kwargs: heads.extend(args[2]) or real(*args, **kwargs)
    )
    generated = []
    generate = type(generator).generate

    def counted(self, prompts, cache=None, **settings):
        generated.append(cache)
        return generate(self, prompts, cache, **settings)

    monkeypatch.setattr(type(generator), "generate", counted)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert len(heads) == total - kept
    assert None not in generated  # images are not generated again
    levels = {"levels": [16, 40]}
    expected = fit_heads(measure_divergence(generator, PROMPTS, profiled, batch_size=1, progress=False, **levels), 24)
    assert HeadMap.from_pretrained(output) == expected
    assert is_finished(state)
    # another budget needs no further measurement
    heads.clear()
    result = CliRunner().invoke(app, [*command, "--budget", "30"])
    assert result.exit_code == 0, result.output
    assert not heads


@pytest.mark.parametrize("how", [signal.SIGINT, slow(signal.SIGKILL)])
def test_learn_goes_on_to_the_same_score(checkpoint, generator, tmp_path, monkeypatch, how):
    labels = HeadMap(torch.tensor([[False, True], [False, False]]), (SIDE, SIDE))
    source, output = labels.save_pretrained(tmp_path / "labels"), tmp_path / "learned"
    state, steps = tmp_path / "learned.state", 40
    command = ["learn", *PROMPTS, "--model", str(checkpoint), "--head-map", str(source), "--budget", "24"]
    command += ["--buffer", "5", "--batch-size", "2", "--steps", str(steps), "-o", str(output)]

    def is_ready() -> bool:
        return state.exists() and "before" in read_state(state, FORMAT, WHAT).tensors

    ended(how, *interrupt(command, is_ready, how), state)
    assert not output.exists()
    generate = type(generator).generate

    def fails(self, prompts, cache=None, **settings):
        assert cache is not None, "an image is generated again"
        return generate(self, prompts, cache, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "generate", fails)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "divergence on 8 held-out images" in result.output
    settings = {"budget": 24, "buffer": 5, "batch_size": 2, "num_steps": steps, "progress": False}
    assert HeadMap.from_pretrained(output) == learn_score(generator, PROMPTS, labels, **settings)
    assert is_finished(state)


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_profile_goes_on_after_the_last_batch_and_takes_more_prompts(checkpoint, generator, tmp_path, monkeypatch, how):
    output, state = tmp_path / "map", tmp_path / "map.state"
    prompts, options = PROMPTS * 8, ["--model", str(checkpoint), "--budget", "24", "--batch-size", "2"]
    command = ["profile", *prompts, *options, "-o", str(output)]

    def num_batches() -> int:
        return read_state(state, PROFILE, "").counts["num_batches"] if state.exists() else 0

    ended(how, *interrupt(command, lambda: num_batches() >= 2, how), state)
    kept, generated = num_batches(), []
    assert 2 <= kept < 12
    assert not output.exists()
    generate = type(generator).generate
    monkeypatch.setattr(
        type(generator),
        "generate",
        lambda self, *args, **kwargs: generated.append(1) or generate(self, *args, **kwargs),
    )
    for more in (0, 2):
        generated.clear()
        texts = [*prompts, *PROMPTS[:more]]
        result = CliRunner().invoke(app, ["profile", *texts, *options, "-o", str(output)])
        assert result.exit_code == 0, result.output
        assert len(generated) == (1 if more else 12 - kept)
        expected = profile_heads(generator, texts, budget=24, batch_size=2, progress=False)
        assert HeadMap.from_pretrained(output) == expected


def test_a_finished_state_of_other_settings_is_replaced_in_the_default_place_alone(checkpoint, tmp_path):
    command = ["profile", *PROMPTS, "--model", str(checkpoint), "--budget", "24", "-o", str(tmp_path / "map")]
    assert CliRunner().invoke(app, command).exit_code == 0
    state = tmp_path / "map.state"
    first = state.read_bytes()
    result = CliRunner().invoke(app, [*command, "--seed", "1", "--resume", str(state)])
    assert result.exit_code == 2
    assert "seed 0 there, 1 now" in result.output
    assert state.read_bytes() == first
    assert CliRunner().invoke(app, [*command, "--seed", "1"]).exit_code == 0
    assert state.read_bytes() != first


def test_an_unfinished_state_of_other_settings_is_never_replaced(checkpoint, tmp_path, monkeypatch):
    command = ["profile", *PROMPTS, "--model", str(checkpoint), "--budget", "24", "--batch-size", "1"]
    command += ["-o", str(tmp_path / "map")]
    real, calls = measuring.save_state, []

    def stops(*args, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "save_state", stops)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "keeps the finished parts: run the same command again to resume" in " ".join(result.output.split())
    result = CliRunner().invoke(app, [*command, "--seed", "1"])
    assert result.exit_code == 2
    assert "seed 0 there, 1 now" in result.output


@pytest.mark.parametrize("how", [signal.SIGINT, slow(signal.SIGKILL)])
def test_eval_fidelity_goes_on_after_the_last_part(checkpoint, generator, tmp_path, monkeypatch, how):
    output, state = tmp_path / "out", tmp_path / "out.state"
    command = ["eval", "fidelity", *PROMPTS, "--model", str(checkpoint), "--budgets", "24", "--buffer", "4"]
    command += ["--num-images", "7", "--batch-size", "1", "--policies", "ssd", "-o"]

    def num_done() -> int:
        return int(read_state(state, measure.FORMAT, "").tensors["num_done"]) if state.exists() else 0

    ended(how, *interrupt([*command, str(output)], lambda: num_done() >= 2, how), state)
    kept, calls, real = num_done(), [], measure.compare_caches
    assert 2 <= kept < 7
    assert not output.exists()
    monkeypatch.setattr(measure, "compare_caches", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    for place in (output, tmp_path / "whole"):
        calls.clear()
        result = CliRunner().invoke(app, [*command, str(place)])
        assert result.exit_code == 0, result.output
        assert len(calls) == (7 - kept if place == output else 7)
    one, whole = (json.loads((place / "fidelity.json").read_text()) for place in (output, tmp_path / "whole"))
    assert (one["tokens"], one["results"]) == (whole["tokens"], whole["results"])
