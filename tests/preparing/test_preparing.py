"""`prepare` and `ssd-cache prepare`: the stages, what is kept after an interruption, the plan, and what is refused.

The model is a small random Janus whose folder has prompts. What each stage measures is tested beside its function.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.children import run_two
from helpers.failing import fail_on_full_disk, one_line
from helpers.interrupting import ENDS, interrupt, kill_in_call
from helpers.tiny_checkpoint import write_checkpoint, write_family
from typer.testing import CliRunner

from ssd_cache import HeadMap, SSDCache, fit_heads, learn_score, prepare, profile_heads
from ssd_cache.cli import app
from ssd_cache.evaluation.fidelity import measure_fidelity
from ssd_cache.head_map.card import card
from ssd_cache.io.showing import shown
from ssd_cache.models import Checkpoint, find_generator
from ssd_cache.preparing import stages
from ssd_cache.prompts import PROMPTS_FILE
from ssd_cache.runs import limits
from ssd_cache.runs.metering import metered
from ssd_cache.runs.plan import duration
from ssd_cache.runs.run_state import ProfilingError, is_finished, read_state
from ssd_cache.shapes import make_prompts
from ssd_cache.training.learning_state import FORMAT as LEARNING

PROMPTS = list(dict.fromkeys(caption for _, caption in make_prompts(6, 3)))[:26]
SIDE, BUDGET = 6, 14
CELLS = SIDE * SIDE
SETTINGS = {"budget": BUDGET, "num_steps": 4, "batch_size": 5, "seed": 3}
OPTIONS = ["--budget", str(BUDGET), "--steps", "4", "--batch-size", "5", "--seed", "3"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:after an eviction a spatial head"),
    pytest.mark.filterwarnings("ignore:level "),
]

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_checkpoint(folder, guidance_scale=2.0, with_head_map=False, side=SIDE)
    (folder / PROMPTS_FILE).write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def generator(checkpoint):
    return find_generator(str(checkpoint)).load("float32", "cpu")


@pytest.fixture(scope="module")
def whole(generator, tmp_path_factory):
    """An uninterrupted preparation: its folder and its map."""
    output = tmp_path_factory.mktemp("whole") / "map"
    return output, prepare(generator, output, progress=False, **SETTINGS)


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """The command line on the small model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, options=OPTIONS):
        return CliRunner().invoke(app, ["prepare", str(checkpoint), "-o", "map", *options, *arguments])

    return run


@pytest.fixture
def no_images(monkeypatch, generator):
    """Fail when an image is generated."""

    def fails(*args, **kwargs):
        raise AssertionError("an image is generated again")

    monkeypatch.setattr(type(generator), "generate", fails)


def test_the_map_is_what_the_stages_make_one_by_one(generator, whole):
    output, prepared = whole
    sampling = {"guidance_scale": 2.0, "temperature": 1.0, "seed": 3, "progress": False}
    used, left = PROMPTS[:-8], PROMPTS[-8:]
    levels = [min(1.0, BUDGET / CELLS * times) for times in stages.LEVELS]
    profiled = profile_heads(generator, used, budget=BUDGET, levels=levels, batch_size=5, **sampling)
    settings = {"learn_slots": True, "num_steps": 4, "learning_rate": stages.LEARNING_RATE, "batch_size": 4}
    learned = learn_score(generator, used, fit_heads(profiled, BUDGET), **settings, **sampling)
    assert HeadMap.from_pretrained(output) == prepared
    assert prepared.digest == learned.digest
    assert prepared.slots == learned.slots
    assert prepared.scores.keys() == learned.scores.keys()
    fidelity = prepared.profile["fidelity"]
    assert prepared.profile == {**learned.profile, "fidelity": fidelity}
    budgets = [point["budget"] for point in fidelity["curve"]]
    assert budgets == sorted(budgets)
    assert BUDGET / CELLS in budgets
    divergences = []
    for index, batch in enumerate((left[:5], left[5:])):
        caches = {"own": lambda: SSDCache(learned, BUDGET)}
        found = measure_fidelity(generator, batch, caches, **{**sampling, "seed": 3 + index})
        divergences.append(found["own"].kl.mean(1))
    point = next(point for point in fidelity["curve"] if point["budget"] == BUDGET / CELLS)
    values = torch.cat(divergences)
    assert point["kl"] == pytest.approx(values.mean().item())
    assert point["kl_standard_error"] == pytest.approx(values.std().item() / 8**0.5)
    assert fidelity["num_images"] == 8


def test_other_slots_and_another_score_leave_the_fidelity_curve_out(generator, whole):
    prepared = whole[1]
    options = {"num_steps": 1, "batch_size": 4, "guidance_scale": 2.0, "temperature": 1.0, "progress": False}
    for changed in (fit_heads(prepared, 18), learn_score(generator, PROMPTS[:12], prepared, **options)):
        assert prepared.profile["fidelity"]
        assert changed.profile.keys() == prepared.profile.keys() - {"fidelity"}
        assert "Fidelity" not in card(changed, "user/map")


def test_the_folder_has_a_card_and_a_page_with_the_fidelity_curve(whole):
    output, prepared = whole
    names = {"README.md", "config.json", "head_map.png", "head_map.safetensors", "report.html"}
    assert {path.name for path in output.iterdir()} == names
    card, page = (output / "README.md").read_text(), (output / "report.html").read_text()
    curve = prepared.profile["fidelity"]["curve"]
    for point in curve:
        value = f"{point['kl']:.4f} ± {point['kl_standard_error']:.4f}"
        assert f"| {point['budget']:.0%} | {value} | {point['agreement']:.2%} | {point['retained']:.1%} |" in card
        assert f"<td>{value}</td>" in page
    assert f"with ssd_cache.enable(model, &#34;{output}&#34;):" in page
    for stage in stages.STAGES:
        assert f"<td>{stage}</td>" in page
    assert "http" not in page.replace("http-equiv", "")
    assert f"{prepared.profile['learning']['held_out']['after']:.4f} nats" in page


@pytest.mark.parametrize(
    "facts",
    [
        *(None, "<b>", [], {}, {"curve": 3}, {"curve": []}, {"curve": [{"budget": "0.2"}]}),
        {"curve": [{"budget": 0.2, "kl": 0.1, "agreement": 1.0, "retained": 1.0, "more": 1}]},
    ],
)
def test_facts_of_the_same_name_from_elsewhere_are_not_a_curve(facts):
    head_map = HeadMap(torch.tensor([[True]]), profile={"fidelity": facts})
    assert "## Fidelity" not in card(head_map, "me/map")


def test_a_curve_from_elsewhere_is_escaped():
    point = {"budget": 0.2, "kl": 0.1, "agreement": 1, "retained": 0.5}
    head_map = HeadMap(torch.tensor([[True]]), profile={"fidelity": {"curve": [point], "num_images": "<b>8</b>"}})
    section = card(head_map, "me/map").partition("## Fidelity")[2].partition("## How")[0]
    assert "| 20% | 0.1000 | 100.00% | 50.0% |" in section
    assert "<b>" not in section


def test_a_finished_run_is_not_run_again(generator, whole, no_images):
    output, prepared = whole
    for file in output.iterdir():
        file.unlink()
    plans = []
    again = prepare(generator, output, progress=False, on_plan=plans.append, **SETTINGS)
    assert again == HeadMap.from_pretrained(output) == prepared
    assert all(estimate.is_finished for estimate in plans[0].estimates)
    assert "nothing left to do" in plans[0].text()


def test_learning_can_follow_a_quick_run(generator, whole, tmp_path, monkeypatch):
    output, calls = tmp_path / "map", []
    quick = prepare(generator, output, progress=False, stages=stages.QUICK, **SETTINGS)
    assert quick.learned is None
    assert HeadMap.from_pretrained(output).learned is None
    assert quick.profile["fidelity"]["curve"] != whole[1].profile["fidelity"]["curve"]
    monkeypatch.setattr(stages, "profile_heads", calls.append)
    assert prepare(generator, output, progress=False, **SETTINGS) == whole[1]
    assert not calls


def test_a_stage_brings_those_that_it_needs(run, monkeypatch):
    result = run("--stages", "fit")
    assert result.exit_code == 0, result.output
    assert HeadMap.from_pretrained("map").method == "fit"
    assert "fidelity" not in HeadMap.from_pretrained("map").profile
    assert [line.split()[0] for line in result.stdout.splitlines()[2:4]] == ["profile", "fit"]


def _images_learned(state) -> bool:
    return state.exists() and len([name for name in read_state(state, LEARNING, "").tensors if "images" in name]) >= 1


READY = {
    "profile": lambda folder: (folder / "profile.state").exists(),
    "learn": lambda folder: _images_learned(folder / "learn.state"),
    "steps": lambda folder: (
        _images_learned(folder / "learn.state") and "before" in read_state(folder / "learn.state", LEARNING, "").tensors
    ),
    "check": lambda folder: (folder / "check-0.json").exists(),
}


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("profile", signal.SIGINT),
        ("learn", signal.SIGKILL),
        pytest.param("steps", signal.SIGTERM, marks=pytest.mark.slow),
        ("check", signal.SIGKILL),
        pytest.param("profile", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("learn", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("check", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_with_the_same_map(checkpoint, whole, tmp_path, monkeypatch, stage, how):
    folder = tmp_path / "map.state"
    command = ["prepare", str(checkpoint), "-o", str(tmp_path / "map"), *OPTIONS]
    code, stderr = interrupt(command, lambda: READY[stage](folder), how)
    assert code == ENDS[how], stderr
    if how != signal.SIGKILL:
        last = stderr.strip().splitlines()[-1]
        expected = f"interrupted; {folder} keeps the finished parts: run the same command again to resume"
        assert last == f"ssd-cache: {expected}"
    assert not (tmp_path / "map").exists()
    calls, real = [], stages.profile_heads
    monkeypatch.setattr(stages, "profile_heads", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert len(calls) == (0 if stage != "profile" else len(calls))
    assert HeadMap.from_pretrained(tmp_path / "map") == whole[1]
    assert is_finished(folder / "learn.state")


@pytest.mark.parametrize(("number", "taken"), [(1, None), (5, 2)], ids=["measuring", "learning"])
def test_a_run_that_is_killed_in_a_training_step_ends_with_the_same_map(checkpoint, whole, tmp_path, number, taken):
    """A run takes two steps to measure them, then four to learn."""
    folder = tmp_path / "map.state"
    command = ["prepare", str(checkpoint), "-o", str(tmp_path / "map"), *OPTIONS]
    code, stderr = kill_in_call(command, "ssd_cache.training.trainer:Trainer.step", number, save_seconds=0)
    assert code == -signal.SIGKILL, stderr
    costs = json.loads((folder / "plan.json").read_text())["costs"]
    assert "first batch" in costs
    assert ("step" in costs) == (folder / "learn.state").exists() == (taken is not None)
    if taken is not None:
        assert read_state(folder / "learn.state", LEARNING, "").counts["num_steps"] == taken
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert HeadMap.from_pretrained(tmp_path / "map") == whole[1]


def test_a_disk_that_is_full_after_every_few_writes_loses_nothing(run, whole, monkeypatch):
    failed = fail_on_full_disk(monkeypatch, run, num_writes=9, most=30)
    assert 3 <= failed < 30
    assert HeadMap.from_pretrained("map") == whole[1]


def test_the_plan_comes_first_and_says_what_is_measured(run, checkpoint):
    result = run("--quick")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{checkpoint} on cpu: about ")
    assert lines[1].split() == ["stage", "images", "time", "peak", "memory"]
    assert [line.split()[:2] for line in lines[2:5]] == [["profile", "18"], ["fit", "-"], ["check", "8"]]
    assert lines[-2:] == ['with ssd_cache.enable(model, "map"):', lines[-1]]
    plan = json.loads(Path("map.state/plan.json").read_text())
    assert 0 < plan["costs"]["first batch"]["seconds"] < 60
    assert {"profile", "fit", "check"} == plan["finished"].keys()


def test_a_run_shows_one_line_in_turn_for_all_stages(run):
    result = run()
    assert result.exit_code == 0
    shown = result.stderr.replace("\r", "\n").split("\n")
    assert any(part.startswith("profile (1 of 4), then about ") and "profiling:" in part for part in shown)
    assert any(part.startswith("learn (3 of 4), then about ") and "learning:" in part for part in shown)
    left = [line.split("\r")[-1].strip() for line in result.stderr.split("\n")]  # finished bars were cleared
    ends = [line.split(" took ")[0] for line in left if " took " in line]
    assert ends == ["profile (1 of 4):", "fit (2 of 4):", "learn (3 of 4):", "check (4 of 4):"]
    assert not [line for line in left if "then about" in line]


def test_the_peak_memory_of_a_block_is_measured():
    with metered(torch.device("cpu")) as before:
        pass
    if before.peak_bytes is None:
        pytest.skip("this system does not report it")
    with metered(torch.device("cpu")) as large:
        many = [torch.ones(1 << 14) for _ in range(1 << 12)]  # the allocator keeps small ones after they are freed
        del many
    with metered(torch.device("cpu")) as after:
        pass
    # pages of other parts of the process may be freed in between: 10% of what is allocated here
    assert large.peak_bytes - before.peak_bytes > 0.9 * 4 * (1 << 26)
    assert large.peak_bytes - after.peak_bytes > 0.9 * 4 * (1 << 26)
    assert large.seconds > 0


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def no_weights(monkeypatch):
    """Fail when weights are loaded."""

    def loads(*args, **kwargs):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(Checkpoint, "load", loads)


def test_a_long_run_needs_yes(run, generator, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr("ssd_cache.cli.prepare.MAX_HOURS", 1e-9)
    line = one_line(run(), 2)
    assert "for its images alone on cpu, more than 1e-09 h: give --yes to run it anyway" in line
    assert not Path("map.state").exists()
    plans = []
    with pytest.raises(ProfilingError, match="is estimated to take .* on cpu, more than 1e-09 h: give --yes"):
        prepare(generator, tmp_path / "map", max_hours=1e-9, progress=False, on_plan=plans.append, **SETTINGS)
    assert not plans


def test_seven_billion_weights_on_a_cpu_are_refused_with_their_time_or_memory(tmp_path, monkeypatch, no_weights):
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32}
    folder = write_checkpoint(tmp_path / "large", with_head_map=False)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {**text, "num_key_value_heads": 32, "vocab_size": 102400, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / PROMPTS_FILE).write_text("\n".join(make_prompts(100)[number][1] for number in range(600)))
    command = ["prepare", str(folder), "-o", str(tmp_path / "map"), "--device", "cpu"]
    monkeypatch.setattr(limits, "free_memory", lambda device: 20 << 30)
    line = one_line(CliRunner().invoke(app, command), 2)
    assert "take about 27.6 GB in float32, and 21.5 GB are free on cpu: give another --device, or --dtype bf" in line
    monkeypatch.setattr("ssd_cache.cli.prepare.MAX_HOURS", 0.1)
    line = one_line(CliRunner().invoke(app, [*command, "--dtype", "bfloat16"]), 2)
    assert re.search(r"is estimated to take [\d.]+ (min|h) for its images alone on cpu, more than 0.1 h", line)


@pytest.mark.parametrize(("family", "grid"), [("janus", None), ("emu3", None), ("glm", (4, 6)), ("llama", (6, 6))])
def test_a_step_is_estimated_for_every_family(family, grid, tmp_path):
    found = find_generator(str(write_family(family, tmp_path / family)), grid)
    one, many = (
        [limits.step_seconds(found, torch.float32, torch.device("cpu"), rows) for _ in range(5)] for rows in (1, 20000)
    )
    assert 0 < min(one) < min(many) < 60  # other work on the machine may take longer than a product of one row


def test_images_with_a_draft_grid_have_no_learned_score(tmp_path):
    found = find_generator(str(write_family("glm", tmp_path / "glm")), (4, 6)).load("float32", "cpu")
    with pytest.raises(ValueError, match="has draft grids, and a score is learned .* --quick .* leaves learning out"):
        prepare(found, tmp_path / "map", PROMPTS, budget=0.5, progress=False)


def test_bad_input_is_refused_before_weights_are_loaded(run, tmp_path, no_weights):
    (tmp_path / "few.txt").write_text("\n".join(PROMPTS[:7]))
    (tmp_path / "alike.txt").write_text("A red  circle\na red circle\n" * 40)
    for arguments, message in (
        (("--prompts-file", "few.txt"), "7 prompts, "),
        (("--prompts-file", "alike.txt"), "80 prompts, 1 of them different: give at least 24 different ones"),
        (("--prompts-file", "none.txt"), "cannot read --prompts-file none.txt"),
        (("--quick", "--stages", "fit"), "--quick and --stages both choose the stages"),
        (("--temperature", "0"), "temperature=0 leaves one token"),
        (("--stages", "profile,train"), "stage 'train' is unknown: give some of profile, fit, learn, check"),
        (("--stages", "fit,"), "stage '' is unknown"),
        (("--budget", "6"), "6 slots are fewer than buffer=6"),
        (("--push", "me/my/map"), "--push 'me/my/map' cannot be the name of a repository: give USER/REPO"),
        (("--budget", str(CELLS)), "no head of this map ranks tokens at this budget"),
    ):
        assert message in one_line(run(*arguments), 2)
    glm = write_family("glm", tmp_path / "glm")
    result = CliRunner().invoke(app, ["prepare", str(glm), "--grid", "4x6", "-o", "map"])
    assert "has draft grids, and a score is learned" in one_line(result, 2)
    assert not Path("map.state").exists()
    llama = write_family("llama", tmp_path / "llama")
    result = CliRunner().invoke(app, ["prepare", str(llama), "-o", "map"])
    assert "of type 'llama'; ssd-cache supports" in one_line(result, 2)


def test_settings_that_a_stage_would_refuse_are_refused_before_it(generator, tmp_path, no_images, monkeypatch):
    for settings, message in (
        ({"stages": ("profile", "train")}, "stage 'train' is unknown: give some of profile, fit, learn, check"),
        ({"stages": ()}, "stages is empty"),
        ({"budget": 6}, "6 slots are fewer than buffer=6"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"temperature": 0.0}, "temperature=0 leaves one token"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(generator, tmp_path / "map", progress=False, **{**SETTINGS, **settings})
    assert not (tmp_path / "map.state").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "ssd-cache prepare 0"}, "not the plan of ssd-cache prepare (it is of another kind or version)"),
        ({"settings": {"ssd_cache": "0.0.1"}}, "ssd_cache '0.0.1' there"),
        ({"settings": {"model": "another", "weights": "00"}}, "model 'another' there"),
        ({"costs": {"fit": 3}}, "costs['fit']=3"),
        ({"finished": [1]}, "finished=[1], expected dict"),
    ],
)
def test_a_state_of_another_model_or_version_is_refused(generator, whole, no_images, change, message):
    output, _ = whole
    plan = output.with_name("map.state") / "plan.json"
    before = plan.read_text()
    content = json.loads(before)
    for name, value in change.items():
        content[name] = content[name] | value if name == "settings" else value
    plan.write_text(json.dumps(content))
    with pytest.raises(ProfilingError) as caught:
        prepare(generator, output, progress=False, **SETTINGS)
    assert message in str(caught.value)
    assert "give another file, or delete it to begin anew" in str(caught.value)
    plan.write_text(before)


def test_a_state_of_another_model_is_refused_in_one_line_and_left_as_it_is(run, whole, checkpoint, no_images):
    plan = Path("map.state", "plan.json")
    plan.parent.mkdir()
    content = whole[0].with_name("map.state").joinpath("plan.json").read_bytes()
    plan.write_bytes(content)
    other = shutil.copytree(checkpoint, "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "load", None)  # refused before the weights are loaded
        line = one_line(CliRunner().invoke(app, ["prepare", str(other), "-o", "map", *OPTIONS]), 2)
    state = Path("map.state").absolute()
    told = f"model {shown(str(checkpoint))} there, 'other' now); give another file, or delete it to begin anew"
    assert line == f"ssd-cache: {state / 'plan.json'}: the sums of another run ({told}"
    assert plan.read_bytes() == content
    changed = content.replace(json.loads(content)["settings"]["weights"].encode(), b"00")
    plan.write_bytes(changed)  # other weights under the same name
    assert "sums of another run (weights '00' there, " in one_line(run(), 2)
    assert plan.read_bytes() == changed


def test_other_settings_are_refused_by_name(run, whole, generator):
    with pytest.raises(ProfilingError, match="num_steps 4 there, 5 now"):
        prepare(generator, whole[0], progress=False, **{**SETTINGS, "num_steps": 5})
    with pytest.raises(ProfilingError, match="num_prompts 26 there, 25 now"):
        prepare(generator, whole[0], PROMPTS[:25], progress=False, **SETTINGS)


def test_damaged_results_are_made_again(generator, whole):
    output, prepared = whole
    state = output.with_name("map.state")
    (state / "learn" / "head_map.safetensors").write_bytes(b"half")
    (state / "check-1.json").write_text('{"rows"')
    assert prepare(generator, output, progress=False, **SETTINGS) == prepared


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row.pop("retained"),
        lambda row: row["kl"].pop(),
        lambda row: row["kl"].clear(),
        lambda row: row["kl"].__setitem__(slice(2), [1e308, 1e308]),
    ],
)
def test_a_check_that_is_not_whole_is_measured_again(generator, whole, damage):
    output, prepared = whole
    path = output.with_name("map.state") / "check-0.json"
    content = json.loads(path.read_bytes())
    damage(next(iter(content["rows"].values())))
    path.write_text(json.dumps(content))
    assert prepare(generator, output, progress=False, **SETTINGS) == prepared


def test_the_map_is_published_with_its_curve_also_after_a_failure(run, hub, monkeypatch, generator):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.answer_always = 503
    failed = run("--quick", "--push", "me/map")
    assert f"{hub.url}/me/map: the Hub answered 503; try again later" in one_line(failed, 1)
    assert "wrote map, with report.html" in failed.stdout
    prepared, hub.answer_always = HeadMap.from_pretrained("map"), None
    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "generate", None)  # no image is generated again
        result = run("--quick", "--push", "me/map")
    assert result.exit_code == 0, result.output
    assert HeadMap.from_pretrained("map") == prepared
    repo = hub.repos["me/map"]
    tree = repo.commits[repo.refs["main"]]
    assert b"## Fidelity to the full cache" in tree["README.md"]
    assert f"published {hub.url}/me/map/commit/" in result.stdout


def test_two_processes_share_a_run(checkpoint, whole, tmp_path):
    pytest.importorskip("accelerate")
    answers = run_two(["prepare", checkpoint, "-o", "both", *OPTIONS], cwd=tmp_path)
    assert [code for code, _, _ in answers] == [0, 0], answers
    both, alone = HeadMap.from_pretrained(tmp_path / "both"), whole[1]
    assert both.slots == alone.slots
    assert torch.equal(both.is_spatial, alone.is_spatial)
    for name, tensor in alone.learned.tensors().items():  # each process adds the gradients of its own images first
        torch.testing.assert_close(both.learned.tensors()[name], tensor, rtol=1e-3, atol=1e-4)
    assert answers[1][1] == ""
