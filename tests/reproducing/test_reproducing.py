"""`ssd-cache reproduce`: the whole run, what is kept after an interruption, the plan, and what is refused.

The model and the judges are small and random, and their classes the real ones. How images are generated and judged is
tested beside `evaluation`.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from helpers.children import run_two
from helpers.failing import fail_on_full_disk, one_line
from helpers.interrupting import ENDS, interrupt
from helpers.machine import look_shortly
from helpers.models import random_score
from helpers.tiny_checkpoint import HEADS, LAYERS, SIDE, head_map, write_checkpoint
from helpers.tiny_judges import write_blip, write_classifier, write_detector
from typer.testing import CliRunner

from ssd_cache.cli import app
from ssd_cache.evaluation.comparing import compare_results
from ssd_cache.evaluation.policies import parse_policies, parse_policy
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint
from ssd_cache.reproducing import plan as planning
from ssd_cache.reproducing.benchmarks import share_of
from ssd_cache.reproducing.paper import paper_model, paper_quality, paper_speed
from ssd_cache.reproducing.settings import Cell, choose_cells
from ssd_cache.reproducing.stages import pairs, read_scores, read_speeds
from ssd_cache.runs.run_state import ProfilingError

MODEL = "Janus-Pro-1B"
OPTIONS = ["--dpg", "dpg_bench", "--geneval", "geneval.jsonl", "--detector", "detector", "--clip", "clip"]
OPTIONS += ["--vqa", "blip", "--speed-batch-sizes", "1,2", "--no-compiled", "--batch-size", "4"]
SMALL = [MODEL, "-o", "out", *OPTIONS, "--policies", "full,ssd:buffer=1", "--budgets", "0.5"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:after an eviction a spatial head"),
    pytest.mark.filterwarnings("ignore:.* does not know"),
]

QUESTIONS = """\
{0},,,1,0,entity,whole,entity - whole (car),Is there a car?
{0},,,2,1,attribute,color,"attribute - color (car, red)",Is the car red?
{0},,,3,1,relation,spatial,"relation - spatial (car, dog)",Is there a dog?
"""
COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def write_prompts(folder: Path, colors: tuple[str, ...], items: str) -> None:
    """For every colour GenEval's prompts of one car and of two cars; for every letter a prompt of DPG-Bench."""
    lines = []
    for color in colors:
        one, many = {"class": "car", "count": 1}, {"class": "car", "count": 2}
        lines += [
            {"tag": "single_object", "include": [one], "prompt": f"a photo of a {color} car"},
            {"tag": "counting", "include": [many], "exclude": [{**many, "count": 3}], "prompt": f"two {color} cars"},
        ]
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = folder / "dpg_bench" / "prompts"
    prompts.mkdir(parents=True)
    for item in items:
        (prompts / f"{item}.txt").write_text(f"a photo of a red car {item}")
    (prompts.parent / "dpg_bench.csv").write_text(f"{COLUMNS}\n{''.join(map(QUESTIONS.format, items))}")


@pytest.fixture(scope="module", autouse=True)
def _short_look():
    with pytest.MonkeyPatch.context() as patch:
        look_shortly(patch)
        yield


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A model with a learned score, judges, and prompts."""
    shelf = tmp_path_factory.mktemp("shelf")
    write_checkpoint(shelf / MODEL, guidance_scale=2.0, with_head_map=False)
    labels = head_map()
    learned = random_score(LAYERS, HEADS, 16, (SIDE, SIDE))
    HeadMap(labels.is_spatial, labels.grid, learned=learned).save_pretrained(shelf / MODEL / "head_map")
    write_detector(shelf / "detector")
    write_classifier(shelf / "clip")
    write_blip(shelf / "blip", 32)
    write_prompts(shelf, ("red", "blue"), "abcdefghijkl")
    return shelf


@pytest.fixture
def place(shelf, tmp_path, monkeypatch):
    """A folder of this test alone, with links to the models, and two prompts of each benchmark."""
    for name in (MODEL, "detector", "clip", "blip"):
        (tmp_path / name).symlink_to(shelf / name)
    write_prompts(tmp_path, ("red",), "ab")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(shelf, tmp_path_factory):
    """An uninterrupted small run: its folder."""
    place = tmp_path_factory.mktemp("whole")
    for name in (MODEL, "detector", "clip", "blip"):
        (place / name).symlink_to(shelf / name)
    write_prompts(place, ("red",), "ab")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        result = run(SMALL)
        assert result.exit_code == 0, result.output
    return place / "out", result


def run(arguments):
    return CliRunner().invoke(app, ["reproduce", *arguments])


def outputs(folder: Path) -> dict[str, bytes]:
    """Images, lines and results of a run; not what depends on time."""
    names = ("plan.json", "reproduction.json", "reproduction.md", "speed")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in names]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def no_weights(monkeypatch):
    """Fail when weights are loaded."""

    def loads(*args, **kwargs):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(Checkpoint, "load", loads)


def test_a_sample_of_all_tables_with_all_policies(shelf, monkeypatch):
    monkeypatch.chdir(shelf)
    result = run([MODEL, "-o", "all", *OPTIONS, "--budgets", "0.2", "--sample", "0.5", "--batch-size", "16"])
    assert result.exit_code == 0, result.output
    page = (shelf / "all" / "reproduction.md").read_text()
    numbers = json.loads((shelf / "all" / "reproduction.json").read_text())
    assert page in result.stdout
    assert "- 0.5 of the prompts, evenly spaced (--sample): 2 of geneval with 4 images each, 6 of dpg" in page
    dpg, geneval = numbers["dpg"], numbers["geneval"]
    names = ["full", "ssd:buffer=1", "learned", "h2o:buffer=1", "streaming-llm:buffer=1"]
    assert [row["policy"] for row in dpg["rows"]] == [row["policy"] for row in geneval["rows"]] == names
    # the tables hold what `eval compare` finds in the same folders
    folders = ["full", *(f"{name.replace(':', '-')}-20" for name in names[1:])]
    for name, found in (("geneval", geneval), ("dpg", dpg)):
        compared = compare_results([shelf / "all" / name / folder / "results" for folder in folders])
        overall = [row for row in compared.rows if row.task == "overall"]
        assert [row["results"]["overall"] for row in found["rows"]] == [row.score for row in overall]
        against_full = [entry for entry in found["differences"] if entry["second"] == "full"]
        assert [entry["difference"] for entry in against_full] == [row.difference.difference for row in overall[1:]]
        assert all(entry["p"] is None for entry in against_full) == (name == "geneval")  # two prompts
    assert [(entry["first"], entry["second"]) for entry in dpg["differences"]][4:] == [
        ("ssd:buffer=1 20%", "learned 20%"),
        ("ssd:buffer=1 20%", "h2o:buffer=1 20%"),
        ("ssd:buffer=1 20%", "streaming-llm:buffer=1 20%"),
        ("learned 20%", "h2o:buffer=1 20%"),
        ("learned 20%", "streaming-llm:buffer=1 20%"),
    ]
    [line] = re.findall(r"^\| ssd:buffer=1 \| 20% \| (\d.*) \|$", page, re.MULTILINE)
    ours = dpg["rows"][1]["results"]
    columns = zip(("entity", "attribute", "relation", "overall"), ("89.23", "87.94", "89.48", "82.82"), strict=True)
    assert line.split(" | ")[:8] == [text for name, paper in columns for text in (f"{ours[name]:.2f}", paper)]
    other = r"\| ssd:buffer=1 \| 20% \| - \| 0.81 \| [\d.]+ \| 0.48 \| - \| 0.57 \| [\d.]+ \| 0.73 \|"
    assert re.search(other, page)  # GenEval without prompts of two objects, nor of coloured ones
    caches = ["DynamicCache", "StaticCache", *(f"{name} 20%" for name in names[1:]), "ssd 20%"]
    assert [(row["batch_size"], row["cache"]) for row in numbers["speed"]] == [
        (batch_size, cache) for batch_size in (1, 2) for cache in caches
    ]
    assert all(row["tokens_per_second"] > 0 for row in numbers["speed"])


def test_the_plan_comes_first(whole):
    lines = whole[1].stdout.splitlines()
    assert lines[0].startswith(f"{MODEL} on cpu: about ")
    assert lines[1].split() == ["stage", "images", "time", "peak", "memory", "disk"]
    stages = [re.split(r"\s{2,}", line)[:2] for line in lines[2:7]]
    names = ("geneval", "geneval scores", "dpg", "dpg scores")
    assert stages == [*([name, "16"] for name in names), ["speed 1", "12"]]
    plan = json.loads((whole[0] / "plan.json").read_text())
    assert plan["costs"].keys() == {
        f"{name} {part}" for name in ("geneval", "dpg") for part in ("full", "ssd:buffer=1 50%", "scores")
    }
    assert all(0 < cost["seconds"] < 120 for cost in plan["costs"].values())


def test_the_folders_are_those_of_eval(whole, place):
    command = ["eval", "geneval", "export", "--model", MODEL, "--policy", "ssd:buffer=1", "--budget", "0.5"]
    result = CliRunner().invoke(
        app, [*command, "--prompts-file", "geneval.jsonl", "--batch-size", "4", "--output", "by-hand"]
    )
    assert result.exit_code == 0, result.output
    ours = outputs(whole[0] / "geneval" / "ssd-buffer=1-50")
    assert outputs(place / "by-hand") == {name: text for name, text in ours.items() if not name.startswith("results")}


def test_a_finished_run_does_nothing_again(whole, place, monkeypatch):
    shutil.copytree(whole[0], place / "out")

    def fails(*args, **kwargs):
        raise AssertionError("work is done again")

    for name in ("load_judge", "score"):
        monkeypatch.setattr(f"ssd_cache.reproducing.benchmarks.GenEval.{name}", fails)
        monkeypatch.setattr(f"ssd_cache.reproducing.benchmarks.DPGBench.{name}", fails)
    monkeypatch.setattr("ssd_cache.reproducing.stages.run_bench", fails)
    monkeypatch.setattr("ssd_cache.models.base.Generator.generate", fails)
    (place / "out" / "reproduction.md").unlink()
    halves = [place / "out" / ".plan.json.0a.part", place / "out" / "speed" / ".batch-1.json.0a.part"]
    for half in halves:  # a run was killed while it wrote
        half.write_bytes(b"half")
    result = run(SMALL)
    assert result.exit_code == 0, result.output
    assert "nothing left to do" in result.stdout
    assert not any(half.exists() for half in halves)
    assert (place / "out" / "reproduction.md").read_text() == (whole[0] / "reproduction.md").read_text()


LEFT = {
    "images": (("geneval/ssd-buffer=1-50/00001", "geneval.json"), "geneval/ssd-buffer=1-50/00001/samples/00000.png"),
    "geneval scores": (("geneval.json", "geneval/full/results"), "geneval/full/results/results.jsonl"),
    "dpg scores": (("dpg.json", "dpg/full/results", "speed"), "dpg/full/results/results.jsonl"),
    "speed": (("speed",), "speed/batch-1.json"),
}
"""By stage: what is removed from a finished run, so that it is left to do, and the first file that it writes."""


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("images", signal.SIGKILL),
        ("geneval scores", signal.SIGTERM),
        pytest.param("dpg scores", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("speed", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_with_the_same_results(whole, place, stage, how):
    out = place / "out"
    shutil.copytree(whole[0], out)
    removed, first = LEFT[stage]
    for path in [out / name for name in (*removed, "reproduction.md", "reproduction.json")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, stderr = interrupt(["reproduce", *SMALL], (out / first).exists, how)
    assert code == ENDS[how], stderr
    if how != signal.SIGKILL:
        last = "interrupted; out keeps the finished parts: run the same command again to resume"
        assert stderr.strip().splitlines()[-1] == f"ssd-cache: {last}"
    assert not (out / "reproduction.md").exists()
    result = run(SMALL)
    assert result.exit_code == 0, result.output
    assert outputs(out) == outputs(whole[0])
    assert (out / "reproduction.md").exists()


def test_a_run_killed_in_its_first_batch_measures_it_again(whole, place):
    out = place / "out"
    images = "geneval/full/00000/samples"
    code, stderr = interrupt(["reproduce", *SMALL], (out / images / "00000.png").exists, signal.SIGKILL)
    assert code == ENDS[signal.SIGKILL], stderr
    shutil.copytree(whole[0] / images, out / images, dirs_exist_ok=True)  # as if killed after the last image
    result = run(SMALL)
    assert result.exit_code == 0, result.output
    assert outputs(out) == outputs(whole[0])
    costs = json.loads((out / "plan.json").read_text())["costs"]
    assert all(cost["seconds"] > 0.05 for cost in costs.values())


def test_a_disk_that_is_full_after_every_few_writes_loses_nothing(whole, place, monkeypatch):
    failed = fail_on_full_disk(monkeypatch, lambda: run(SMALL), num_writes=16, most=12)
    assert 2 <= failed < 12
    assert outputs(place / "out") == outputs(whole[0])


def test_results_that_cannot_be_written_are_an_error_with_a_remedy(whole, place):
    shutil.copytree(whole[0], place / "out")
    (place / "out" / "dpg.json").unlink()
    shutil.rmtree(place / "out" / "dpg" / "full" / "results")
    (place / "out" / "dpg" / "full" / "results").write_text("not a folder")
    line = one_line(run(SMALL), 1)
    assert "everything before is kept: make room, and run the same command again to resume" in line


def test_a_disk_too_small_for_the_images_is_refused_by_the_plan(place, monkeypatch):
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    line = one_line(run(SMALL), 1)
    assert "the missing images take about 0.0 GB, and 0.0 GB are free; make room, or give another --output" in line


def test_bad_input_is_refused_before_weights_are_loaded(place, no_weights):
    (place / "empty").mkdir()
    (place / "other").mkdir()
    (place / "other" / "notes.txt").write_text("mine")
    half = place / "half"
    shutil.copytree(place / "dpg_bench", half)
    csv = (half / "dpg_bench.csv").read_text().splitlines(keepends=True)
    (half / "dpg_bench.csv").write_text("".join(csv[:4]))
    shutil.copytree(place / MODEL, place / "bare", symlinks=False)
    shutil.rmtree(place / "bare" / "head_map")
    model = [MODEL, "-o", "out"]
    without = [word for word in SMALL if word not in ("--dpg", "dpg_bench", "--vqa", "blip")]
    for arguments, message in (
        (model, "no benchmark: give --geneval, --dpg, or both"),
        ([*model, "--geneval", "none.jsonl"], "none.jsonl"),
        ([*model, "--dpg", "none", "--vqa", "blip"], "none"),
        ([*model, "--dpg", "dpg_bench"], "--dpg needs --vqa"),
        ([*without, "--dpg", "empty", "--vqa", "blip"], "empty has no prompts, as a folder or as prompts.jsonl; give"),
        ([*without, "--dpg", "half", "--vqa", "blip"], "dpg_bench.csv has no question of b; give a complete file"),
        ([*without, "--geneval", "dpg_bench/dpg_bench.csv"], "dpg_bench.csv, line 1"),
        ([*SMALL, "--detector", "./missing"], "--detector ./missing: no model there; give a folder"),
        ([*SMALL, "--clip", "./missing"], "--clip ./missing: no model there; give a folder"),
        ([*SMALL, "--vqa", "./missing"], "--vqa ./missing: no model there; give a folder"),
        ([*SMALL, "--sample", "0"], "--sample 0 is out of range: give a share of the prompts above 0 and up to 1"),
        ([*SMALL, "--sample", "1.5"], "--sample 1.5 is out of range"),
        ([*SMALL, "--sample", "nan"], "--sample nan is out of range"),
        ([*SMALL, "--batch-size", "6"], "batch_size=6: a prompt has 4 images; give a multiple of 4"),
        ([*SMALL, "--speed-batch-sizes", "0"], "--speed-batch-sizes 0: give whole numbers from 1 up"),
        ([*SMALL, "--policies", "full,nonsense"], "unknown policy 'nonsense'"),
        ([*SMALL, "--budgets", "0.02"], "slots"),
        ([*SMALL, "-o", "other"], "other: it is not empty and has no plan.json, so its content is unknown; give a new"),
        (["bare", *SMALL[1:]], "ssd:buffer=1 needs a head map, and bare has none in its folder: give --head-map"),
        (["bare", *SMALL[1:], "--policies", "learned"], "learned needs a head map, and bare has none in its folder"),
    ):
        assert message in one_line(run(arguments), 2), arguments
    assert not (place / "out").exists()


def test_a_map_without_a_learned_score_leaves_its_policy_out(place):
    head_map().save_pretrained(place / "map")
    cells, left_out = choose_cells(parse_policies("full,learned,ssd"), head_map(), [0.5])
    assert [cell.name for cell in cells] == ["full", "ssd 50%"]
    assert left_out == ["learned, because the head map has no learned score (ssd-cache prepare trains one)"]
    options = ["--head-map", "map", "--policies", "learned"]
    assert "no policy is left (learned, because" in one_line(run([*SMALL, *options]), 2)


def test_a_folder_of_another_run_is_refused_by_name(whole, place, no_weights):
    shutil.copytree(whole[0], place / "out")
    shutil.copytree(place / MODEL, place / "another", symlinks=False)
    for arguments, message in (
        ([*SMALL, "--seed", "1"], "a reproduction with other settings (seed 42 there, 1 now); give another --output"),
        ([*SMALL, "--sample", "0.5"], "sample 1.0 there, 0.5 now"),
        (["another", *SMALL[1:]], "model 'Janus-Pro-1B' there, 'another' now"),
        ([*SMALL, "--budgets", "0.25"], "policies"),
    ):
        assert message in one_line(run(arguments), 2)
    plan = place / "out" / "plan.json"
    plan.write_text(plan.read_text().replace("ssd-cache reproduce 1", "ssd-cache prepare 1"))
    assert "not the plan of ssd-cache reproduce (it is of another kind or version)" in one_line(run(SMALL), 2)


def test_a_damaged_result_is_named(whole, place):
    shutil.copytree(whole[0], place / "out")
    (place / "out" / "geneval.json").write_text('{"rows": 3')
    line = one_line(run(SMALL), 1)
    assert re.search(r"geneval.json: damaged \(.*\); delete it, and run the same command again", line)
    (place / "out" / "geneval.json").unlink()
    assert run(SMALL).exit_code == 0
    assert outputs(place / "out") == outputs(whole[0])


def test_results_that_lack_a_field_or_a_row_are_damaged(tmp_path):
    differing = {"first": "a", "second": "b", "difference": 0.1, "low": None, "high": None, "p": None, "num_prompts": 2}
    row = {"policy": "full", "budget": 1.0, "results": {"overall": 0.5, "standard_error": None}}
    good = {"judge": {"scorer": "s"}, "num_prompts": 2, "rows": [row], "differences": [differing]}
    scores, speeds = tmp_path / "geneval.json", tmp_path / "batch-1.json"
    scores.write_text(json.dumps(good))
    assert read_scores(scores, 1) == good
    for change in (
        {"judge": {}},
        {"rows": []},
        {"rows": [{**row, "results": {"overall": 0.5}}]},
        {"rows": [{**row, "budget": "all"}]},
        {"differences": [{**differing, "p": "small"}]},
    ):
        scores.write_text(json.dumps(good | change))
        with pytest.raises(ProfilingError, match="geneval.json: damaged"):
            read_scores(scores, 1)
    for rows in ([{"cache": "ssd"}], [{"cache": "ssd", "batch_size": 1, "peak": "much"}]):
        speeds.write_text(json.dumps({"rows": rows}))
        with pytest.raises(ProfilingError, match="batch-1.json: damaged"):
            read_speeds(speeds)


def test_a_judge_without_weights_fails_at_the_first_batch(place):
    (place / "broken").mkdir()
    shutil.copy(place / "blip" / "config.json", place / "broken")
    line = one_line(run([*SMALL, "--vqa", "broken"]), 1)
    assert "--vqa broken: the judge of dpg cannot be loaded" in line
    assert len(list((place / "out").rglob("*.png"))) == 5  # one batch of each benchmark


def test_a_long_run_needs_yes(place, monkeypatch, no_weights):
    monkeypatch.setattr("ssd_cache.cli.reproduce.MAX_HOURS", 1e-9)
    line = one_line(run(SMALL), 2)
    assert "for its images alone on cpu, more than 1e-09 h: give --yes to run it anyway" in line
    assert "--sample 0.05 with another --output for a share of it" in line
    assert not (place / "out").exists()


def test_two_processes_share_a_run(whole, place):
    pytest.importorskip("accelerate")
    answers = run_two(["reproduce", *SMALL], cwd=place, before=look_shortly)
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert outputs(place / "out") == outputs(whole[0])
    assert answers[1][1] == ""


def test_more_processes_than_prompts_are_refused(place):
    pytest.importorskip("accelerate")
    shutil.rmtree(place / "dpg_bench")
    write_prompts(place, ("red",), "a")
    for code, _, stderr in run_two(["reproduce", *SMALL], cwd=place):
        assert "1 prompts of dpg for 2 processes: start fewer processes, or give a greater --sample" in stderr
        assert code == 2


def test_a_share_is_evenly_spaced():
    assert share_of(range(80), 0.05) == [10, 30, 50, 70]
    assert share_of("abc", 1.0) == list("abc")
    assert share_of("abc", 0.01) == ["b"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("deepseek-community/Janus-Pro-7B", "janus-pro-7b"),
        ("models/janus-pro-1b/", "janus-pro-1b"),
        ("Janus-Pro-1B-finetuned", "janus-pro-1b"),
        *(("shapes-janus", None), ("Janus-1.3B", None), ("Janus-Pro-1Bit", None)),
    ],
)
def test_the_papers_model_is_known_by_name(name, found):
    assert paper_model(name) == found


def test_other_settings_and_models_have_no_figures_of_the_paper():
    ssd = parse_policy("ssd:buffer=1")
    assert paper_quality("janus-pro-7b", "dpg", ssd, 0.5)["overall"] == 84.72
    assert paper_quality("janus-pro-1b", "geneval", parse_policy("full"), 1.0)["two_object"] == 0.82
    assert paper_quality("janus-pro-1b", "geneval", ssd, 0.3) == {}
    assert paper_quality("janus-pro-1b", "geneval", parse_policy("learned"), 0.2) == {}
    assert paper_quality("janus-pro-1b", "geneval", parse_policy("ssd:score=mean"), 0.2) == {}
    assert paper_quality(None, "geneval", ssd, 0.2) == {}
    assert paper_speed("janus-pro-1b", 64, "ssd 20%") == (2524.6, 7.7)
    assert paper_speed("janus-pro-7b", 64, "ssd 20%") is None


def test_policies_without_labels_are_not_compared_with_each_other():
    cells = [Cell(parse_policy(name), 0.2) for name in ("h2o", "ssd", "streaming-llm")]
    assert [(one.name, two.name) for one, two in pairs(cells)] == [
        ("ssd 20%", "h2o 20%"),
        ("ssd 20%", "streaming-llm 20%"),
    ]


@pytest.mark.slow
def test_shapes_janus_is_named_as_such(place):
    options = ["-o", "shapes", *OPTIONS, "--policies", "full,learned", "--budgets", "0.2", "--batch-size", "8"]
    result = run(["shapes-janus", *options])
    assert result.exit_code == 0, result.output
    page = (place / "shapes" / "reproduction.md").read_text()
    assert page.startswith("# Reproduction of SSD (arXiv 2510.18716) with shapes-janus\n")
    assert "- shapes-janus is the small model of this package and not a model of the paper." in page
    rows = json.loads((place / "shapes" / "reproduction.json").read_text())["geneval"]["rows"]
    assert [(row["policy"], row["paper"]) for row in rows] == [("full", {}), ("learned", {})]
