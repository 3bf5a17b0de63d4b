"""The little world of shapes: scenes meet their captions, and the judge reads images back without a mistake.

Whether a scene meets a caption is decided here by a rule of its own, over the list of objects that were painted; the
judge sees nothing but cells. What was trained on these scenes is tested elsewhere.
"""

from __future__ import annotations

import io
import random
import re

import numpy as np
import pytest
from PIL import Image

from ssd_cache.shapes.judge import judge, parse_caption, read_objects, to_tokens
from ssd_cache.shapes.relations import relations
from ssd_cache.shapes.scenes import (
    BITMAPS,
    COLORS,
    KINDS,
    NUMBERS,
    PALETTE,
    RELATIONS,
    SHAPES,
    SceneObject,
    draw,
    make_prompts,
)
from ssd_cache.shapes.scenes import make_scene as make

NUM_SCENES = 5000


def things_of(caption):
    """((colour or None, shape) of every object asked for, the relation or None), read word by word."""
    text = caption.removeprefix("a photo of ")
    number, _, plural = text.partition(" ")
    if number in ("two", "three", "four"):
        return [(None, plural.removesuffix("s"))] * {"two": 2, "three": 3, "four": 4}[number], None
    relation = next((name for name in ("left of", "right of", "above", "below") if f" {name} " in text), None)
    parts = text.split(f" {relation or 'and'} ")
    words = [part.split()[1:] for part in parts]  # without the article
    return [(None if len(pair) == 1 else pair[0], pair[-1]) for pair in words], relation


def meets(objects, caption):
    """Whether the painted objects are those of the caption, no more and no fewer, and lie as it says."""
    wanted, relation = things_of(caption)
    if sorted(shape for _, shape in wanted) != sorted(item.shape for item in objects):
        return False
    if len(wanted) == 1 or len({shape for _, shape in wanted}) > 1:  # shapes tell the objects apart
        by_shape = {item.shape: item for item in objects}
        if any(color not in (None, by_shape[shape].color) for color, shape in wanted):
            return False
    if relation is None:
        return True
    first, second = (by_shape[shape] for _, shape in wanted)
    across, down = first.column - second.column, first.row - second.row
    # GenEval's rule for objects of five cells a side: offsets shrunk by one cell, more than half of the distance
    near_across, near_down = (max(abs(offset) - 1, 0) for offset in (across, down))
    sideways, upright = (4 * near**2 > across**2 + down**2 for near in (near_across, near_down))
    return {
        "left of": across < 0 and sideways,
        "right of": across > 0 and sideways,
        "above": down < 0 and upright,
        "below": down > 0 and upright,
    }[relation]


def change_a_word(caption, rng):
    """The caption with one colour, shape, number or relation exchanged for another of its sort."""
    sorts = (COLORS, SHAPES, tuple(NUMBERS), RELATIONS)
    places = [
        (match, sort)
        for sort in sorts
        for match in re.finditer("|".join(rf"\b{word}(?=s?\b)" for word in sort), caption)
    ]
    match, sort = rng.choice(places)
    return caption[: match.start()] + rng.choice([word for word in sort if word != match[0]]) + caption[match.end() :]


def enlarge(tokens, side=16):
    cells = np.array(PALETTE, dtype=np.uint8)[tokens.reshape(24, 24)]
    return Image.fromarray(cells.repeat(side, 0).repeat(side, 1))


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(0)
    return [make(rng, KINDS[index % len(KINDS)]) for index in range(NUM_SCENES)]


def test_every_scene_is_accepted_with_its_own_caption(scenes):
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert [(scene.caption, judge(scene.tokens, scene.caption).reason) for scene in scenes] == [
        (scene.caption, "") for scene in scenes
    ]
    assert all(meets(scene.objects, scene.caption) for scene in scenes)


def test_every_scene_is_read_back_to_the_cell(scenes):
    for scene in scenes[:1000]:
        objects, junk = read_objects(scene.tokens)
        painted = {(o.shape, o.color, (o.column, o.row, o.column + 5, o.row + 5)) for o in scene.objects}
        assert {(o.shape, o.color, o.box) for o in objects} == painted
        assert junk == 0


@pytest.mark.parametrize("source", ["another scene of the kind", "any other scene", "one word changed"])
def test_every_caption_that_a_scene_does_not_meet_is_rejected(scenes, source):
    rng = random.Random(source)
    rejected, tried = 0, 0
    while rejected < NUM_SCENES:
        scene = scenes[tried % NUM_SCENES]
        tried += 1
        if source == "one word changed":
            caption = change_a_word(scene.caption, rng)
        else:
            index = rng.randrange(NUM_SCENES // len(KINDS)) * len(KINDS) + KINDS.index(scene.kind)
            caption = scenes[index if "of the kind" in source else rng.randrange(NUM_SCENES)].caption
        things, _ = things_of(caption)
        if len(things) == 2 and things[0][1] == things[1][1] and "photo of a " in caption:
            continue  # "a circle and a circle": no caption of this world
        verdict = judge(scene.tokens, caption)
        assert verdict.correct == meets(scene.objects, caption), (scene, caption, verdict)
        assert verdict.correct == (verdict.reason == "")
        rejected += not verdict.correct
    assert tried < 4 * NUM_SCENES


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_judged_as_tokens_are(kind):
    rng = random.Random(kind)
    for _ in range(40):
        scene, other = make(rng, kind), make(rng, kind)
        large = enlarge(scene.tokens)
        np.testing.assert_array_equal(to_tokens(large).reshape(-1), scene.tokens)
        jpeg = io.BytesIO()
        large.save(jpeg, "JPEG", quality=75)
        for image in (large, enlarge(scene.tokens, 1), large.resize((500, 300), 0), Image.open(jpeg)):
            assert judge(image, scene.caption).correct
            assert judge(image, other.caption) == judge(scene.tokens, other.caption)


@pytest.mark.parametrize("rows", [8, 16, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_makes_the_same_scene(kind, rows):
    one, two, three = (make(random.Random(seed), kind, rows) for seed in (1, 1, 2))
    assert (one.caption, one.objects, one.background) == (two.caption, two.objects, two.background)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert one.tokens.shape == (rows * 24,)
    assert not np.array_equal(one.tokens, three.tokens)
    assert meets(one.objects, one.caption)


def test_low_scenes_leave_out_what_does_not_fit():
    rng = random.Random(0)
    captions = " ".join(make(rng, rows=8).caption for _ in range(500))
    assert not re.search("four|above|below", captions)
    assert re.search("three", captions)
    assert re.search("left of", captions)


def test_a_row_of_an_object_is_like_no_other_row():
    """So that it tells what stands under it, without a look at the rows above."""
    rows = [tuple(row) for bitmap in BITMAPS.values() for row in bitmap]
    assert len(set(rows)) == len(rows) == 15


@pytest.mark.parametrize("rows", [8, 16, 24])
def test_objects_do_not_touch_and_things_counted_stand_in_rows(rows):
    rng = random.Random(rows)
    for index in range(600):
        scene = make(rng, KINDS[index % len(KINDS)], rows)
        family = np.where(scene.tokens < 3, -1, 0).reshape(rows, 24)
        for number, item in enumerate(scene.objects):
            family[item.row : item.row + 5, item.column : item.column + 5][BITMAPS[item.shape] > 0] = number
        for axis in (0, 1):
            here, there = family[: rows - 1, :] if axis == 0 else family[:, :-1], np.diff(family, axis=axis)
            assert not (there[(here >= 0) & (here + there >= 0)]).any()
        if scene.kind == "counting":
            lines = [item.row for item in scene.objects]
            assert len(set(lines)) == (2 if len(lines) == 4 else 1)


def test_prompts_are_even_over_kinds_readable_and_the_same_for_a_seed():
    prompts = make_prompts(50, seed=3)
    assert prompts == make_prompts(50, seed=3) != make_prompts(50, seed=4)
    assert [kind for kind, _ in prompts] == [kind for kind in KINDS for _ in range(50)]
    for _, caption in prompts:
        requirement = parse_caption(caption)
        assert ([(color, shape) for shape, color in requirement.objects], requirement.relation) == things_of(caption)


@pytest.mark.parametrize("kind", ["object", "", "Position"])
def test_unknown_kinds_are_refused(kind):
    with pytest.raises(ValueError, match="the kinds are single_object"):
        make(random.Random(0), kind)


@pytest.mark.parametrize("rows", [0, 7, 12, 32, -8])
def test_other_heights_are_refused(rows):
    with pytest.raises(ValueError, match=f"rows={rows}: a scene is 8, 16 or 24 rows high"):
        make(random.Random(0), rows=rows)


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "a photo of a dog",
        "a photo of circles",
        "a photo of five circles",
        "a photo of a red circle and",
        "a photo of a circle near a square",
        "a photo of a circle. a photo of a square",
        "a photo of a pink circle",
    ],
)
def test_an_unreadable_caption_is_an_error_that_shows_readable_ones(caption):
    with pytest.raises(ValueError, match="cannot read the caption") as error:
        judge(draw(()), caption)
    assert repr(caption) in str(error.value)
    assert judge(draw((SceneObject("circle", "red", 0, 0),)), "A photo  of a\tred circle").correct


def test_the_former_name_of_a_parameter_is_accepted_with_a_warning():
    tokens = draw((CIRCLE,))
    with pytest.warns(FutureWarning, match=r"judge\(picture=\.\.\.\) is now image="):
        verdict = judge(picture=tokens, caption="a photo of a circle")
    assert verdict == judge(image=tokens, caption="a photo of a circle") == judge(tokens, "a photo of a circle")


@pytest.mark.parametrize("size", [0, 1, 575, 577, 24])
def test_images_of_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"has 576 tokens, got {size}"):
        judge(np.zeros(size, dtype=int), "a photo of a circle")


@pytest.mark.parametrize("size", [(23, 24), (24, 23), (1, 1)])
def test_images_of_too_few_pixels_are_refused(size):
    with pytest.raises(ValueError, match="fewer than 24 x 24 cells"):
        judge(Image.new("RGB", size), "a photo of a circle")


CIRCLE = SceneObject("circle", "red", 8, 8)


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([(0, 0), (0, 1), (1, 0)], ""),  # three: noise
        ([(0, 0), (2, 2), (0, 4), (4, 0), (20, 20)], ""),  # single cells, however many
        ([(0, 0), (0, 1), (1, 0), (1, 1)], "1 blot(s) that are not an object"),
        ([(row, column) for row in range(3) for column in range(5)], "1 blot(s) that are not an object"),
        ([(row, 0) for row in range(5)] + [(row, 22) for row in range(5)], "2 blot(s) that are not an object"),
    ],
)
def test_stray_cells_are_noise_up_to_a_size_and_junk_from_there(cells, reason):
    tokens = draw((CIRCLE,))
    for row, column in cells:
        tokens[row, column] = PALETTE.index((24, 54, 128))  # dark blue
    assert judge(tokens, "a photo of a circle").reason == reason


def test_a_shape_may_lack_cells_but_not_many():
    tokens = draw((SceneObject("square", "blue", 8, 8),))
    tokens[8, 8:12] = 0
    assert judge(tokens, "a photo of a blue square").correct
    tokens[8:11, 8:13] = 0
    assert judge(tokens, "a photo of a blue square").reason == "1 blot(s) that are not an object"


def test_an_object_that_nobody_asked_for_fails():
    objects = (CIRCLE, SceneObject("triangle", "green", 8, 16))
    assert judge(draw(objects), "a photo of a circle and a triangle").correct
    verdict = judge(draw(objects), "a photo of a circle")
    assert verdict.reason == "expected 1 circle, found 1 circle, 1 triangle"
    assert [item.shape for item in verdict.objects] == ["circle", "triangle"]
    assert judge(draw(()), "a photo of a circle").reason == "expected 1 circle, found nothing"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 100, 100), (200, 0, 300, 100), {"left of"}),
        ((0, 0, 100, 100), (0, 0, 100, 100), set()),
        ((0, 0, 100, 100), (21, 0, 121, 100), set()),
        ((0, 0, 100, 100), (40, 0, 140, 100), set()),
        ((0, 0, 100, 100), (40.01, 0, 140.01, 100), {"left of"}),
        ((0, 0, 100, 100), (60, 60, 160, 160), set()),
        ((0, 0, 100, 100), (150, 150, 250, 250), {"left of", "above"}),
        ((0, 0, 100, 100), (80, 60, 180, 160), {"left of"}),
        ((0, 0, 100, 100), (300, 100, 400, 200), {"left of"}),
        ((0, 0, 50, 200), (60, 150, 300, 300), {"left of"}),
        ((0, 200, 100, 300), (0, 0, 100, 100), {"below"}),
        ((10, 10, 374, 374), (150, 300, 250, 380), {"above"}),
    ],
)
def test_relations_are_those_of_the_official_geneval_code(first, second, expected):
    """The expected sets were printed by GenEval's own function (djghosh13/geneval @ af4902f)."""
    assert relations(first, second) == expected
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(second, first) == {mirror[name] for name in expected}
