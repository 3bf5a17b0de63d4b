"""Prompts files, questions, captions and a checkpoint's list of checksums: a changed one is read or refused.

What is read is text that can be written, tokenized and put into a file's name where it names one.
"""

from __future__ import annotations

import json

import pytest
from helpers.fuzzing import GENEVAL2_ROW, check_both, fuzz, fuzz_file
from helpers.hostile import text_mutant
from helpers.tiny_checkpoint import write_checkpoint

from ssd_cache.cli.errors import WrongUse
from ssd_cache.cli.files import read_prompts
from ssd_cache.emoji.captions import TEMPLATES
from ssd_cache.emoji.captions import parse_caption as parse_emoji
from ssd_cache.evaluation import dpg, geneval2
from ssd_cache.evaluation.geneval import prompts as geneval
from ssd_cache.io.showing import ReadableError
from ssd_cache.models import find_generator
from ssd_cache.models.bundled import CHECKSUMS, check_checksums, write_checksums
from ssd_cache.prompts import PROMPTS_FILE, default_prompts
from ssd_cache.shapes.judge import parse_caption as parse_shapes

LINES = "a photo of a red circle\ntwo triangles and a blue square\n\na café, by day\n"


def check_texts(texts):
    """Prompts are texts that are not empty and that UTF-8 can hold."""
    assert texts
    for text in texts:
        assert text.strip()
        text.encode()


def read_on_the_command_line(path):
    """Prompts as the command line reads them; its refusals become the library's, as it prints them."""
    try:
        return read_prompts(None, path)
    except WrongUse as error:
        raise ReadableError(error) from error


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_changed_file_of_prompts_is_read_or_refused(tmp_path, name):
    path = tmp_path / name
    lines = [line for line in LINES.split("\n") if line]
    path.write_text(
        LINES if path.suffix == ".txt" else "".join(json.dumps({"prompt": line}) + "\n" for line in lines), "utf-8"
    )

    def read():
        check_texts(read_on_the_command_line(path))

    check_both(fuzz_file(name, path, read, names_file=False))


def test_a_changed_list_of_prompts_of_a_checkpoint_is_read_or_refused(tmp_path):
    write_checkpoint(tmp_path / "model", with_head_map=False)
    path = tmp_path / "model" / PROMPTS_FILE
    path.write_text(LINES, "utf-8")
    checkpoint = find_generator(str(tmp_path / "model"))
    check_both(fuzz_file("prompts of a checkpoint", path, lambda: check_texts(default_prompts(checkpoint))))


def test_a_changed_file_of_geneval_prompts_is_read_or_refused(tmp_path):
    one, path = {"class": "car", "count": 2, "color": "red"}, tmp_path / "evaluation_metadata.jsonl"
    two = {"class": "dog", "count": 1, "position": ["left of", 0]}
    rows = [
        {"tag": "counting", "include": [one], "exclude": [{"class": "car", "count": 3}], "prompt": "two red cars"},
        {"tag": "position", "include": [one, two], "prompt": "a dog left of a car"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read():
        prompts = geneval.read_prompts(path)
        check_texts([prompt.prompt for prompt in prompts])
        assert [geneval.parse_prompt(prompt.to_json()) for prompt in prompts] == prompts

    check_both(fuzz_file("prompts of GenEval", path, read))


def test_a_changed_file_of_geneval2_prompts_is_read_or_refused(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    path.write_text(f"{json.dumps(GENEVAL2_ROW)}\n{json.dumps({**GENEVAL2_ROW, 'prompt': 'two cars and a dog'})}\n")

    def read():
        prompts = geneval2.read_prompts(path)
        check_texts([prompt.prompt for prompt in prompts])
        for prompt in prompts:
            for pair in prompt.vqa_list:
                geneval2.right_answers(*pair)

    check_both(fuzz_file("prompts of GenEval 2", path, read))


def test_changed_prompts_of_dpg_are_read_or_refused(tmp_path):
    path, folder = tmp_path / "prompts.jsonl", tmp_path / "prompts"
    path.write_text(dpg.prompt_lines({"a1": "a red car, by day", "b-2": "a café"}), "utf-8")
    folder.mkdir()
    (folder / "a1.txt").write_text(LINES, "utf-8")

    def read(place):
        prompts = dpg.read_prompts(place)
        check_texts(list(prompts.values()))
        for number in range(len(prompts)):
            assert not dpg.SheetFolder(tmp_path / "images", prompts).path(4 * number).exists()

    check_both(fuzz_file("prompts of DPG", path, lambda: read(path)))
    check_both(fuzz_file("a prompt of DPG", folder / "a1.txt", lambda: read(folder), names_file=False))


QUESTIONS = """\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
0,"A car,\nred as can be.",car,1,0,entity,whole,entity - whole (car),Is there a car?
0,"A car,\nred as can be.",car,2,1,attribute,color,"attribute - color (car, red)","Is the ""car"" red?"
whoops5,A photo.,photo,1,0,global,-,global - - (photo),Is this a photo?
"""


@pytest.mark.parametrize(
    ("name", "official"), [("questions of DPG", False), ("official questions of DPG", True)], ids=["own", "official"]
)
def test_changed_questions_of_dpg_are_read_or_refused(tmp_path, name, official):
    path = tmp_path / "dpg_bench.csv"
    path.write_text(QUESTIONS, "utf-8")

    def read():
        for questions in dpg.read_questions(path, official=official).values():
            for question in questions:
                assert question.text.strip()
                assert question.category

    check_both(fuzz_file(name, path, read))


def test_changed_captions_are_parsed_or_refused():
    captions = [
        template.format(subject="a red apple", style="noto", background="blue")
        for templates in TEMPLATES.values()
        for template in templates
    ]
    shapes = ["a photo of a red circle", "a photo of two triangles", "a photo of a red circle left of a blue square"]

    def attempt(chance):
        parse, texts = chance.choice(((parse_emoji, captions), (parse_shapes, shapes)))
        text = chance.choice(texts)
        if chance.random() < 0.5:
            text = text_mutant(text, chance)
        if chance.random() < 0.02:
            text = " ".join(f"word{number}" for number in range(20_000))
        parse(text)

    check_both(fuzz("captions", attempt))


def test_changed_checksums_of_a_bundled_model_are_read_or_refused(tmp_path):
    for name in ("model.safetensors", "more.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    write_checksums(tmp_path)
    good = set((tmp_path / CHECKSUMS).read_text().splitlines())

    def read():
        check_checksums("model", tmp_path)
        assert good <= set((tmp_path / CHECKSUMS).read_text("utf-8-sig").splitlines())  # no file is left unchecked

    check_both(fuzz_file("checksums", tmp_path / CHECKSUMS, read, names_file=False), 0.001)
