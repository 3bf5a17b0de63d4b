"""`ssd-cache eval compare`: differences of scored folders against a bootstrap in plain loops and closed forms.

Most files are written here in the scorers' own types; those of the last part come from the scorers, with small random
models. What differs between policies is not tested: the images are noise.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_judges import write_classifier, write_detector
from PIL import Image
from typer.testing import CliRunner

from ssd_cache.cli import app
from ssd_cache.evaluation.comparing import compare_results, read_results
from ssd_cache.evaluation.dpg import Question, score_sheets, write_sheet
from ssd_cache.evaluation.geneval import SCORER, SampleFolder
from ssd_cache.evaluation.geneval.prompts import parse_prompt
from ssd_cache.evaluation.vqa import VQAModel

GENEVAL = {"benchmark": "GenEval", "scorer": SCORER, "detector": "mask2former", "rules": {"threshold": 0.3}}
DPG = {"benchmark": "DPG-Bench", "scorer": "DPG rules (VQA = blip)", "official": False}
TAGS = {"single_object": "11 11 01 10", "counting": "00 10 11 01 00 10"}
ANSWERS = {"0": ["111", "110"], "whoops5": ["10", "00"], "vrd7": ["1", "0"]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def line(judge, filename, tag, metadata, result):
    known = {"filename": filename, "tag": tag, "metadata": metadata, "sha256": "", "judge": judge, "result": result}
    return json.dumps(known)


def geneval_lines(judge=GENEVAL, **tags):
    """tag="10 11": prompts as words, whether their images are correct as digits."""
    lines = []
    for tag, text in tags.items():
        for number, word in enumerate(text.split()):
            prompt = f'{{"tag": "{tag}", "prompt": "{number}"}}'
            for sample, digit in enumerate(word):
                lines.append(line(judge, f"{tag}{number}/samples/{sample:05d}.png", tag, prompt, float(digit)))
    return lines


def dpg_lines(answers=ANSWERS, **judge):
    """Answers by item, a word an image; the score is the share of yes, as where no question depends on another."""
    return [
        line(
            DPG | judge,
            f"{item_id}.png",
            "prompts",
            f"{item_id} ({len(words[0])} questions)",
            100 * sum(word.count("1") / len(word) for word in words) / len(words),
        )
        for item_id, words in answers.items()
    ]


def write(name, lines):
    path = Path(name) / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def sampled(seed, share, num_prompts, num_samples=2):
    """Words of random digits, of which a `share` is 1."""
    rng = random.Random(seed)
    return " ".join("".join(str(int(rng.random() < share)) for _ in range(num_samples)) for _ in range(num_prompts))


def shares(text):
    return [word.count("1") / len(word) for word in text.split()]


# --- the numbers


def test_the_bootstrap_equals_plain_loops():
    first = {"single_object": sampled(1, 0.5, 9), "counting": sampled(2, 0.4, 15)}
    second = {"single_object": sampled(3, 0.7, 9), "counting": sampled(4, 0.5, 15)}
    found = compare_results([write("a", geneval_lines(**first)), write("b", geneval_lines(**second))])
    row = next(row for row in found.rows if (row.task, row.results) == ("overall", "b"))

    number, rng = 4000, random.Random(5)
    scores, differences = [], []
    for _ in range(number):
        score = difference = 0.0
        for tag in first:
            one, other = shares(first[tag]), shares(second[tag])
            for _ in one:
                index = rng.randrange(len(one))
                score += other[index] / len(one) / 2
                difference += (other[index] - one[index]) / len(one) / 2
        scores.append(score)
        differences.append(difference)
    mean = sum(sum(shares(text)) / len(shares(text)) for text in second.values()) / 2
    assert row.score == pytest.approx(mean, abs=1e-12)
    # a standard deviation of N samples is known to 1 / sqrt(2 N) of itself; four of these, of both sides
    assert row.standard_error == pytest.approx(np.std(scores), rel=4 * math.hypot(*2 * [1 / math.sqrt(2 * number)]))
    assert row.difference.difference == pytest.approx(np.mean(differences), abs=4 * np.std(differences) / number**0.5)
    # a tail of 2.5% of N samples is known to 0.0025, which is 0.05 standard deviations; four of these
    low, high = np.quantile(differences, [0.025, 0.975])
    assert row.difference.low == pytest.approx(low, abs=0.2 * np.std(differences))
    assert row.difference.high == pytest.approx(high, abs=0.2 * np.std(differences))
    share = np.mean(np.array(differences) <= 1e-12)
    assert 0.01 < share < 0.45  # else p would say nothing here
    assert row.difference.p == pytest.approx(2 * share, abs=4 * 2 * math.sqrt(2 * share * (1 - share) / number))


def test_errors_have_their_closed_form():
    more = {f"more{number}": words for number, words in enumerate(ANSWERS.values())}
    answers = ANSWERS | more
    worse = answers | {"0": ["000", "000"]}
    found = compare_results([write("a", dpg_lines(answers)), write("b", dpg_lines(worse))])
    first, second = found.rows
    a, b = 2 * [250 / 3, 25, 50], [0, 25, 50, 250 / 3, 25, 50]
    assert (first.score, second.score) == (pytest.approx(np.mean(a)), pytest.approx(np.mean(b)))
    assert first.standard_error == pytest.approx(np.std(a) / 6**0.5)
    assert second.standard_error == pytest.approx(np.std(b) / 6**0.5)
    assert first.difference is None
    assert second.difference.difference == pytest.approx(-250 / 18)
    # the one prompt that differs comes up at most 3 times of 6 in 97.5% of the resamples: P(more) is 0.9%
    assert (second.difference.low, second.difference.high) == (pytest.approx(-250 / 6), 0)
    assert second.difference.p == 1  # a single prompt that differs may as well have been the other's
    assert second.difference.num_prompts == 6


def test_few_prompts_have_a_difference_and_neither_interval_nor_p():
    write("a", dpg_lines())
    write("b", dpg_lines(ANSWERS | {"0": ["000", "000"]}))
    result = run("compare", "a", "b", "--output", "out")
    assert result.exit_code == 0, result.output
    table = Path("out/comparison.md").read_text("utf-8")
    assert "| -27.78 | - | - |" in table
    assert "- where there are fewer than 6 prompts" in table
    (_, second) = json.loads(Path("out/comparison.json").read_text("utf-8"), parse_constant=pytest.fail)["rows"]
    assert second["difference"] == {
        "difference": pytest.approx(-250 / 9),
        "low": None,
        "high": None,
        "p": None,
        "num_prompts": 3,
    }


def test_a_tag_with_one_prompt_shows_no_spread():
    for name in "ab":
        write(name, geneval_lines(counting="11", colors="10 11"))
    result = run("compare", "a", "b", "--output", "out")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("out/comparison.json").read_text("utf-8"), parse_constant=pytest.fail)["rows"]
    assert {row["task"] for row in rows if row["standard_error"] is None} == {"overall", "counting"}
    assert "| b | counting | 1.000 | - | +0.000 | - | - |" in Path("out/comparison.md").read_text("utf-8")


def test_equal_results_differ_by_nothing():
    tags = {tag: f"{text} {text}" for tag, text in TAGS.items()}
    answers = ANSWERS | {f"{item_id} again": words for item_id, words in ANSWERS.items()}
    for name, lines in (("geneval", geneval_lines(**tags)), ("dpg", dpg_lines(answers))):
        found = compare_results([write(f"{name}/a", lines), write(f"{name}/b", lines)])
        differences = [row.difference for row in found.rows if row.difference]
        assert [(it.difference, it.low, it.high, it.p) for it in differences] == [(0, 0, 0, 1)] * len(differences)
        assert len(differences) == {"geneval": 3, "dpg": 1}[name]


def test_pairing_narrows_the_interval():
    easy, hard = 20 * ["11"], 20 * ["00"]
    first, alike, unlike = easy + hard, ["01", *easy[1:], "01", *hard[1:]], [*hard, *easy]
    files = {"a": first, "alike": alike, "unlike": unlike}
    found = compare_results([write(name, geneval_lines(counting=" ".join(words))) for name, words in files.items()])
    a, b, c = found.rows
    # what prompts differ by falls out where both find the same ones hard
    assert b.difference.high - b.difference.low < 0.25 * 2 * 1.96 * math.hypot(a.standard_error, b.standard_error)
    # and counts twice where one finds hard what the other finds easy, which is not the same as independent
    width = 2 * 1.96 * (a.standard_error + c.standard_error)
    assert c.difference.high - c.difference.low == pytest.approx(width, rel=0.1)  # means lie 0.05 apart, of 0.62


def test_prompts_are_paired_by_what_they_are_and_not_by_their_place():
    lines = geneval_lines(**{tag: f"{text} {text}" for tag, text in TAGS.items()})
    turned = write("turned", lines[::-1])
    found = compare_results([write("a", lines), turned])
    assert {(it.low, it.high, it.p) for it in (row.difference for row in found.rows) if it} == {(0, 0, 1)}


def test_every_task_has_its_rows():
    better = TAGS | {"counting": "11 11 11 11 11 11"}
    found = compare_results([write("a", geneval_lines(**TAGS)), write("b", geneval_lines(**better))])
    assert [(row.task, row.results) for row in found.rows] == [
        (task, name) for task in ("overall", "single_object", "counting") for name in "ab"
    ]
    differences = {row.task: row.difference.difference for row in found.rows if row.difference}
    assert differences == {"overall": pytest.approx(7 / 24), "single_object": 0, "counting": pytest.approx(7 / 12)}


def test_the_later_line_about_a_sheet_counts():
    again = dpg_lines({"0": ["000", "000"]})
    assert read_results(write("a", [*dpg_lines(), *again])).strata["prompts"]["0 (3 questions)"] == 0


# --- the command


def run(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_the_table_on_the_terminal_and_in_files():
    write("runs/full/results", geneval_lines(**TAGS))
    path = write("runs/ssd-20/results", geneval_lines(**TAGS | {"single_object": "11 11 11 11"}))
    path.with_name("summary.json").write_text("{}", "utf-8")
    result = run("compare", "runs/full/results", path, "--output", path.parent)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found = json.loads(path.with_name("comparison.json").read_text("utf-8"))
    assert found["judge"] == GENEVAL
    assert (found["num_prompts"], found["num_results"]) == (10, 2)
    table = path.with_name("comparison.md").read_text("utf-8")
    assert "## GenEval: differences from full" in table
    row = next(row for row in found["rows"] if (row["task"], row["results"]) == ("overall", "ssd-20"))
    difference = row["difference"]
    assert difference["difference"] == pytest.approx(0.125)
    assert (
        f"| ssd-20 | overall | {row['score']:.3f} | {row['standard_error']:.3f} | +0.125 | {difference['low']:+.3f} to "
        f"{difference['high']:+.3f} | {difference['p']:.4f} |"
    ) in table
    for words in ("10 prompts, 2 results each", "10000 resamples", "mask2former", "not corrected", "single_object"):
        assert words in table
        assert words in result.stdout
    assert path.with_name("summary.json").read_text("utf-8") == "{}"  # the scorer's own stays
    assert run("compare", "runs/full/results", path).stdout == result.stdout.replace(f"wrote {path.parent}\n", "")


def geneval_with(number, **changed):
    """GenEval's lines with other values in one of them, counted from 1."""
    lines = geneval_lines(**TAGS)
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changed)
    return lines


def without(name, lines, number=1):
    row = json.loads(lines[number - 1])
    del row[name]
    return [*lines[: number - 1], json.dumps(row), *lines[number:]]


def dpg_with(number, **changed):
    lines = dpg_lines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changed)
    return lines


REFUSED = {
    "another benchmark": (
        "g",
        dpg_lines(),
        "b/results.jsonl: not comparable with a/results.jsonl (benchmark 'GenEval' there, 'DPG-Bench' here",
    ),
    "another detector": (
        "g",
        geneval_lines(GENEVAL | {"detector": "yolo"}, **TAGS),
        "not comparable with a/results.jsonl (detector 'mask2former' there, 'yolo' here); score both in the same way",
    ),
    "other rules": (
        "g",
        geneval_lines(GENEVAL | {"rules": {"threshold": 0.5}}, **TAGS),
        "(rules {'threshold': 0.3} there, {'threshold': 0.5} here)",
    ),
    "another scorer": (
        "g",
        [line.replace("GenEval rules, HF detector", "someone") for line in geneval_lines(**TAGS)],
        "(scorer 'GenEval rules, HF detector' there, 'someone' here)",
    ),
    "two detectors in one file": (
        "g",
        geneval_with(4, judge=GENEVAL | {"detector": "yolo"}),
        "b/results.jsonl, line 4: another judge than in the lines before (detector 'mask2former' before, 'yolo' here)",
    ),
    "the official script's own lines": ("g", without("judge", geneval_lines(**TAGS)), "line 1: 'judge' is missing"),
    "another VQA model": ("d", dpg_lines(scorer="DPG rules (VQA = x)"), "(scorer 'DPG rules (VQA = blip)' there, 'DPG"),
    "official rules": ("d", dpg_lines(official=True), "(official False there, True here)"),
    "fewer prompts": (
        "g",
        geneval_lines(**TAGS | {"counting": "00 10 11"}),
        "b/results.jsonl: other prompts or questions than a/results.jsonl: 3 are in one of them only, such as "
        """'{"tag": "counting", "prompt": "3"}'; score the same prompts""",
    ),
    "more prompts": ("d", dpg_lines(ANSWERS | {"x": ["1", "1"]}), "1 are in one of them only, such as 'x (1 questi"),
    "another tag": (
        "g",
        geneval_lines(single_object=TAGS["single_object"], colors=TAGS["counting"]),
        "12 are in one of",
    ),
    "a prompt's tag changed": ("g", geneval_with(1, tag="colors"), "1 to 2 results of a prompt; run the score command"),
    "other questions": ("d", dpg_lines(ANSWERS | {"0": ["11", "10"]}), "2 are in one of them only, such as '0 (2 q"),
    "other numbers of images": (
        "g",
        geneval_lines(**{tag: " ".join(word[0] for word in text.split()) for tag, text in TAGS.items()}),
        "not comparable with a/results.jsonl (results of a prompt 2 there, 1 here); score both in the same way",
    ),
    "a missing image": ("g", geneval_lines(**TAGS)[:-1], "1 to 2 results of a prompt; run the score command"),
    "no line": ("g", [], "b/results.jsonl: no result of a prompt; run the score command to its end; give a complete"),
    "something else": ("g", ['{"overall": 0.5}'], "line 1: 'filename' is missing"),
    "a summary": (
        "g",
        json.dumps({"overall": 1}, indent=1).split("\n"),
        "b/results.jsonl, line 1: not a JSON object (",
    ),
    "a line cut short": ("g", [*geneval_lines(**TAGS)[:-1], '{"filename": "0'], "line 20: not a JSON object ("),
    "no object": ("d", [dpg_lines()[0], "[1]"], "line 2: not a JSON object (it=[1], expected dict)"),
    "no result": ("g", without("result", geneval_lines(**TAGS), 3), "line 3: 'result' is missing; give a complete"),
    "a result beyond the best": ("g", geneval_with(3, result=1e308), "line 3: result=1e+308, expected 0 to 100"),
    "a result in words": ("g", geneval_with(3, result="yes"), "line 3: result='yes', expected float"),
    "no number": (
        "d",
        dpg_with(2, result=float("nan")),
        "line 2: not a JSON object (the number nan is not",
    ),
}


@pytest.mark.parametrize(("first", "lines", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_compared_is_refused_in_one_line(first, lines, message):
    write("a", {"g": geneval_lines(**TAGS), "d": dpg_lines()}[first])
    write("b", lines)
    result = run("compare", "a", "b", "--output", "out")
    assert message in result.stderr
    assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not Path("out").exists()


def test_wrong_files_are_refused_in_one_line():
    a, b = write("a", geneval_lines(**TAGS)), write("b", geneval_lines(**TAGS))
    Path("bytes.jsonl").write_bytes(b"\xff\xfe")
    for arguments, message in (
        ((), "Missing argument 'RESULTS'"),
        (("a",), "1 file(s) of results: give two or more; the others are compared with the first"),
        (("a", "no.jsonl"), "no.jsonl: cannot be read (No such file or directory); give a complete results.jsonl of"),
        (("a", "."), "results.jsonl: cannot be read (No such file or directory)"),
        (
            ("a", "bytes.jsonl"),
            "bytes.jsonl, line 1: not a JSON object ('utf-8' codec can't decode byte 0xff in position 0",
        ),
        (("a", "b", "--output", a), f"--output {a} is a file; give a folder"),
    ):
        result = run("compare", *arguments)
        assert message in result.stderr, result.output
        assert (result.exit_code, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert run("compare", a, b).exit_code == 0


# --- from the scorers

BENCH = '{"tag": "single_object", "include": [{"class": "%s", "count": 1}], "prompt": "a photo of a %s"}'
CAR = '{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "%s"}], "prompt": "a photo of a %s car"}'
LINES = [*(BENCH % (name, name) for name in ("bench", "dog")), *(CAR % (name, name) for name in ("red", "blue"))]
QUESTIONS = {
    item_id: (
        Question("1", "red", (), "attribute", "color"),
        Question("2", "green", ("1",), "attribute", "color"),
        Question("3", "blue", (), "attribute", "color"),
    )
    for item_id in ("0", "vrd7", "whoops5")
}


class Colours(VQAModel):
    """Looks at one pixel: yes where there is much of the colour that is asked for."""

    name = "colours"

    def answers(self, image, questions):
        return [image.getpixel((0, 0))[("red", "green", "blue").index(question)] > 100 for question in questions]


def noise(rng, side=32):
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def colour(rng, side=32):
    return Image.new("RGB", (side, side), tuple(map(int, rng.integers(0, 256, 3))))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_what_geneval_score_wrote_is_compared(tmp_path):
    detector, clip = write_detector(tmp_path / "detector"), write_classifier(tmp_path / "clip", seed=6)
    Path("prompts.jsonl").write_text("\n".join(LINES) + "\n", "utf-8")
    for name, seed in (("a", 0), ("b", 1)):
        rng = np.random.default_rng(seed)
        folder = SampleFolder(name, list(map(parse_prompt, LINES)), 2)
        folder.write(range(len(folder.texts)), [noise(rng) for _ in folder.texts])
        judges = ("--detector", detector, "--clip", clip, "--short-side", 64, "--device", "cpu")
        scored = run("geneval", "score", name, "--prompts-file", "prompts.jsonl", "--samples", 2, *judges)
        assert scored.exit_code == 0, scored.output
    result = run("compare", "a/results", "b/results", "-o", "out")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("out/comparison.json").read_text("utf-8"))["rows"]
    for name in "ab":
        summary = json.loads(Path(name, "results", "summary.json").read_text("utf-8"))
        wanted = {"overall": summary["overall"], **summary["tags"]}
        assert {row["task"]: row["score"] for row in rows if row["results"] == name} == pytest.approx(wanted)
        errors = {"overall": summary["standard_error"], **summary["tag_errors"]}
        found = {row["task"]: row["standard_error"] for row in rows if row["results"] == name}
        assert found == pytest.approx(errors)


def test_what_dpg_score_wrote_is_compared():
    results = []
    for name, seed in (("a", 0), ("b", 1)):
        rng = np.random.default_rng(seed)
        for item_id in QUESTIONS:
            write_sheet(Path(name, "sheets", f"{item_id}.png"), [colour(rng) for _ in range(4)])
        results.append(score_sheets(f"{name}/sheets", QUESTIONS, Colours(), results_file=f"{name}/results.jsonl"))
    result = run("compare", "a/results.jsonl", "b", "-o", "out")
    assert result.exit_code == 0, result.output
    first, second = json.loads(Path("out/comparison.json").read_text("utf-8"))["rows"]
    assert [first["score"], second["score"]] == pytest.approx([result.overall for result in results])
    one, other = (result.prompts for result in results)
    differences = [other[item_id] - one[item_id] for item_id in QUESTIONS]
    assert len(set(differences)) > 1  # else neither sign nor pairs would be seen
    assert second["difference"]["difference"] == pytest.approx(np.mean(differences))
    score_sheets("b/sheets", QUESTIONS, Colours(), official=True, results_file="official/results.jsonl")
    result = run("compare", "a", "official")
    assert (result.exit_code, "official False there, True here" in result.stderr) == (2, True)
