"""GenEval 2: its prompt file, the score's formulas against plain arithmetic, and whole runs with a small random LLaVA.

All prompts are made up here, since GenEval 2's are not free to ship. What a trained judge answers is not tested.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_checkpoint import SIDE, write_checkpoint
from helpers.tiny_judges import WORDS, write_blip, write_llava
from PIL import Image
from typer.testing import CliRunner

from ssd_cache.cli import app
from ssd_cache.evaluation.geneval import SampleFolder
from ssd_cache.evaluation.geneval2 import (
    geometric_mean,
    read_prompts,
    right_answers,
    score_folder,
    summarize,
)
from ssd_cache.evaluation.image_folders import find_captioned
from ssd_cache.evaluation.vqa import load_vqa
from ssd_cache.io.untrusted import WrongFileError

ROWS = [
    {
        "prompt": "two red squares",
        "atom_count": 3,
        "vqa_list": [["How many squares ?", "two"], ["Is the car red ?", "Yes"], ["Is there a car ?", "Yes"]],
        "skills": ["count", "attribute", "object"],
    },
    {
        "prompt": "a photo of a dog",
        "atom_count": 1,
        "vqa_list": [["How many squares ?", "one"], ["Is there a dog ?", "Yes"]],
        "skills": ["count", "object"],
    },
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with a prompt file, and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"), 32)


@pytest.fixture
def folder(tmp_path):
    """Images of noise, two of each prompt."""
    folder = SampleFolder(tmp_path / "images", read_prompts("p.jsonl"), 2)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in folder.texts]
    folder.write(range(len(images)), images)
    return folder


def run(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner().invoke(app, ["eval", *map(str, arguments)])


# the prompt file


def test_a_prompt_is_written_as_it_was_read():
    assert [json.loads(prompt.to_json()) for prompt in read_prompts("p.jsonl")] == ROWS


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " "}, "prompt or vqa_list is empty"),
        ({"vqa_list": []}, "prompt or vqa_list is empty"),
        ({"skills": ["count"]}, "3 questions have 1 skills"),
        ({"skills": ["count", "attribute", "taste"]}, "skills[2]='taste'"),
        (
            {"vqa_list": [["How many squares ?", "Yes"]], "skills": ["count"]},
            "has the answer 'Yes', expected one to ten",
        ),
        ({"vqa_list": [["How many squares ?"]], "skills": ["count"]}, "vqa_list[0] holds 1 values, expected 2"),
        ({"atom_count": "3"}, "atom_count='3'"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(changed, message):
    Path("p.jsonl").write_text(json.dumps(ROWS[1]) + "\n" + json.dumps(ROWS[0] | changed) + "\n", "utf-8")
    with pytest.raises(ValueError, match="p.jsonl, line 2: .* give a line of GenEval 2's") as caught:
        read_prompts("p.jsonl")
    assert message in str(caught.value)
    Path("p.jsonl").write_text("\n", "utf-8")
    with pytest.raises(ValueError, match="no prompt in it"):
        read_prompts("p.jsonl")


# the rules


def test_spellings_of_the_right_answer():
    """Those of the official script: words and digits for numbers, else yes, with and without a blank."""
    assert set(right_answers("How many cups ?", "ten")) == {"ten", "Ten", " ten", " Ten", "10", " 10"}
    assert set(right_answers("Are the cups red?", "Yes")) == {"yes", "Yes", " yes", " Yes"}
    assert set(right_answers("Is it how many?", "No")) == {"yes", "Yes", " yes", " Yes"}


def test_means_are_those_of_the_official_script():
    prompts = read_prompts("p.jsonl")
    given = [[0.5, 1.0, 0.25], [0.9, 0.4]]
    lines = [{"filename": "x", "probabilities": one, "judge": {"scorer": "s"}} for one in given]
    score = summarize(prompts, lines)
    geometric = [100 * (0.5 * 0.25) ** (1 / 3), 100 * 0.36**0.5]
    arithmetic = [100 * 1.75 / 3, 65]
    assert score.soft_tifa_gm == pytest.approx(np.mean(geometric))
    assert score.soft_tifa_am == pytest.approx(np.mean(arithmetic))
    assert score.gm_error == pytest.approx(np.std(geometric) / 2**0.5)
    assert score.am_error == pytest.approx(np.std(arithmetic) / 2**0.5)
    assert score.skills == {"attribute": 100, "count": pytest.approx(70), "object": pytest.approx(32.5)}
    assert score.atomicities == {1: pytest.approx(geometric[1]), 3: pytest.approx(geometric[0])}
    assert (score.num_prompts, score.num_images) == (2, 2)
    again = summarize([*prompts, prompts[0]], [*lines, lines[0] | {"probabilities": [0.1, 0.1, 0.1]}])
    assert again.soft_tifa_gm == pytest.approx(np.mean([(geometric[0] + 10) / 2, geometric[1]]))  # samples first
    assert again.num_prompts == 2


def test_a_zero_makes_the_geometric_mean_zero():
    assert geometric_mean([0.9, 0.0, 1.0]) == 0
    assert geometric_mean([0.25, 1.0]) == pytest.approx(0.5)


# whole runs


def test_probabilities_are_those_of_the_plain_forward(folder, llava):
    """Batched and padded they equal one forward pass a question, summed over the spellings by hand."""
    vqa = load_vqa(llava, device="cpu", batch_size=2)
    score = score_folder(folder, vqa, results_file="r.jsonl")
    lines = [json.loads(line) for line in Path("r.jsonl").read_text("utf-8").splitlines()]
    tokens = {"two": ["two", "Two", "2"], "one": ["one"], "Yes": ["yes", "Yes"]}  # the others are unknown words
    for number, line in enumerate(lines):
        expected = []
        for question, answer in ROWS[number // 2]["vqa_list"]:
            prompt = f"USER <image> {question} Answer in one word. ASSISTANT"
            inputs = vqa.processor(images=Image.open(folder.path(number)), text=prompt, return_tensors="pt")
            with torch.no_grad():
                found = vqa.model(**inputs).logits[0, -1].softmax(-1)
            expected.append(sum(found[WORDS.index(word)].item() for word in tokens[answer]))
        assert line["probabilities"] == pytest.approx(expected, abs=1e-5)  # float32, other order of sums
        assert line["result"] == pytest.approx(100 * math.prod(expected) ** (1 / len(expected)), rel=1e-3)
    assert len({round(line["result"], 4) for line in lines}) == 4  # the image matters
    assert score.num_images == 4


def test_a_run_resumes_and_refuses_damage(folder, llava, monkeypatch):
    vqa = load_vqa(llava, device="cpu")
    whole = score_folder(folder, vqa, results_file="r.jsonl")
    text = Path("r.jsonl").read_text("utf-8")
    lines = text.splitlines(keepends=True)
    Path("r.jsonl").write_text("".join(lines[:2]) + lines[2][:20], "utf-8")
    asked = []
    answer = vqa.probabilities
    monkeypatch.setattr(vqa, "probabilities", lambda image, *more: asked.append(image) or answer(image, *more))
    assert score_folder(folder, vqa, results_file="r.jsonl") == whole
    assert (len(asked), Path("r.jsonl").read_text("utf-8")) == (2, text)
    for damage, message in (
        ({"probabilities": "x"}, "r.jsonl, line 1: probabilities='x'"),
        ({"probabilities": [0.5]}, "r.jsonl: the line of '.*' has no probability for each of 3 questions"),
        ({"probabilities": [0.5, -1, 0.5]}, "has no probability for each of 3 questions"),
        ({"result": 1e308}, r"r.jsonl, line 1: result=1e\+308, expected 0 to 100"),
    ):
        Path("r.jsonl").write_text(json.dumps(json.loads(lines[0]) | damage) + "\n", "utf-8")
        with pytest.raises(WrongFileError, match=message):
            score_folder(folder, vqa, results_file="r.jsonl")


def test_from_prompts_to_a_comparison(tmp_path, llava):
    model = write_checkpoint(tmp_path / "model", guidance_scale=3.0)
    common = ("--model", model, "--prompts-file", "p.jsonl", "--device", "cpu", "--budget", 0.5)
    for policy in ("full", "ssd"):
        result = run("geneval2", "export", "--output", policy, "--policy", policy, *common)
        assert "2 of 2 images (2 generated now" in result.stdout, result.output
        result = run("geneval2", "score", policy, "--vqa", llava, "--device", "cpu")
        assert result.exit_code == 0, result.output
    summary = json.loads(Path("ssd/results/summary.json").read_text("utf-8"))
    assert (summary["judge"]["scorer"], summary["settings"]["policy"]) == (f"GenEval 2 rules (VQA = {llava})", "ssd")
    table = Path("ssd/results/summary.md").read_text("utf-8")
    for words in (f"| Soft-TIFA GM | {summary['soft_tifa_gm']:.2f} |", "| 3 atoms (GM) |", "| count (AM) |"):
        assert words in table
    assert "2 images of 2 prompts (a part: GenEval 2 has 800 prompts)" in table
    result = run("compare", "full/results", "ssd/results", "-o", "out")
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("out/comparison.json").read_text("utf-8"))["rows"]
    assert [row["score"] for row in rows][1] == pytest.approx(summary["soft_tifa_gm"])
    assert [row["standard_error"] for row in rows][1] == pytest.approx(summary["gm_error"])
    assert [image.caption for image in find_captioned("ssd")] == [row["prompt"] for row in ROWS]
    assert Image.open("ssd/00001/samples/00000.png").size == (SIDE * 16, SIDE * 16)


def test_wrong_use_is_refused(folder, tmp_path):
    result = run("geneval2", "score", "images")
    assert (result.exit_code, "give a folder that `ssd-cache eval geneval2 export` wrote" in result.stderr) == (2, True)
    settings = {"format": "ssd-cache geneval2 export 1", "num_samples": 2}
    Path("images/settings.json").write_text(json.dumps(settings), "utf-8")
    Path("images/prompts.jsonl").write_text(Path("p.jsonl").read_text("utf-8"), "utf-8")
    result = run("geneval2", "score", "images", "--vqa", write_blip(tmp_path / "blip", 32), "--device", "cpu")
    assert (result.exit_code, "a BLIP gives no probabilities of answers" in result.stderr) == (2, True)
    folder.path(3).unlink()
    result = run("geneval2", "score", "images", "--vqa", "blip")
    assert (result.exit_code, "3 of 4 images" in result.stderr) == (2, True)
