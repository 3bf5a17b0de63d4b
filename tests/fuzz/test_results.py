"""Result lines, settings and reports of evaluations: a changed file is read or refused, and a report is never broken.

Each file is first written by the library itself. Judges answer once, and would have to work for lines that are gone.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from helpers.fuzzing import GENEVAL2_ROW, WouldWork, check_both, fuzz_file
from helpers.pages import pages
from PIL import Image

from ssd_cache.bench.results import Report, Row
from ssd_cache.bench.roofline import Machine, StepWork
from ssd_cache.evaluation import bootstrap, geneval, geneval2
from ssd_cache.evaluation.comparing import compare_results
from ssd_cache.evaluation.dpg import Question, score_sheets, write_sheet
from ssd_cache.evaluation.export import ExportError, claim_folder, read_settings, recorded_batch_size
from ssd_cache.evaluation.geneval.score import summarize
from ssd_cache.evaluation.image_folders import find_captioned, find_images
from ssd_cache.evaluation.judge_models import decode_image
from ssd_cache.evaluation.results_folder import Record, ResultsError, ResultsFolder
from ssd_cache.evaluation.scoring import judge_files
from ssd_cache.evaluation.tables import read_summary, to_json, to_markdown
from ssd_cache.io.showing import ReadableError
from ssd_cache.io.untrusted import checked
from ssd_cache.reproducing.stages import read_scores, read_speeds
from ssd_cache.runs.run_state import ProfilingError

RUN: dict[str, Any] = {
    "conditions": {
        "bench": "shapes",
        "grid": [24, 24],
        "num_per_kind": 1,
        "prompt_seed": 1,
        "batch_size": 4,
        "settings": {"buffer": 24},
        "guidance_scale": 3.0,
        "temperature": 1.0,
        "dtype": "float32",
        "device": "cpu",
    },
    "policies": {"full": {"settings": {}, "slots": {"1.0": 576}, "head_map": "0123"}},
    "command": {"model": "shapes-janus", "head_map": None},
}
REPORT_TAGS = {"h1", "h2", "p", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}


def _record(prompt, correct=True):
    reason = "" if correct else "expected 1 circle, found nothing"
    caption = "a photo of a circle"
    return Record("full", {}, 1.0, 576, "0123", 0, prompt, "single_object", caption, correct, reason)


@pytest.fixture
def shapes(tmp_path):
    folder = tmp_path / "run"
    with ResultsFolder(folder, RUN) as results:
        results.append([_record(number, number != 1) for number in range(3)])
    return folder


def check_report(folder):
    """The report of a folder is JSON, and Markdown without other tags than every report has."""
    summary, _ = read_summary([folder])
    json.dumps(to_json(summary), allow_nan=False)
    for page in pages(to_markdown(summary)):
        assert set(page.tags) <= REPORT_TAGS, set(page.tags) - REPORT_TAGS
        assert not page.links


def test_changed_conditions_of_a_benchmark_are_read_or_refused(shapes):
    def read():
        check_report(shapes)
        ResultsFolder(shapes, RUN).close()

    check_both(fuzz_file("run.json", shapes / "run.json", read, errors=(ResultsError,), names_file=False))


def test_changed_lines_of_a_benchmark_are_read_or_refused(shapes):
    def read():
        with suppress(ResultsError):  # no line that can be read
            check_report(shapes)
        with ResultsFolder(shapes, RUN) as results:
            results.append([_record(number, number != 1) for number in range(3)])

    check_both(fuzz_file("lines of shapes", shapes / "results-0.jsonl", read, errors=(ResultsError,)))


def test_changed_settings_of_images_are_read_or_refused(tmp_path):
    settings = {"format": "ssd-cache geneval export 1", "model": "m", "budget": 0.2, "seed": 0, "grid": [24, 24]}
    root = tmp_path / "images"
    claim_folder(root, settings, "{}\n")

    def read():
        read_settings(root)
        recorded_batch_size(root)
        claim_folder(root, settings, "{}\n")

    check_both(
        fuzz_file("settings of images", root / "settings.json", read, errors=(ExportError,), names_file=False), 0.001
    )


class Judge:
    """Answers as a VQA model would until `is_done`; then whoever asks would have to work."""

    name, is_done = "a judge", False

    def answers(self, image, questions):
        if self.is_done:
            raise WouldWork
        return [True, False, True][: len(questions)]

    def probabilities(self, image, texts, answers):
        if self.is_done:
            raise WouldWork
        return [0.9, 0.4][: len(texts)]


def test_changed_answers_of_dpg_are_scored_or_refused(tmp_path):
    questions = {
        name: (Question("1", "a car?", (), "entity", "whole"), Question("2", "red?", ("1",), "attribute", "color"))
        for name in ("a", "b")
    }
    for name in questions:
        write_sheet(tmp_path / "images" / f"{name}.png", [Image.new("RGB", (2, 2))] * 4)
    judge, path = Judge(), tmp_path / "results.jsonl"

    def read():
        score = score_sheets(tmp_path / "images", questions, judge, results_file=path)
        assert 0 <= score.overall <= 100
        json.dumps(bootstrap.to_json(score), allow_nan=False)

    read()
    judge.is_done = True
    check_both(fuzz_file("answers of DPG", path, read))


def write_geneval2(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({**GENEVAL2_ROW, "prompt": f"a dog and two cars {number}"}) + "\n" for number in range(2))
    )
    folder = geneval.SampleFolder(tmp_path / "images", geneval2.read_prompts(path), 1)
    folder.write(range(2), [Image.new("RGB", (2, 2))] * 2)
    return folder


def test_changed_probabilities_of_geneval2_are_scored_or_refused(tmp_path):
    folder, judge, path = write_geneval2(tmp_path), Judge(), tmp_path / "results.jsonl"

    def read():
        score = geneval2.score_folder(folder, judge, results_file=path)
        assert 0 <= score.soft_tifa_gm <= 100
        json.dumps(bootstrap.to_json(score), allow_nan=False)

    read()
    judge.is_done = True
    check_both(fuzz_file("probabilities of GenEval 2", path, read))


def test_changed_results_of_images_are_read_compared_or_refused(tmp_path):
    judge, path, files = (
        {"benchmark": "GenEval", "detector": "d", "rules": {"threshold": 0.3}},
        tmp_path / "results.jsonl",
        [],
    )
    for number in range(3):
        image = tmp_path / f"0000{number}.png"
        Image.new("RGB", (2, 2)).save(image)
        files.append((image, {"filename": image.name, "tag": "colors", "metadata": str(number)}))
    judge_files(files, lambda number, image: {"result": float(number > 0)}, judge, path)
    first = tmp_path / "first.jsonl"
    first.write_bytes(path.read_bytes())

    def work(number, image):
        raise WouldWork

    def read():
        lines = judge_files(files, work, judge, path)
        assert 0 <= summarize(lines).overall <= 1

    def compare():
        json.dumps(compare_results([first, path]).to_dict(), allow_nan=False)

    check_both(fuzz_file("results of images", path, read))
    check_both(fuzz_file("compared results", path, compare))


def test_changed_metadata_of_geneval_images_are_read_or_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"tag": "counting", "include": [{"class": "car", "count": 2}], "prompt": "two cars"}\n')
    folder = geneval.SampleFolder(tmp_path / "images", geneval.read_prompts(path), 1)
    folder.write(range(1), [Image.new("RGB", (2, 2))])

    def read():
        find_images(folder.root)
        find_captioned(folder.root)
        with suppress(ReadableError):
            folder.check_complete()

    metadata = folder.root / "00000" / "metadata.jsonl"
    check_both(fuzz_file("metadata of GenEval", metadata, read), 0.005)


def test_a_changed_list_of_captions_is_read_or_refused(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps({"file_name": f"{name}.png", "prompt": f"a {name}"}) + "\n" for name in "ab"))

    def read():
        for image in find_captioned(tmp_path):
            assert image.path.resolve().is_relative_to(tmp_path.resolve())
            image.caption.encode()

    check_both(fuzz_file("list of captions", path, read, names_file=False))


def test_a_changed_image_is_decoded_or_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.radial_gradient("L").resize((40, 30)).convert("RGB").save(path)
    check_both(
        fuzz_file("image file", path, lambda: decode_image(path.read_bytes(), path), errors=(ReadableError,)), 0.01
    )


def test_a_changed_part_of_a_reproduction_is_read_or_refused(tmp_path):
    differing = {"first": "a", "second": "b", "difference": 0.1, "low": None, "high": None, "p": None, "num_prompts": 2}
    row = {"policy": "full", "budget": 1.0, "results": {"overall": 0.5, "standard_error": None}}
    content = {"judge": {"scorer": "s"}, "num_prompts": 2, "rows": [row], "differences": [differing]}
    path = tmp_path / "geneval.json"
    path.write_text(json.dumps(content))

    def read():
        found = read_scores(path, 1)
        assert found["judge"]["scorer"] is not None
        assert found["rows"][0]["results"].keys() >= {"standard_error"}

    check_both(fuzz_file("scores of a reproduction", path, read, errors=(ProfilingError,)))


def test_a_changed_report_of_a_bench_is_read_or_refused(tmp_path):
    rows = [Row("ssd 20%", 1, seconds=[0.5], key_value=10, work=StepWork(1, 2.0, 3.0)), Row("other", 1, failure="no")]
    path = tmp_path / "batch-1.json"
    path.write_text(Report("ssd-cache bench", {"model": "m"}, Machine(1e9, 1e12), rows).to_json())

    def read():
        found = [checked(Row, row) for row in read_speeds(path)]
        Report("ssd-cache bench", {"model": "m"}, Machine(1e9, 1e12), found).to_markdown()

    check_both(fuzz_file("report of a bench", path, read, errors=(ProfilingError,)))
