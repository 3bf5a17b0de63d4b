"""GenEval's rules against vectors that its own code gave, the folder, and the whole run with small random models.

The rules are held to numbers of the official functions, the detector to a recomputation in plain loops. What trained
weights detect in real images is not tested here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_judges import write_classifier, write_detector
from PIL import Image

from ssd_cache.evaluation.geneval import SCORER, ColorClassifier, Detector, SampleFolder, read_prompts, score_folder
from ssd_cache.evaluation.geneval import detector as detector_module
from ssd_cache.evaluation.geneval.colors import TEMPLATES, cut_out
from ssd_cache.evaluation.geneval.detector import MEAN, STD, prepare
from ssd_cache.evaluation.geneval.prompts import CLASSES, COLORS, TAGS, parse_prompt
from ssd_cache.evaluation.geneval.rules import Detection, judge, objects_of
from ssd_cache.evaluation.geneval.score import summarize

OFFICIAL_FILE = Path(__file__).parents[3] / "shared" / "data" / "geneval" / "evaluation_metadata.jsonl"

BENCH = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}'
CLOCKS = (
    '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], '
    '"prompt": "a photo of two clocks"}'
)
BLUE_CAR = (
    '{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "blue"}], "prompt": "a photo of a blue car"}'
)
DOG_RIGHT = (
    '{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, '
    '"position": ["right of", 0]}], "prompt": "a photo of a dog right of a teddy bear"}'
)
TWO = (
    '{"tag": "two_object", "include": [{"class": "apple", "count": 1}, {"class": "banana", "count": 1}], '
    '"prompt": "a photo of an apple and a banana"}'
)


def seen(name, score=0.95, box=(0, 0, 100, 100), mask=None):
    return Detection(CLASSES.index(name), score, box, mask)


def verdict(line, detections, colors=()):
    """The reasons against some detections, whose colours are given by their place in the list."""
    prompt = parse_prompt(line)
    table = {id(item): color for item, color in zip(detections, colors, strict=False)}
    objects = objects_of(detections, prompt.tag)
    return judge(prompt, objects, lambda found, name: [table[id(item)] for item in found])


# The rules: numbers of the official functions


@pytest.mark.parametrize(("number", "correct"), [(0, False), (1, False), (2, True), (3, False), (4, False)])
def test_counting_requires_the_exact_number(number, correct):
    reasons = verdict(CLOCKS, [seen("clock", 0.95, (50 * i, 0, 50 * i + 40, 40)) for i in range(number)])
    assert bool(reasons) != correct


def test_position():
    bear, dog = seen("teddy bear", 0.9, (0, 0, 100, 100)), seen("dog", 0.8, (200, 0, 300, 100))
    assert not verdict(DOG_RIGHT, [bear, dog])
    better = seen("dog", 0.9, (-200, 0, -100, 100))
    assert verdict(DOG_RIGHT, [bear, dog, better])
    missing = verdict(DOG_RIGHT, [dog])
    assert missing == ["expected teddy bear>=1, found 0", "no teddy bear for the dog to be right of"]
    assert verdict(DOG_RIGHT, [bear]) == ["expected dog>=1, found 0"]


def test_colors_are_checked_for_the_best_objects_only():
    first, second = seen("car", 0.95), seen("car", 0.5)
    assert verdict(BLUE_CAR, [first, second], ["red", "blue"]) == ["expected blue car>=1, found red"]
    assert not verdict(BLUE_CAR, [first, second], ["blue", "red"])


def test_other_objects_are_never_wrong():
    many = [seen("apple", 0.5, (i, 0, i + 9, 9)) for i in range(5)]
    assert not verdict(TWO, [*many, seen("banana"), seen("zebra")])


def test_scores_count_above_the_cut():
    at, above = seen("bench", 0.3), seen("bench", 0.3001)
    assert objects_of([at, above], "colors") == {"bench": [above]}
    assert objects_of([seen("clock", 0.9), seen("clock", 0.89)], "counting") == {}
    many = [seen("person", 0.4 + i / 100) for i in range(20)]
    assert objects_of(many, "colors")["person"] == many[:3:-1]


def result(tag, metadata, correct):
    return {"tag": tag, "metadata": metadata, "result": float(correct), "judge": {"scorer": SCORER}}


def test_overall_is_the_mean_of_tags():
    results = [result("counting", "a", True), result("counting", "a", False), result("counting", "b", False)]
    results += [result("counting", "b", False), result("colors", "c", True), result("colors", "c", True)]
    score = summarize(results)
    assert score.tags == {"counting": 0.25, "colors": 1.0}
    assert score.overall == 0.625
    assert score.images_correct == 0.5
    assert score.prompts_correct == 2 / 3
    assert score.num_images == {"counting": 4, "colors": 2}
    assert score.num_prompts == {"counting": 2, "colors": 1}
    assert score.judge["scorer"] == SCORER == "GenEval rules, HF detector"
    # by prompt 0.5 and 0, the standard deviation of which is 0.25; a single prompt has no spread
    assert score.tag_errors == {
        "counting": pytest.approx(0.25 / 2**0.5),
        "colors": pytest.approx(math.nan, nan_ok=True),
    }
    assert math.isnan(score.standard_error)


# The prompt file


def test_names():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("computer mouse", "tv remote", "computer keyboard")] == [64, 65, 66]


def test_the_official_prompts():
    if not OFFICIAL_FILE.is_file():
        pytest.skip("GenEval's evaluation_metadata.jsonl is not beside this checkout")
    prompts = read_prompts(OFFICIAL_FILE)
    assert [sum(prompt.tag == tag for prompt in prompts) for tag in TAGS] == [80, 99, 80, 94, 100, 100]
    assert len(prompts) == 553
    lines = OFFICIAL_FILE.read_text("utf-8").splitlines()
    assert [json.loads(prompt.to_json()) for prompt in prompts] == [json.loads(line) for line in lines]


@pytest.mark.parametrize("line", [BENCH, CLOCKS, BLUE_CAR, DOG_RIGHT, TWO])
def test_a_prompt_is_written_as_it_was_read(line):
    assert parse_prompt(line).to_json() == line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
        (BENCH.replace("bench", "settee", 1), "class='settee'"),
        (BENCH.replace("single_object", "single"), "tag='single'"),
        (BENCH.replace('"count": 1', '"count": 0'), "count=0"),
        (BENCH.replace('"count": 1', '"count": true'), "include[0].count=True"),
        (BENCH.replace('"prompt"', '"text"'), "'prompt' is missing"),
        (BENCH.replace("a photo of a bench", " "), "prompt or include is empty"),
        (BENCH.replace('"tag"', '"id": 1, "tag"'), "it has 'id'"),
        (BENCH.replace('[{"class": "bench", "count": 1}]', "[]"), "prompt or include is empty"),
        (BENCH.replace('[{"class": "bench", "count": 1}]', "1"), "include=1"),
        (BLUE_CAR.replace("blue", "teal", 1), "include[0].color='teal'"),
        (DOG_RIGHT.replace("right of", "behind", 1), "include[1].position[0]='behind'"),
        (DOG_RIGHT.replace("0]", "1]"), "relative to entry 1"),
        (DOG_RIGHT.replace('["right of", 0]', '"right of"'), "include[1].position='right of'"),
        (CLOCKS.replace('"class": "clock", "count": 3', '"class": "clock"'), "'exclude[0].count' is missing"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{BENCH}\n{line}\n{TWO}\n", "utf-8")
    with pytest.raises(ValueError, match="give a line of GenEval|not a JSON object") as caught:
        read_prompts(path)
    assert f"{path}, line 2: " in str(caught.value)
    assert message in str(caught.value)


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.jsonl"):
        read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n", "utf-8")
    with pytest.raises(ValueError, match="no prompt in it"):
        read_prompts(tmp_path / "empty.jsonl")


# The folder


def noise(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def fill(folder):
    folder.write(range(len(folder.texts)), [noise(number) for number in range(len(folder.texts))])


def test_a_folder_is_resumed_and_checked(tmp_path):
    folder = SampleFolder(tmp_path / "out", [parse_prompt(BENCH), parse_prompt(TWO)], 2)
    with pytest.raises(ValueError, match="0 of 4 images"):
        folder.check_complete()
    assert folder.missing(range(4)) == [0, 1, 2, 3]
    assert folder.texts == ["a photo of a bench"] * 2 + ["a photo of an apple and a banana"] * 2
    folder.write(range(0, 1), [noise(0).convert("RGBA")])
    folder.write(range(2, 3), [noise(1)])
    assert folder.missing(range(4)) == [1, 3]
    assert folder.missing(range(1, 3)) == [1]
    with pytest.raises(ValueError, match="2 of 4 images .* missing: 00000/samples/00001.png, 00001/samples/00001.png"):
        folder.check_complete()
    folder.write(range(4), [noise(2)] * 4)
    folder.check_complete()
    assert sorted(path.relative_to(folder.root).as_posix() for path in folder.root.rglob("*.*")) == [
        "00000/metadata.jsonl",
        "00000/samples/00000.png",
        "00000/samples/00001.png",
        "00001/metadata.jsonl",
        "00001/samples/00000.png",
        "00001/samples/00001.png",
    ]
    assert json.loads((folder.root / "00001" / "metadata.jsonl").read_text("utf-8")) == json.loads(TWO)
    with Image.open(folder.path(0)) as image:  # written once, as RGB
        assert image.mode == "RGB"
        assert np.array_equal(np.array(image), np.array(noise(0)))


def test_four_digits_are_read_too(tmp_path):
    folder = SampleFolder(tmp_path, [parse_prompt(BENCH)], 1)
    fill(folder)
    folder.path(0).rename(tmp_path / "00000" / "samples" / "0000.png")
    folder.check_complete()
    assert folder.name(0) == "00000/samples/0000.png"


def test_unexpected_images_are_refused(tmp_path):
    prompts = [parse_prompt(BENCH), parse_prompt(TWO)]
    fill(SampleFolder(tmp_path, prompts, 2))
    with pytest.raises(ValueError, match="also 00000/samples/00001.png, 00001/samples/00001.png; remove them"):
        SampleFolder(tmp_path, prompts, 1).check_complete()
    with pytest.raises(ValueError, match="also 00001/samples/00000.png"):
        SampleFolder(tmp_path, prompts[:1], 2).check_complete()


def test_images_of_another_prompt_are_refused(tmp_path):
    fill(SampleFolder(tmp_path, [parse_prompt(BENCH)], 1))
    other = SampleFolder(tmp_path, [parse_prompt(TWO)], 2)
    with pytest.raises(ValueError, match=r"the images are of \{.*bench.*, but prompt 0 is \{"):
        other.write(range(1, 2), [noise(0)])
    other = SampleFolder(tmp_path, [parse_prompt(TWO)], 1)
    with pytest.raises(ValueError, match=r"the images are of \{.*bench.*, but prompt 0 is \{"):
        other.check_complete()
    (tmp_path / "00000" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="the images are of None, but prompt 0 is"):
        other.check_complete()


def test_wrong_use_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="num_samples=0"):
        SampleFolder(tmp_path, [parse_prompt(BENCH)], 0)
    with pytest.raises(ValueError, match="prompts is empty"):
        SampleFolder(tmp_path, [])


# The models


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = write_detector(tmp_path_factory.mktemp("detector"))
    return Detector.from_pretrained(folder, device="cpu", short_side=64, long_side=100)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return ColorClassifier.from_pretrained(write_classifier(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((384, 384), (800, 800), (800, 800)),
        ((512, 384), (800, 1067), (800, 1088)),
        ((900, 90), (133, 1333), (160, 1344)),
    ],
)
def test_an_image_is_resized_to_the_official_size(size, resized, padded):
    pixels, found = prepare(noise(0, size))
    assert (found, tuple(pixels.shape)) == (resized, (1, 3, *padded))
    assert not pixels[..., resized[0] :, :].any()
    assert not pixels[..., resized[1] :].any()


def bilinear(values, size):
    """Values `[height, width, n]` at another size, sample by sample, corners not aligned."""
    rows, columns, _ = values.shape
    out = np.empty((*size, values.shape[2]))
    for row in range(size[0]):
        y = min(max((row + 0.5) * rows / size[0] - 0.5, 0), rows - 1)
        top = int(y)
        bottom = min(top + 1, rows - 1)
        for column in range(size[1]):
            x = min(max((column + 0.5) * columns / size[1] - 0.5, 0), columns - 1)
            left = int(x)
            right = min(left + 1, columns - 1)
            upper = values[top, left] * (1 - x + left) + values[top, right] * (x - left)
            lower = values[bottom, left] * (1 - x + left) + values[bottom, right] * (x - left)
            out[row, column] = upper * (1 - y + top) + lower * (y - top)
    return out


def test_the_detector_equals_plain_loops(detector):
    image = noise(7)  # 40 x 30, brought to 85 x 64 in 96 x 64
    resized = np.rint(bilinear(np.array(image, dtype=float), (64, 85)))
    pixels = np.zeros((64, 96, 3))
    pixels[:, :85] = (resized - MEAN) / STD
    given, _ = prepare(image, 64, 100)
    # a half may be rounded either way: float32 and float64 differ in the last bit
    assert np.isclose(given[0].permute(1, 2, 0).numpy(), pixels, atol=1e-5).mean() > 0.999
    with torch.no_grad():
        outputs = detector.model(pixel_values=given)
    class_logits = outputs.class_queries_logits[0].double().numpy()
    masks = outputs.masks_queries_logits[0].double().permute(1, 2, 0).numpy()
    masks = bilinear(bilinear(masks, (64, 96))[:64, :85], (30, 40))
    expected = []
    for query, logits in enumerate(class_logits):
        exponents = [np.exp(value) for value in logits]
        pixels_in = [(row, column) for row in range(30) for column in range(40) if masks[row, column, query] > 0]
        certainty = sum(1 / (1 + np.exp(-masks[row, column, query])) for row, column in pixels_in)
        certainty /= len(pixels_in) + 1e-6
        rows, columns = [row for row, _ in pixels_in], [column for _, column in pixels_in]
        box = (min(columns), min(rows), max(columns) + 1, max(rows) + 1) if pixels_in else (0, 0, 0, 0)
        for label in range(80):
            probability = exponents[label] / sum(exponents)
            expected.append((probability, label, probability * certainty, box, len(pixels_in)))
    expected.sort(key=lambda item: -item[0])
    found = detector.detect(image)
    assert len(found) == 100
    assert len({int(item.mask.sum()) for item in found}) > 1
    for item, (_, label, score, box, size) in zip(found, expected[:100], strict=True):
        assert (item.label, item.box, int(item.mask.sum())) == (label, box, size)
        assert item.mask.shape == (30, 40)
        assert item.score == pytest.approx(score, rel=1e-4)  # float32 through two resizes, against float64


def test_an_empty_mask_has_no_box_and_no_score():
    logits = torch.zeros(2, 81)
    masks = torch.stack([torch.full((4, 4), -1.0), torch.full((4, 4), 1.0)])
    found = detector_module.read_detections(logits, masks, padded=(16, 16), resized=(12, 16), original=(6, 8))
    assert {(item.box, item.score > 0) for item in found} == {((0, 0, 0, 0), False), ((0, 0, 8, 6), True)}


def test_wrong_checkpoints_are_refused(tmp_path, detector, classifier):
    with pytest.raises(ValueError, match="a detector of 7 classes, GenEval needs COCO's 80"):
        Detector.from_pretrained(write_detector(tmp_path / "seven", labels=7), device="cpu")
    with pytest.raises(ValueError, match="a 'clip' model, not 'mask2former'"):
        Detector.from_pretrained(classifier.name)
    with pytest.raises(ValueError, match="a 'mask2former' model, not 'clip'"):
        ColorClassifier.from_pretrained(detector.name)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = write_detector(tmp_path / "detector") / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "class_predictor" not in name}, path)
    with pytest.raises(ValueError, match="2 weights are missing, such as class_predictor.bias"):
        Detector.from_pretrained(path.parent, device="cpu")


def test_without_scipy_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(detector_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[eval\]'"):
        Detector.from_pretrained(tmp_path)


def test_a_crop_shows_the_object_on_grey():
    image = Image.new("RGB", (8, 6), (10, 20, 30))
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:7] = True
    mask[2, 3] = False
    crop = np.array(cut_out(image, seen("car", box=(3.0, 2.0, 7.0, 4.0), mask=mask)))
    assert crop.shape == (2, 4, 3)
    assert crop[0, 0].tolist() == [153, 153, 153]
    assert (crop.reshape(-1, 3)[1:] == [10, 20, 30]).all()
    assert cut_out(image, seen("car", box=(0.6, 0.4, 2.4, 5.6))).size == (1, 6)


def test_colors_equal_plain_arithmetic(classifier):
    image, item = noise(3), seen("car", box=(4, 2, 30, 22))
    side = cut_out(image, item).resize((41, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))  # 26 x 20
    pixels = (np.array(side) / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    with torch.no_grad():
        feature = classifier.model.get_image_features(torch.tensor(pixels).permute(2, 0, 1)[None].float()).pooler_output
        expected = []
        for color in COLORS:
            total = 0
            for template in TEMPLATES:
                ids = classifier.processor.tokenizer(template.format(color=color, name="car"), return_tensors="pt")
                text = classifier.model.get_text_features(**ids).pooler_output[0]
                total = total + text / text.norm()
            expected.append(100 * float(feature[0] / feature.norm() @ (total / total.norm())))
    found = classifier.logits(image, [item], "car")
    assert found.shape == (1, 10)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-3)  # of 100, in float32 and in batches of other sizes
    assert classifier.classify(image, [item], "car") == [COLORS[int(np.argmax(expected))]]
    assert classifier.classify(image, [], "car") == []


@pytest.mark.parametrize("box", [(0, 0, 40, 1), (5, 0, 6, 30), (0, 0, 3, 3), (0, 0, 1, 1)])
def test_thin_objects_have_a_color(classifier, box):
    assert classifier.classify(noise(3), [seen("car", box=box)], "car")[0] in COLORS


# The whole run


def overwrite(folder, number, image):
    folder.path(number).unlink()
    folder.write(range(number, number + 1), [image])


@pytest.fixture
def folder(tmp_path):
    prompts = [parse_prompt(line) for line in (BENCH, CLOCKS, BLUE_CAR, DOG_RIGHT, TWO)]
    folder = SampleFolder(tmp_path / "images", prompts, 2)
    fill(folder)
    return folder


def test_a_folder_is_scored(folder, detector, classifier, tmp_path):
    seen_images = []
    score = score_folder(
        folder, detector, classifier, results_file=tmp_path / "results.jsonl", on_image=lambda: seen_images.append(1)
    )
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text("utf-8").splitlines()]
    assert [line["filename"] for line in lines] == [folder.name(number) for number in range(len(folder.texts))]
    assert repr(summarize(lines)) == repr(score)  # NaN does not equal itself
    assert len(seen_images) == 10
    assert {line["judge"]["scorer"] for line in lines} == {SCORER}
    for number, line in enumerate(lines):
        prompt = folder.prompt_of(number)
        assert (line["tag"], line["prompt"], line["metadata"]) == (prompt.tag, prompt.prompt, prompt.to_json())
        with Image.open(folder.path(number)) as image:
            objects = objects_of(detector.detect(image), prompt.tag)
            assert line["details"] == {name: [[*it.box, it.score] for it in found] for name, found in objects.items()}
            if prompt.tag == "colors":
                [color] = classifier.classify(image, objects["car"][:1], "car")
                assert line["correct"] == (color == "blue")
    assert score.tags["single_object"] == 1  # the weights make sure of a bench
    assert score.tags["position"] == score.tags["two_object"] == score.tags["counting"] == 0
    assert score.overall == sum(score.tags.values()) / 5
    assert score.num_images == dict.fromkeys(("single_object", "two_object", "counting", "colors", "position"), 2)
    assert score.judge["detector"] == detector.name


def test_a_run_resumes_after_an_incomplete_line(folder, detector, classifier, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    whole = score_folder(folder, detector, classifier, results_file=path)
    text = path.read_text("utf-8")
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:6]) + lines[6][:50], "utf-8")
    looked = []
    detect = detector.detect
    monkeypatch.setattr(detector, "detect", lambda image: looked.append(image) or detect(image))
    assert repr(score_folder(folder, detector, classifier, results_file=path)) == repr(whole)
    assert len(looked) == 4
    assert path.read_text("utf-8") == text
    overwrite(folder, 1, noise(99))
    score_folder(folder, detector, classifier, results_file=path)
    assert len(looked) == 5  # the image that changed, no other
    score_folder(folder, detector, classifier, results_file=path)
    assert len(looked) == 5  # the later of two lines about an image counts


def test_results_of_another_run_are_refused(folder, detector, classifier, tmp_path):
    path = tmp_path / "results.jsonl"
    score_folder(folder, detector, classifier, results_file=path)
    other = Detector(detector.model, "other")
    with pytest.raises(ValueError, match="line 1: a result of another run .*'other' now"):
        score_folder(folder, other, classifier, results_file=path)
    line = json.loads(path.read_text("utf-8").split("\n")[0])
    path.write_text(json.dumps({**line, "result": 50.0}) + "\n", "utf-8")
    with pytest.raises(ValueError, match=r"line 1: result=50\.0, expected 0 to 1;"):
        score_folder(folder, detector, classifier, results_file=path)
    path.write_text("[1]\n", "utf-8")
    with pytest.raises(ValueError, match=r"line 1: it=\[1\], expected dict"):
        score_folder(folder, detector, classifier, results_file=path)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"no image"])
def test_an_unreadable_image_stops_the_run_and_its_results_are_kept(folder, detector, classifier, tmp_path, damage):
    path = tmp_path / "results.jsonl"
    folder.path(5).write_bytes(damage(folder.path(5).read_bytes()))
    with pytest.raises(ValueError, match="00002/samples/00001.png: the image cannot be read .* delete it"):
        score_folder(folder, detector, classifier, results_file=path)
    before = path.read_text("utf-8")
    assert before.count("\n") == 5
    overwrite(folder, 5, noise(5))
    score = score_folder(folder, detector, classifier, results_file=path)
    assert sum(score.num_images.values()) == 10
    assert path.read_text("utf-8").startswith(before)


def test_an_incomplete_folder_is_not_scored(folder, detector, classifier):
    folder.path(3).unlink()
    with pytest.raises(ValueError, match="9 of 10 images .* missing: 00001/samples/00001.png"):
        score_folder(folder, detector, classifier)
