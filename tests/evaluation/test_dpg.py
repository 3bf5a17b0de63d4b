"""DPG-Bench: files read, rules held to golden vectors and a plain loop, sheets, and whole runs with tiny VQA models.

The golden vectors were made by executing the official script's functions (ELLA, `compute_dpg_bench.py`).
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from helpers.tiny_judges import WORDS, write_blip, write_llava
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssd_cache.evaluation.dpg.folder import SheetFolder, cut_sheet, find_sheets, read_prompts, write_sheet
from ssd_cache.evaluation.dpg.questions import Question, read_questions
from ssd_cache.evaluation.dpg.score import apply_dependencies, category_scores, prompt_score, score_sheets
from ssd_cache.evaluation.vqa import ChatVQA, load_vqa
from ssd_cache.io.showing import ReadableError

REAL_PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "dpg_bench" / "prompts.jsonl"
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


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def squares(side=SIDE, colours=COLOURS):
    return [Image.new("RGB", (side, side), colour) for colour in colours]


class OneColour:
    """Answers yes to every question about an image of its colour, and records the questions."""

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
        ('{"item_id": "a", "prompt": "x"}\n\n{"item_id": "a", "prompt": "y"}', "line 3: item id 'a' occurs twice"),
        ('{"item_id": "a", "prompt": " "}', "line 1: the prompt is empty"),
        ('{"item_id": "a", "prompt": "x"}\n{"item', "line 2: not a JSON object"),
        ('{"item_id": "a"}', 'needs texts as "item_id" and "prompt"'),
        ('{"item_id": "a", "prompt": 3}', 'needs texts as "item_id" and "prompt"'),
        ('{"item_id": "../a", "prompt": "x"}', "line 1: item id '../a' cannot name an image"),
        (json.dumps({"item_id": "a" * 201, "prompt": "x"}), "aaa' cannot name an image; use at most 200 letters"),
        ('{"item_id": true, "prompt": "x"}', 'needs texts as "item_id" and "prompt"'),
        ('"a"', "line 1: not a JSON object"),
        ("\n", "has no prompts"),
    ],
)
def test_bad_prompts_are_named(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text(lines, "utf-8")
    with pytest.raises(ValueError, match="p.jsonl") as error:
        read_prompts(path)
    assert message in str(error.value)


def test_bad_prompt_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no prompts"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_text(" \n", "utf-8")
    with pytest.raises(ValueError, match="a.txt: the prompt is empty"):
        read_prompts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(ReadableError, match="a.txt: not in UTF-8"):
        read_prompts(tmp_path)


def test_the_real_prompts():
    if not REAL_PROMPTS.exists():
        pytest.skip(f"{REAL_PROMPTS.name} of DPG-Bench is not beside this checkout")
    prompts = read_prompts(REAL_PROMPTS)
    assert len(prompts) == 1065
    assert sum(item_id.isdigit() for item_id in prompts) == 299
    assert sum(item_id.startswith("partiprompts") for item_id in prompts) == 324


# questions


def test_questions_are_read_in_the_order_of_the_file(tmp_path):
    read = read_questions(write_csv(tmp_path / "q.csv"))
    assert read == QUESTIONS
    assert list(read) == ["0", "whoops5"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({1: ("0", "1", "0", "e", "w", "e - w (x)", "Twice?")}, "row 3: question '1' of item '0' occurs twice"),
        ({1: ("0", "2", "1,9", "e", "w", "e - w (x)", "A?")}, "questions of item '0' depend on 9, which it lacks"),
        ({4: ("whoops5", "2", "", "e", "w", "e - w (x)", "A?")}, "row 6: dependency is empty"),
        ({4: ("whoops5", "2", "0", "e", "w", "", "A?")}, "row 6: tuple is empty"),
        ({4: ("whoops5", "2", "0", "e", "w", "(dog)", "A?")}, "row 6: tuple '(dog)' begins with no category"),
        ({0: ("0", "1", "0", "e", "w", "e - w (x)", " ")}, "row 2: question_natural_language is empty"),
        ({0: ("", "1", "0", "e", "w", "e - w (x)", "A?")}, "row 2: item_id is empty"),
    ],
)
def test_bad_csv_rows_are_named(tmp_path, changed, message):
    rows = [changed.get(number, row) for number, row in enumerate(ROWS)]
    with pytest.raises(ValueError, match="q.csv") as error:
        read_questions(write_csv(tmp_path / "q.csv", rows))
    assert message in str(error.value)


def test_bad_question_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="q.csv: no column dependency, tuple, only item_id"):
        read_questions(write_csv(tmp_path / "q.csv", header=[n for n in HEADER if n not in ("dependency", "tuple")]))
    (tmp_path / "short.csv").write_text(",".join(HEADER) + "\n0,text\n", "utf-8")
    with pytest.raises(ValueError, match="short.csv, row 2: not 9 fields"):
        read_questions(tmp_path / "short.csv")
    with pytest.raises(ValueError, match="q.csv has no questions"):
        read_questions(write_csv(tmp_path / "q.csv", []))
    for content, message in ((b"item_id\xe9", "not in UTF-8"), (b'"item_id"x,text\n', "',' expected after")):
        (tmp_path / "q.csv").write_bytes(content)
        with pytest.raises(ReadableError, match=f"q.csv.*: {message}"):
            read_questions(tmp_path / "q.csv")


def test_official_reading_loses_the_first_question(tmp_path):
    expected = {"0": QUESTIONS["0"][1:], "whoops5": QUESTIONS["whoops5"]}
    assert read_questions(write_csv(tmp_path / "q.csv"), official=True) == expected
    with pytest.raises(ValueError, match="lost.csv: questions of item '0' depend on 1, which it lacks"):
        read_questions(write_csv(tmp_path / "lost.csv", ROWS[1:]))


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
    assert prompt_score([apply_dependencies(answers, questions)]) == expected


def test_golden_missing_parent():
    with pytest.raises(KeyError, match="7"):
        apply_dependencies([True], [question(1, 7)])


def test_golden_prompt():
    questions = [question(1), question(2, 1, broad="attribute", detailed="color")]
    crops = [[True, True], [False, True], [True, False], [False, False]]
    counted = [apply_dependencies(crop, questions) for crop in crops]
    assert [prompt_score([crop]) for crop in counted] == [1, 0, 0.5, 0]
    assert prompt_score(counted) == 0.375
    # raw: the second crop's "yes" counts
    assert category_scores([(questions, crops)], lambda asked: asked.broad) == {"attribute": 50, "entity": 50}
    assert category_scores([(questions, crops)], lambda asked: asked.category) == {
        "attribute - color": 50,
        "entity - whole": 50,
    }


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


def test_a_sheet_is_cut_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "a.png"
    write_sheet(path, squares())
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]  # no temporary file is left
    with Image.open(path) as sheet:
        crops = cut_sheet(sheet)
        with pytest.raises(ValueError, match="a.png is 64 x 60, not four images in a square; generate it again"):
            cut_sheet(sheet.crop((0, 0, 64, 60)), "a.png")
    assert [crop.tobytes() for crop in crops] == [square.tobytes() for square in squares()]


def test_missing_sheets_are_written(tmp_path):
    folder = SheetFolder(tmp_path / "new", {"b": "x", "a": "y", "c": "z"})
    assert folder.texts == ["x"] * 4 + ["y"] * 4 + ["z"] * 4
    assert folder.missing(range(12)) == list(range(12))
    write_sheet(folder.root / "a.png", squares())
    before = (folder.root / "a.png").stat()
    assert folder.missing(range(12)) == [0, 1, 2, 3, 8, 9, 10, 11]
    folder.write(range(4, 12), squares(colours=["red"] * 8))
    assert folder.missing(range(12)) == [0, 1, 2, 3]
    assert (folder.root / "a.png").stat().st_mtime_ns == before.st_mtime_ns


def test_bad_sheets_are_named(tmp_path):
    for images in (squares()[:3], [*squares()[:3], Image.new("RGB", (8, 8))], [Image.new("RGB", (8, 4))] * 4):
        with pytest.raises(ValueError, match="4 squares of one size"):
            write_sheet(tmp_path / "a.png", images)
    write_sheet(tmp_path / "a.png", squares())
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="are both of item 'a'"):
        find_sheets(tmp_path)


# whole runs


def test_scores_of_a_run(tmp_path):
    write_sheet(tmp_path / "0.png", squares(colours=["red", "red", "red", "blue"]))
    write_sheet(tmp_path / "whoops5.png", squares(colours=["blue", "red", "blue", "red"]))
    result = score_sheets(tmp_path, QUESTIONS, OneColour())
    assert result.judge["scorer"] == "DPG rules (VQA = red)"
    assert result.prompts == {"0": 75, "whoops5": 50}
    assert result.overall == 62.5
    assert result.standard_error == pytest.approx(12.5 / 2**0.5)
    assert result.level1 == {"attribute": 75, "entity": 62.5, "global": 50, "relation": 75}
    official = score_sheets(tmp_path, QUESTIONS, OneColour(), official=True)
    assert official.judge["scorer"] == "DPG rules (VQA = red), official quirks"
    assert official.level1 == {"attribute": 0, "entity": 50, "global": 100, "relation": 0}


def test_missing_and_unexpected_images(tmp_path):
    write_sheet(tmp_path / "0.png", squares())
    vqa = OneColour()
    with pytest.raises(ValueError, match="1 of 2 sheets; missing: whoops5; generate them"):
        score_sheets(tmp_path, QUESTIONS, vqa)
    assert score_sheets(tmp_path, QUESTIONS, vqa, item_ids=["0"]).overall == 25
    official = score_sheets(tmp_path, QUESTIONS, vqa, official=True)
    assert official.dropped == {"whoops5": "no image"}
    write_sheet(tmp_path / "stranger.png", squares())
    with pytest.raises(ValueError, match="images without questions: stranger"):
        score_sheets(tmp_path, QUESTIONS, vqa, item_ids=["0"])
    assert score_sheets(tmp_path, QUESTIONS, vqa, official=True).dropped["stranger"] == "no questions"
    vqa.asked.clear()
    Image.new("RGB", (64, 62)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="0.png is 64 x 62"):
        score_sheets(tmp_path, {"0": QUESTIONS["0"], "stranger": QUESTIONS["0"]}, vqa)
    assert not vqa.asked


def test_official_run_drops_the_first_prompt(tmp_path):
    for item_id in QUESTIONS:
        write_sheet(tmp_path / "sheets" / f"{item_id}.png", squares(colours=["red"] * 4))
    questions = read_questions(write_csv(tmp_path / "q.csv"), official=True)
    result = score_sheets(tmp_path / "sheets", questions, OneColour(), official=True)
    assert result.prompts == {"whoops5": 100}
    assert result.dropped == {"0": "no question 1, on which others depend"}
    with pytest.raises(ValueError, match="1 items cannot be scored"):
        score_sheets(tmp_path / "sheets", questions, OneColour())


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no image"])
def test_an_unreadable_sheet_stops_the_run_and_its_results_are_kept(tmp_path, damage):
    for item_id in QUESTIONS:
        write_sheet(tmp_path / f"{item_id}.png", squares())
    path, results = tmp_path / "whoops5.png", tmp_path / "r.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="whoops5.png: the image cannot be read .* delete it"):
        score_sheets(tmp_path, QUESTIONS, OneColour(), results_file=results)
    write_sheet(path, squares())
    vqa = OneColour()
    assert score_sheets(tmp_path, QUESTIONS, vqa, results_file=results).prompts == {"0": 25, "whoops5": 25}
    assert set(vqa.asked) == {"Is this a photo?", "Is there a dog?"}
    path.unlink()
    with pytest.raises(ValueError, match="no prompt can be scored .no image."):
        score_sheets(tmp_path, QUESTIONS, vqa, item_ids=["whoops5"], official=True)


def test_a_run_resumes_where_it_stopped(tmp_path):
    for item_id in QUESTIONS:
        write_sheet(tmp_path / f"{item_id}.png", squares())
    results = tmp_path / "r.jsonl"
    whole = score_sheets(tmp_path, QUESTIONS, OneColour(), results_file=results)
    first, second = results.read_text("utf-8").splitlines()
    row = json.loads(first)
    assert (row["filename"], row["answers"][0], row["answers"][1], row["result"]) == ("0.png", [1] * 3, [0] * 3, 25)
    results.write_text(f"{first}\n{second[:30]}", "utf-8")  # killed in the middle of a line
    vqa = OneColour()
    assert score_sheets(tmp_path, QUESTIONS, vqa, results_file=results) == whole
    assert set(vqa.asked) == {"Is this a photo?", "Is there a dog?"}
    assert results.read_text("utf-8").splitlines() == [first, second]
    write_sheet(tmp_path / "0.png", squares(colours=["red"] * 4))  # another image: asked again
    assert score_sheets(tmp_path, QUESTIONS, OneColour(), results_file=results).prompts["0"] == 100
    other = QUESTIONS | {"0": QUESTIONS["0"][:1]}  # other questions: asked again
    vqa.asked.clear()
    score_sheets(tmp_path, other, vqa, results_file=results)
    assert set(vqa.asked) == {"Is there a car?"}
    with pytest.raises(ValueError, match="r.jsonl, line 1: a result of another run"):
        score_sheets(tmp_path, QUESTIONS, OneColour("blue"), results_file=results)
    for damage, message in (
        ("x", "r.jsonl, line 1: answers='x'"),
        ([[1]], "the line of .* has no answers to 2 questions"),
    ):
        results.write_text(json.dumps(json.loads(second) | {"answers": damage}) + "\n", "utf-8")
        with pytest.raises(ValueError, match=message):
            score_sheets(tmp_path, QUESTIONS, OneColour(), results_file=results)
    results.write_text("something else\n", "utf-8")
    with pytest.raises(ValueError, match="r.jsonl, line 1: Expecting value"):
        score_sheets(tmp_path, QUESTIONS, OneColour(), results_file=results)


# VQA models, tiny and with random weights, saved and loaded


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return write_blip(tmp_path_factory.mktemp("blip"), SIDE)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"), SIDE)


ASKED = [question.text for questions in QUESTIONS.values() for question in questions]


def test_whole_run_with_blip(blip_folder, tmp_path):
    vqa = load_vqa(blip_folder, device="cpu")
    for item_id in QUESTIONS:
        write_sheet(tmp_path / f"{item_id}.png", squares())
    result = score_sheets(tmp_path, QUESTIONS, vqa, results_file=tmp_path / "r.jsonl")
    assert result.judge["scorer"] == f"DPG rules (VQA = {blip_folder})"
    assert result.answers["0"][1] == [vqa.answers(squares()[1], [asked.text])[0] for asked in QUESTIONS["0"]]
    assert score_sheets(tmp_path, QUESTIONS, vqa, results_file=tmp_path / "r.jsonl") == result


def test_blip_answers_are_those_of_generate(blip_folder):
    """A question's answer is that of the model's own documented call, whatever the other questions are."""
    import torch
    from transformers import BlipProcessor

    processor = BlipProcessor.from_pretrained(blip_folder)
    vqa = load_vqa(blip_folder, device="cpu", batch_size=2)
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
    vqa = load_vqa(llava_folder, device="cpu", batch_size=2)
    assert vqa.yes_ids == [WORDS.index("yes"), WORDS.index("Yes")]
    assert vqa.no_ids == [WORDS.index("no"), WORDS.index("No")]
    for item_id in QUESTIONS:
        write_sheet(tmp_path / f"{item_id}.png", squares())
    result = score_sheets(tmp_path, QUESTIONS, vqa)
    assert result.judge["scorer"] == f"DPG rules (VQA = {llava_folder})"
    assert result.answers["0"][1] == [vqa.answers(squares()[1], [asked.text])[0] for asked in QUESTIONS["0"]]


def test_chat_probabilities_are_those_of_the_plain_forward(llava_folder):
    """Batched and padded they equal one forward pass a question, without padding."""
    import torch

    vqa = load_vqa(llava_folder, device="cpu", batch_size=3)
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

    with pytest.raises(ValueError, match="batch_size=0 is out of range"):
        load_vqa(blip_folder, batch_size=0)
    vqa = load_vqa(llava_folder, device="cpu")
    processor = LlavaProcessor.from_pretrained(llava_folder)
    processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ChatVQA(vqa.model, processor, "plain")


def test_blip_without_its_answering_part_is_refused(blip_folder, tmp_path):
    from transformers import BlipConfig, BlipForConditionalGeneration

    BlipForConditionalGeneration(BlipConfig.from_pretrained(blip_folder)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights are missing, such as text_encoder"):
        load_vqa(tmp_path, device="cpu")
