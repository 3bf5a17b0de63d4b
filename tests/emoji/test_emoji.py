"""Emoji: captions are read back, training never shows what is held out, and the judge finds every icon.

Only icons and captions are tested here. The model that generates such images is tested elsewhere.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from itertools import product

import numpy as np
import pytest
from PIL import Image

from ssd_cache.emoji.captions import (
    BACKGROUNDS,
    COMBINATIONS,
    HELD_OUT,
    KINDS,
    STYLES,
    SUBJECTS,
    TEMPLATES,
    TRAINED,
    WORDS,
    Request,
    make_caption,
    make_prompts,
    parse_caption,
    write_caption,
)
from ssd_cache.emoji.icons import (
    CLEAR,
    GRID,
    ICON_SIDE,
    NUM_TOKENS,
    Icons,
    background_of,
    load_icons,
    make_image,
    place,
    read_icons,
    to_pixels,
)
from ssd_cache.emoji.judge import MAX_ERROR, judge, read_image
from ssd_cache.io.showing import ReadableError


class EveryChoice:
    """Stands for a random generator whose `choice` takes the template of a given number."""

    def __init__(self, number):
        self.number = number

    def choice(self, options):
        return options[self.number]


def test_every_caption_is_read_back_as_it_was_written():
    for (kind, templates), combination in product(TEMPLATES.items(), COMBINATIONS):
        subject, style, background = combination
        named = Request(
            subject, style if kind in ("style", "all") else None, background if kind in ("background", "all") else None
        )
        for number in range(len(templates)):
            caption = write_caption(kind, *combination, EveryChoice(number))
            assert parse_caption(caption) == named, caption
            assert set(caption.replace(",", " ,").split()) <= set(WORDS)


def test_the_held_out_combinations_are_those_that_were_written_down():
    assert (len(COMBINATIONS), len(HELD_OUT), len(TRAINED)) == (1280, 128, 1152)
    assert set(TRAINED) == set(COMBINATIONS) - HELD_OUT
    digest = hashlib.sha256("\n".join(map(" ".join, sorted(HELD_OUT))).encode()).hexdigest()
    assert digest.startswith("562f1a420e3d8606")  # another Python must not train what this one holds out
    # every subject, style and background is trained in other combinations
    assert {each[0] for each in TRAINED} == set(SUBJECTS)
    assert {each[:2] for each in TRAINED} == set(product(SUBJECTS, STYLES))
    assert {each[1:] for each in TRAINED} == set(product(STYLES, BACKGROUNDS))


def test_prompts_name_a_held_out_combination_only_in_their_own_kind():
    prompts = make_prompts(200, seed=3)
    assert prompts == make_prompts(200, seed=3)
    assert prompts != make_prompts(200, seed=4)
    assert [kind for kind, _ in prompts] == [kind for kind in KINDS for _ in range(200)]
    for kind, caption in prompts:
        request = parse_caption(caption)
        assert (request.style is not None) == (kind in ("style", "all", "unseen"))
        assert (request.background is not None) == (kind in ("background", "all", "unseen"))
        if kind in ("all", "unseen"):
            assert ((request.subject, request.style, request.background) in HELD_OUT) == (kind == "unseen")


def test_training_captions_are_of_all_kinds_and_describe_their_image():
    rng = random.Random(0)
    kinds = set()
    for _ in range(500):
        combination = rng.choice(TRAINED)
        kind, caption = make_caption(rng, combination)
        kinds.add(kind)
        assert read_image(make_image(rng, combination))[:3] == combination
        assert judge(make_image(rng, combination), caption).correct
    assert kinds == set(TEMPLATES)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a catt on a blue background", "'catt' is unknown (near: cat"),
        ("a dog on a teal background", "'teal' is unknown"),
        ("a dog on a blue noto", "captions are like 'a cat'"),
        ("", "captions are like 'a cat'"),
    ],
)
def test_a_caption_outside_the_vocabulary_is_refused_with_the_nearest_words(caption, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_caption(caption)
    assert ("unknown" in message) == ("unknown" in str(error.value))


def test_a_caption_of_many_unknown_words_is_refused_at_once():
    start = time.process_time()
    with pytest.raises(ReadableError, match="'word4' is unknown.* and 99995 more") as error:
        parse_caption(" ".join(f"word{number}" for number in range(100_000)))
    assert time.process_time() - start < 10  # with the nearest words of each it takes minutes
    assert len(str(error.value)) < 1000


def test_a_shift_of_the_icon_shifts_its_tokens():
    grid = load_icons().grids[3, 1, 0]
    first = place(grid, 2, 0, 0)
    for row, column in ((0, 1), (6, 6), (3, 2)):
        moved = np.roll(first, (row, column), (0, 1))
        np.testing.assert_array_equal(place(grid, 2, row, column), moved)
    for row, column in ((7, 0), (0, 7), (-1, 0)):
        with pytest.raises(ValueError, match="leaves an image of 24 x 24 cells"):
            place(grid, 2, row, column)


def test_an_image_is_not_determined_by_its_caption():
    rng = random.Random(0)
    images = {make_image(rng, COMBINATIONS[0]).tobytes() for _ in range(2000)}
    assert len(images) == 2 * 7 * 7


def test_the_mirrored_icon_is_the_mirror_image():
    icons = load_icons()
    errors = []
    for subject, style in product(range(len(SUBJECTS)), range(len(STYLES))):
        plain, mirrored = (to_pixels(place(icons.grids[subject, style, flip], 6, 3, 3)) for flip in (0, 1))
        errors.append(((plain[:, ::-1] - mirrored) ** 2).mean())
    assert max(errors) < 0.01  # two choices of codes for the same icon
    assert 0 < np.mean(errors) < 0.003


def test_the_icons_use_the_whole_codebook():
    icons = load_icons()
    used = set(icons.grids[icons.grids != CLEAR].tolist())
    assert used == set(range(len(BACKGROUNDS), icons.num_tokens))
    assert icons.num_tokens == NUM_TOKENS


def images_of(combinations, seed):
    rng = random.Random(seed)
    return [(combination, make_image(rng, combination)) for combination in combinations]


def found(images):
    return [read_image(image)[:3] for _, image in images]


def test_every_icon_is_found_at_random_places():
    images = images_of(COMBINATIONS[::5], "some")
    assert found(images) == [combination for combination, _ in images]


@pytest.mark.slow
def test_every_combination_is_found_at_random_places():
    images = images_of(COMBINATIONS * 4, "all")
    assert len(images) == 5120
    assert found(images) == [combination for combination, _ in images]


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_an_image_file_is_read_like_its_tokens(side):
    for combination, tokens in images_of(COMBINATIONS[::97], side):
        pixels = (to_pixels(tokens) * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels).resize((24 * side, 24 * side), Image.Resampling.BOX)
        *names, error = read_image(image)
        assert tuple(names) == combination
        assert error < 0.01


def test_a_caption_that_names_something_else_is_rejected():
    rng = random.Random(1)
    for combination, image in images_of(rng.sample(COMBINATIONS, 60), "other"):
        assert judge(image, write_caption("all", *combination, rng)).correct
        for part, options in enumerate((SUBJECTS, STYLES, tuple(BACKGROUNDS))):
            other = list(combination)
            other[part] = rng.choice([each for each in options if each != combination[part]])
            verdict = judge(image, write_caption("all", *other, rng))
            assert not verdict.correct
            assert verdict.reason.startswith("expected")
            assert other[part] in verdict.reason
            assert combination[part] in verdict.reason


def test_an_image_that_shows_no_whole_icon_is_rejected():
    generator = np.random.default_rng(0)
    icons = load_icons()
    cat, bus = (icons.grids[SUBJECTS.index(name), 0, 0] for name in ("cat", "bus"))
    both = place(cat, 0, 3, 3)
    both[12:] = place(bus, 0, 3, 3)[12:]
    half = place(cat, 0, 3, 3)
    half[12:] = 0
    two = place(cat, 0, 0, 0)
    two[18:, 18:] = cat[6:12, 6:12]
    striped = place(cat, 0, 3, 3)
    striped[:, :6][striped[:, :6] == 0] = 1
    noise = generator.integers(len(BACKGROUNDS), icons.num_tokens, GRID)
    for name, image in {
        "empty": np.zeros(GRID, dtype=np.int64),
        "half": half,
        "upper half cat, lower half bus": both,
        "a cat and a part of one": two,
        "two backgrounds": striped,
        "noise": noise,
    }.items():
        verdict = judge(image, "a cat")
        assert not verdict.correct, name
        assert verdict.subject is None, name
        assert verdict.error > MAX_ERROR, name
    assert background_of(noise) is None
    assert judge(noise, "a cat").reason == "no background"
    assert judge(place(cat, 0, 3, 3), "a cat").correct


def test_the_judge_refuses_other_sizes_and_tokens():
    with pytest.raises(ValueError, match="576 tokens, got 575"):
        judge([0] * 575, "a cat")
    with pytest.raises(ValueError, match="0 to 1023, got 0 to 1024"):
        judge([0] * 575 + [1024], "a cat")
    with pytest.raises(ValueError, match="40 x 96 pixels is too small"):
        judge(Image.new("RGB", (40, 96)), "a cat")


def test_icons_of_another_data_set_are_refused(tmp_path):
    codes, grids = np.zeros((4, 4, 4, 4), np.uint8), np.full((80, 2, 2, 18, 18), CLEAR)
    np.savez(tmp_path / "few.npz", codes=codes, grids=grids[:3])
    with pytest.raises(ValueError, match="prepare the data again"):
        read_icons(tmp_path / "few.npz")
    grids[0, 0, 0, 0, 0] = 12
    np.savez(tmp_path / "outside.npz", codes=codes, grids=grids)
    with pytest.raises(ValueError, match="outside its codebook of 12"):
        read_icons(tmp_path / "outside.npz")
    grids[0, 0, 0, 0, 0] = 11
    np.savez(tmp_path / "good.npz", codes=codes, grids=grids)
    assert isinstance(read_icons(tmp_path / "good.npz"), Icons)
    assert read_icons(tmp_path / "good.npz").grids.shape[-1] == ICON_SIDE
