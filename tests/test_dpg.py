"""DPG-Bench: files read, rules held to golden vectors and a plain loop, sheets, and whole runs with tiny VQA models.

The golden vectors were made by executing the official script's functions (ELLA, `compute_dpg_bench.py`).
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_judges import WORDS, tiny_tokenizer, write_blip

from ssd_cache.evaluation.dpg.prompts import read_prompts
from ssd_cache.evaluation.dpg.questions import Question, read_questions
from ssd_cache.evaluation.dpg.reading import DPGError
from ssd_cache.evaluation.dpg.rules import apply_dependencies, crop_score, prompt_score, score_answers
from ssd_cache.evaluation.dpg.score import score_sheets
from ssd_cache.evaluation.dpg.sheet import check_sheets, cut_sheet, make_sheet, missing_sheets, write_sheet

REAL_PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "dpg_bench" / "prompts.jsonl"
COLOURS = ["red", "green", "blue", "white"]
SIDE = 32

ROWS = [  # item, id, dependency, broad, detailed, tuple, question
    ("0", "1", "0", "entity", "whole", "entity - whole (car)", "Is there a car?"),
    ("0", "2", "1", "attribute", "color", "attribute - color (car, red)", 'Is the "car" red?'),
    ("0", "3", "1, 2", "relation", "non-spatial", "relation - non-spatial (car, red)", "Is the car, red, driven?"),
    ("whoops5", "1", "0", "global", "-", "global - - (photo)", "Is this a photo?"),
    ("whoops5", "2", "0", "entity", "whole", "entity - whole (dog)", "Is there a dog?"),
]
QUESTIONS = {
    "0": (
        Question("1", "Is there a car?", (), "entity", "whole"),
        Question("2", 'Is the "car" red?', ("1",), "attribute", "color"),
        Question("3", "Is the car, red, driven?", ("1", "2"), "relation", "non-spatial"),
    ),
    "whoops5": (
        Question("1", "Is this a photo?", (), "global", ""),
        Question("2", "Is there a dog?", (), "entity", "whole"),
    ),
}
HEADER = ["item_id", "text", "keywords", "proposition_id", "dependency"]
HEADER += ["category_broad", "category_detailed", "tuple", "question_natural_language"]


def question(proposition_id, *parents, broad="entity", detailed="whole"):
    return Question(str(proposition_id), f"q{proposition_id}?", tuple(map(str, parents)), broad, detailed)


def write_csv(path, rows=ROWS, header=HEADER, text="A car,\nred as can be."):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        for item, number, dependency, broad, detailed, triple, asked in rows:
            cells = [item, text, "car", number, dependency, broad, detailed, triple, asked]
            writer.writerow(dict(zip(HEADER, cells, strict=True)))
    return path


def repack(rows=ROWS):
    items = {}
    for item, number, dependency, broad, detailed, _, asked in rows:
        row = items.setdefault(item, {"item_id": item, "prompt": "A car.", "questions": []})
        names = ("proposition_id", "question", "dependency", "category_broad", "category_detailed")
        row["questions"].append(dict(zip(names, (int(number), asked, dependency, broad, detailed), strict=True)))
    return list(items.values())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def squares(side=SIDE, colours=COLOURS):
    return [Image.new("RGB", (side, side), colour) for colour in colours]


class OneColour:
    """Looks at the picture: yes to every question about a picture of its colour. Notes what it was asked."""

    def __init__(self, colour="red"):
        self.colour, self.name, self.asked = Image.new("RGB", (1, 1), colour).getpixel((0, 0)), colour, []

    def answer(self, image, question):
        assert image.size == (SIDE, SIDE)
        self.asked.append(question)
        return image.getpixel((0, 0)) == self.colour and image.getpixel((SIDE - 1, SIDE - 1)) == self.colour

    def answers(self, image, questions):
        return [self.answer(image, question) for question in questions]


# prompts


def test_prompts_from_lines_and_from_a_folder(tmp_path):
    lines = write_lines(
        tmp_path / "p.jsonl", [{"item_id": "b1", "prompt": "Café\u2028by day. "}, {"item_id": "a", "prompt": "x"}]
    )
    assert list(read_prompts(lines).items()) == [("b1", "Café\u2028by day."), ("a", "x")]
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "b1.txt").write_text("Café\u2028by day.\n", "utf-8")
    (folder / "a.txt").write_text("x ", "utf-8")
    (folder / "notes.md").write_text("no prompt", "utf-8")
    assert read_prompts(folder) == read_prompts(lines)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"item_id": "a", "prompt": "x"}\n\n{"item_id": "a", "prompt": "y"}', "line 3: item id 'a' stands in"),
        ('{"item_id": "a", "prompt": " "}', "line 1: prompt is empty"),
        ('{"item_id": "a", "prompt": "x"}\n{"item', "line 2 is not JSON"),
        ('{"item_id": "a"}', "line 1: no 'prompt'"),
        ('{"item_id": "a", "prompt": 3}', "line 1: prompt is 3"),
        ('{"item_id": "../a", "prompt": "x"}', "line 1: item id '../a' can not name a picture"),
        ('"a"', "line 1: 'a' is no JSON object"),
        ("\n", "has no prompts"),
    ],
)
def test_bad_prompts_are_named(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text(lines, "utf-8")
    with pytest.raises(DPGError, match="p.jsonl") as error:
        read_prompts(path)
    assert message in str(error.value)


def test_bad_prompt_folders_are_named(tmp_path):
    with pytest.raises(DPGError, match="has no prompts"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DPGError, match="a.txt is not UTF-8"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_text(" \n", "utf-8")
    with pytest.raises(DPGError, match="a.txt: the prompt is empty"):
        read_prompts(tmp_path)


def test_the_real_prompts():
    if not REAL_PROMPTS.exists():
        pytest.skip(f"{REAL_PROMPTS.name} of DPG-Bench is not beside this checkout")
    prompts = read_prompts(REAL_PROMPTS)
    assert len(prompts) == 1065
    assert sum(item_id.isdigit() for item_id in prompts) == 299
    assert sum(item_id.startswith("partiprompts") for item_id in prompts) == 324


# questions


def test_both_shapes_give_the_same_questions(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(repack()), "utf-8")
    for path in (
        write_csv(tmp_path / "q.csv"),
        write_lines(tmp_path / "q.jsonl", repack()),
        write_lines(tmp_path / "lines.json", repack()),
        tmp_path / "list.json",
    ):
        read = read_questions(path)
        assert read == QUESTIONS, path
        assert list(read) == ["0", "whoops5"]


def test_parquet_with_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet is read only where pyarrow is installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(repack()), tmp_path / "q.parquet")
    assert read_questions(tmp_path / "q.parquet") == QUESTIONS


def test_parquet_without_pyarrow_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)  # Python's own way to make an import fail
    with pytest.raises(DPGError, match="q.parquet needs pyarrow"):
        read_questions(tmp_path / "q.parquet")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({1: ("0", "1", "0", "e", "w", "e - w (x)", "Twice?")}, "line 4: question '1' of item '0' stands in"),
        ({1: ("0", "2", "1,9", "e", "w", "e - w (x)", "A?")}, "line 4: question '2' of item '0' depends on 1, 9"),
        ({4: ("whoops5", "2", "", "e", "w", "e - w (x)", "A?")}, "line 10: dependency is empty"),
        ({4: ("whoops5", "2", "0", "e", "w", "", "A?")}, "line 10: tuple is empty"),
        ({0: ("0", "1", "0", "e", "w", "e - w (x)", " ")}, "line 2: the question is empty"),
        ({0: ("", "1", "0", "e", "w", "e - w (x)", "A?")}, "line 2: item_id is empty"),
    ],
)
def test_bad_csv_rows_are_named(tmp_path, changed, message):
    rows = [changed.get(number, row) for number, row in enumerate(ROWS)]
    with pytest.raises(DPGError, match="q.csv") as error:
        read_questions(write_csv(tmp_path / "q.csv", rows))
    assert message in str(error.value)


def test_bad_question_files_are_named(tmp_path):
    with pytest.raises(DPGError, match="q.csv, line 1: no column dependency, tuple, only item_id"):
        read_questions(write_csv(tmp_path / "q.csv", header=[n for n in HEADER if n not in ("dependency", "tuple")]))
    (tmp_path / "short.csv").write_text(",".join(HEADER) + "\n0,text\n", "utf-8")
    with pytest.raises(DPGError, match="short.csv, line 2: not 9 fields"):
        read_questions(tmp_path / "short.csv")
    rows = repack()
    del rows[1]["questions"][0]["category_broad"]
    with pytest.raises(DPGError, match="q.jsonl, line 2, question 1: no 'category_broad'"):
        read_questions(write_lines(tmp_path / "q.jsonl", rows))
    with pytest.raises(DPGError, match="q.jsonl has no questions"):
        read_questions(write_lines(tmp_path / "q.jsonl", []))
    with pytest.raises(DPGError, match="q.xls is no question file by its name"):
        read_questions(tmp_path / "q.xls")


def test_official_reading_loses_the_first_question(tmp_path):
    expected = {"0": QUESTIONS["0"][1:], "whoops5": QUESTIONS["whoops5"]}
    assert read_questions(write_csv(tmp_path / "q.csv"), official=True) == expected
    assert read_questions(write_lines(tmp_path / "q.jsonl", repack()), official=True) == expected
    lost = write_lines(tmp_path / "lost.jsonl", repack(ROWS[1:]))  # a re-pack made after the loss
    assert read_questions(lost, official=True) == expected
    with pytest.raises(DPGError, match="lost.jsonl, line 1, question 1: question '2' of item '0' depends on 1"):
        read_questions(lost)


# rules


@pytest.mark.parametrize(
    ("questions", "answers", "expected"),
    [
        ([question(1), question(2, 1), question(3, 2)], [0, 1, 1], 0),
        ([question(1), question(2, 1), question(3, 2)], [1, 0, 1], 1 / 3),
        ([question(1), question(3, 2), question(2, 1)], [0, 1, 1], 1 / 3),  # 3 was looked at before 2 was zeroed
        ([question(1), question(2), question(3, 1, 2)], [1, 0, 1], 1 / 3),
    ],
)
def test_golden_crops(questions, answers, expected):
    assert crop_score(apply_dependencies(answers, questions)) == expected


def test_golden_missing_parent():
    with pytest.raises(KeyError, match="depend on 7, which the item does not have"):
        apply_dependencies([True], [question(1, 7)])


def test_golden_prompt():
    questions = [question(1), question(2, 1, broad="attribute", detailed="color")]
    crops = [[True, True], [False, True], [True, False], [False, False]]
    assert [crop_score(apply_dependencies(crop, questions)) for crop in crops] == [1, 0, 0.5, 0]
    assert prompt_score([apply_dependencies(crop, questions) for crop in crops]) == 0.375
    official = score_answers({"a": questions}, {"a": crops}, official=True)
    assert official.overall == 37.5
    assert official.level1 == {"attribute": 0, "entity": 0}  # of the fourth crop alone
    ours = score_answers({"a": questions}, {"a": crops})
    assert ours.level1 == {"attribute": 50, "entity": 50}  # raw: the second crop's "yes" counts
    assert ours.level2 == {"attribute - color": 50, "entity - whole": 50}
    assert ours.standard_error is None


def test_dpg_is_the_mean_over_prompts():
    questions = {"a": [question(1)], "b": [question(n) for n in range(1, 5)]}
    score = score_answers(questions, {"a": [[True]] * 4, "b": [[False] * 4] * 4})
    assert score.overall == 50
    assert score.standard_error == pytest.approx(50)  # the spread of 0 and 100 is 70.7; over the root of two


def test_official_drops_what_lost_its_parent():
    questions = {"a": [question(2, 1)], "b": [question(1)]}
    answers = {"a": [[True]] * 4, "b": [[True]] * 4, "c": [[True]] * 4}
    score = score_answers(questions, answers, official=True)
    assert score.prompts == {"b": 1}
    assert score.dropped == {"a": "no question 1, on which others depend", "c": "no questions"}
    with pytest.raises(KeyError, match="depend on 1"):
        score_answers(questions, answers)
    with pytest.raises(DPGError, match="none of 1 prompts can be scored"):
        score_answers(questions, {"c": []}, official=True)


def reference(ids, parents, answers):
    """The rule once more in plain loops, on a list."""
    scores = [1 if answer else 0 for answer in answers]
    for row in range(len(ids)):
        for parent in parents[row]:
            for other in range(len(ids)):
                if ids[other] == parent and scores[other] == 0:
                    scores[row] = 0
    return scores


@st.composite
def items(draw):
    ids = draw(st.permutations(range(1, draw(st.integers(1, 8)) + 1)))
    parents = [draw(st.lists(st.sampled_from(ids), max_size=3, unique=True)) for _ in ids]
    return ids, parents, draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))


@given(items())
def test_dependency_rule_equals_the_reference(item):
    ids, parents, answers = item
    questions = [question(number, *above) for number, above in zip(ids, parents, strict=True)]
    assert apply_dependencies(answers, questions) == reference(ids, parents, answers)


# sheets


def test_sheet_is_cut_as_it_was_laid(tmp_path):
    path = write_sheet(tmp_path / "new", "a", squares())
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]  # no temporary file is left
    with Image.open(path) as sheet:
        crops = cut_sheet(sheet, SIDE)
        with pytest.raises(DPGError, match=r"64 x 64; with side=384 it must be 768 x 768.*pass side=32"):
            cut_sheet(sheet, 384)
    assert [crop.tobytes() for crop in crops] == [square.tobytes() for square in squares()]
    assert missing_sheets(tmp_path / "new", ["b", "a", "c"]) == ["b", "c"]
    assert missing_sheets(tmp_path / "none", ["b"]) == ["b"]


def test_bad_sheets_are_named(tmp_path):
    for pictures in (squares()[:3], [*squares()[:3], Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 4))] * 4):
        with pytest.raises(DPGError, match="4 squares of one size"):
            make_sheet(pictures)
    with pytest.raises(DPGError, match="can not name a picture"):
        write_sheet(tmp_path, "../a", squares())
    write_sheet(tmp_path, "a", squares())
    write_sheet(tmp_path, "b", squares())
    assert list(check_sheets(tmp_path, ["b", "a"], SIDE)) == ["b", "a"]
    with pytest.raises(DPGError, match="2 of 3 sheets, not 'c'"):
        check_sheets(tmp_path, ["a", "b", "c"], SIDE)
    with pytest.raises(DPGError, match="no item asked for, 'b'"):
        check_sheets(tmp_path, ["a"], SIDE)
    with pytest.raises(DPGError, match="a.png is 64 x 64"):
        check_sheets(tmp_path, ["a", "b"], 16)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DPGError, match="b.png can not be read"):
        check_sheets(tmp_path, ["a", "b"], SIDE)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DPGError, match="are both of item 'a'"):
        check_sheets(tmp_path, ["a", "b"], SIDE)


# whole runs


def test_scores_of_a_run(tmp_path):
    write_sheet(tmp_path, "0", squares(colours=["red", "red", "red", "blue"]))
    write_sheet(tmp_path, "whoops5", squares(colours=["blue", "red", "blue", "red"]))
    result = score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE)
    assert result.name == "DPG rules (VQA = red)"
    assert result.score.prompts == {"0": 0.75, "whoops5": 0.5}
    assert result.score.overall == 62.5
    assert result.score.standard_error == pytest.approx(12.5)
    assert result.score.level1 == {"attribute": 75, "entity": 62.5, "global": 50, "relation": 75}
    assert result.is_complete
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text("utf-8")) == result.to_dict()
    official = score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE, official=True)
    assert official.name == "DPG rules (VQA = red), official quirks"
    assert official.score.level1 == {"attribute": 0, "entity": 50, "global": 100, "relation": 0}


def test_missing_and_strange_pictures(tmp_path):
    write_sheet(tmp_path, "0", squares())
    vqa = OneColour()
    with pytest.raises(DPGError, match="1 of 2 sheets, not 'whoops5': draw them"):
        score_sheets(tmp_path, QUESTIONS, vqa, SIDE)
    assert score_sheets(tmp_path, QUESTIONS, vqa, SIDE, item_ids=["0"]).score.overall == 25
    official = score_sheets(tmp_path, QUESTIONS, vqa, SIDE, official=True)
    assert official.score.dropped == {"whoops5": "no picture"}
    assert (official.num_prompts, official.is_complete) == (2, False)
    write_sheet(tmp_path, "stranger", squares())
    with pytest.raises(DPGError, match="pictures without questions, 'stranger'"):
        score_sheets(tmp_path, QUESTIONS, vqa, SIDE, item_ids=["0"])
    assert score_sheets(tmp_path, QUESTIONS, vqa, SIDE, official=True).score.dropped["stranger"] == "no questions"
    vqa.asked.clear()
    with pytest.raises(DPGError, match="0.png is 64 x 64"):
        score_sheets(tmp_path, {"0": QUESTIONS["0"], "stranger": QUESTIONS["0"]}, vqa, 384)
    assert not vqa.asked


def test_official_run_drops_the_first_prompt(tmp_path):
    for item_id in QUESTIONS:
        write_sheet(tmp_path / "sheets", item_id, squares(colours=["red"] * 4))
    questions = read_questions(write_csv(tmp_path / "q.csv"), official=True)
    result = score_sheets(tmp_path / "sheets", questions, OneColour(), SIDE, official=True)
    assert result.score.prompts == {"whoops5": 1}
    assert result.score.dropped == {"0": "no question 1, on which others depend"}
    with pytest.raises(DPGError, match="1 items can not be scored"):
        score_sheets(tmp_path / "sheets", questions, OneColour(), SIDE)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no picture"])
def test_unreadable_picture_is_named_and_the_run_goes_on(tmp_path, damage):
    path = write_sheet(tmp_path, "0", squares())
    path.write_bytes(damage(path.read_bytes()))
    write_sheet(tmp_path, "whoops5", squares())
    result = score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE, results=tmp_path / "r.jsonl")
    assert list(result.unreadable) == ["0"]
    assert "0.png: not a whole picture" in result.unreadable["0"]
    assert result.score.prompts == {"whoops5": 0.25}
    assert not result.is_complete
    write_sheet(tmp_path, "0", squares())
    assert score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE, results=tmp_path / "r.jsonl").is_complete
    with pytest.raises(DPGError, match="none of 1 prompts"):
        path.write_bytes(b"")
        score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE, item_ids=["0"])


def test_a_run_goes_on_where_it_stopped(tmp_path):
    for item_id in QUESTIONS:
        write_sheet(tmp_path, item_id, squares())
    results = tmp_path / "r.jsonl"
    whole = score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE, results=results)
    header, first, second = results.read_text("utf-8").splitlines()
    row = json.loads(first)
    assert (row["item_id"], row["answers"][0], row["scores"][1], row["score"]) == ("0", [1] * 3, [0] * 3, 0.25)
    results.write_text(f"{header}\n{first}\n{second[:30]}", "utf-8")  # killed in the middle of a line
    vqa = OneColour()
    assert score_sheets(tmp_path, QUESTIONS, vqa, SIDE, results=results) == whole
    assert set(vqa.asked) == {"Is this a photo?", "Is there a dog?"}
    assert results.read_text("utf-8").splitlines() == [header, first, second]
    write_sheet(tmp_path, "0", squares(colours=["red"] * 4))  # another picture: asked anew
    assert score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE, results=results).score.prompts["0"] == 1
    with pytest.raises(DPGError, match="r.jsonl holds results of"):
        score_sheets(tmp_path, QUESTIONS, OneColour("blue"), SIDE, results=results)
    results.write_text("something else\n", "utf-8")
    with pytest.raises(DPGError, match="r.jsonl is no file of results"):
        score_sheets(tmp_path, QUESTIONS, OneColour(), SIDE, results=results)


# VQA models, tiny and with random weights, saved and loaded

CHAT = (
    "{% for message in messages %}USER {% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT{% endif %}"
)


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return write_blip(tmp_path_factory.mktemp("blip"), SIDE)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **shared, "image_size": SIDE, "patch_size": 16},
        text_config={
            "model_type": "llama",
            **shared,
            "num_key_value_heads": 2,
            "vocab_size": len(WORDS),
            "initializer_range": 0.5,
            "pad_token_id": 0,
            "bos_token_id": 4,
            "eos_token_id": 3,
        },
        image_token_id=WORDS.index("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        images,
        tiny_tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


ASKED = [question.text for questions in QUESTIONS.values() for question in questions]


def test_whole_run_with_blip(blip_folder, tmp_path):
    from ssd_cache.evaluation.dpg import BlipVQA

    vqa = BlipVQA.from_pretrained(blip_folder, name="tiny BLIP", device="cpu")
    for item_id in QUESTIONS:
        write_sheet(tmp_path, item_id, squares())
    result = score_sheets(tmp_path, QUESTIONS, vqa, SIDE, results=tmp_path / "r.jsonl")
    assert result.name == "DPG rules (VQA = tiny BLIP)"
    assert result.is_complete
    assert result.answers["0"][1] == [vqa.answer(squares()[1], asked.text) for asked in QUESTIONS["0"]]
    assert score_sheets(tmp_path, QUESTIONS, vqa, SIDE, results=tmp_path / "r.jsonl") == result


def test_blip_says_what_its_generate_says(blip_folder):
    """A question's answer is that of the model's own documented call, whatever the other questions are."""
    import torch
    from transformers import BlipProcessor

    from ssd_cache.evaluation.dpg import BlipVQA

    processor = BlipProcessor.from_pretrained(blip_folder)
    vqa = BlipVQA.from_pretrained(blip_folder, device="cpu", batch_size=2)
    expected = []
    for text in ASKED:
        inputs = processor(images=squares()[0], text=text, return_tensors="pt")
        output = vqa.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        expected.append(processor.decode(output[0], skip_special_tokens=True).strip().lower())
    assert vqa.texts(squares()[0], ASKED) == expected
    # let an answer end with the word yes, and that word always win, then always lose
    vqa.model.config.text_config.sep_token_id = WORDS.index("yes")
    for bias, answer in ((100.0, True), (-100.0, False)):
        with torch.no_grad():
            vqa.model.text_decoder.cls.predictions.decoder.bias[WORDS.index("yes")] = bias
        assert vqa.answers(squares()[0], ASKED) == [answer] * len(ASKED)


def test_whole_run_with_a_chat_model(llava_folder, tmp_path):
    from ssd_cache.evaluation.dpg import ChatVQA

    vqa = ChatVQA.from_pretrained(llava_folder, name="tiny LLaVA", device="cpu", batch_size=2)
    assert vqa.yes_ids == [WORDS.index("yes"), WORDS.index("Yes")]
    assert vqa.no_ids == [WORDS.index("no"), WORDS.index("No")]
    for item_id in QUESTIONS:
        write_sheet(tmp_path, item_id, squares())
    result = score_sheets(tmp_path, QUESTIONS, vqa, SIDE)
    assert result.name == "DPG rules (VQA = tiny LLaVA)"
    assert result.is_complete
    assert result.answers["0"][1] == [vqa.answer(squares()[1], asked.text) for asked in QUESTIONS["0"]]


def test_chat_probabilities_are_those_of_the_plain_forward(llava_folder):
    """Batched and padded they equal one forward pass a question, without padding."""
    import torch

    from ssd_cache.evaluation.dpg import ChatVQA

    vqa = ChatVQA.from_pretrained(llava_folder, device="cpu", batch_size=3)
    pairs = vqa.log_probabilities(squares()[2], ASKED)
    for text, (yes, no) in zip(ASKED, pairs, strict=True):
        prompt = f"USER <image> {text} Answer with yes or no. ASSISTANT"
        inputs = vqa.processor(images=squares()[2], text=prompt, return_tensors="pt")
        with torch.no_grad():
            scores = vqa.model(**inputs).logits[0, -1].softmax(-1)
        assert scores[vqa.yes_ids].sum().log().item() == pytest.approx(yes, abs=1e-4)  # float32, other order of sums
        assert scores[vqa.no_ids].sum().log().item() == pytest.approx(no, abs=1e-4)
    assert len({round(yes, 3) for yes, _ in pairs}) > 1  # the question matters


def test_unfit_checkpoints_are_refused(blip_folder, llava_folder):
    from transformers import LlavaProcessor

    from ssd_cache.evaluation.dpg import BlipVQA, ChatVQA

    with pytest.raises(DPGError, match="batch_size=0 is out of range"):
        BlipVQA.from_pretrained(blip_folder, batch_size=0)
    vqa = ChatVQA.from_pretrained(llava_folder, device="cpu")
    processor = LlavaProcessor.from_pretrained(llava_folder)
    processor.chat_template = None
    with pytest.raises(DPGError, match="has no chat template"):
        ChatVQA(vqa.model, processor, "plain")


def test_blip_without_its_answering_part_is_refused(blip_folder, tmp_path):
    from transformers import BlipConfig, BlipForConditionalGeneration

    from ssd_cache.evaluation.dpg import BlipVQA

    BlipForConditionalGeneration(BlipConfig.from_pretrained(blip_folder)).save_pretrained(tmp_path)
    with pytest.raises(DPGError, match="has no weights for 'text_encoder"):
        BlipVQA.from_pretrained(tmp_path, device="cpu")
