"""The captions of the package: varied, made again by their generator, and none of them from a benchmark."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
from helpers.tiny_checkpoint import load_example, write_checkpoint

from ssd_cache.evaluation.exact import SHAPES
from ssd_cache.io.showing import ReadableError
from ssd_cache.models import find_generator
from ssd_cache.prompts import PROMPTS_FILE, default_prompts

BENCHMARKS = Path(__file__).with_name("benchmark_prompts.sha256")
"""First ten hex digits of the sha256 of every prompt of GenEval (553) and DPG-Bench (1065), normalised."""


def normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def digest(text: str) -> str:
    return hashlib.sha256(normalised(text).encode()).hexdigest()[:10]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("model"), with_head_map=False)
    return default_prompts(find_generator(str(checkpoint)))


def test_captions_are_what_their_generator_writes(captions):
    assert captions == load_example("write_captions").captions()
    assert len({normalised(caption) for caption in captions}) == 600


def test_no_caption_is_a_prompt_of_a_benchmark(captions):
    known = set(BENCHMARKS.read_text("ascii").split())
    assert len(known) > 1500
    assert digest("a photo of a bench") in known
    assert not [caption for caption in captions if digest(caption) in known]
    assert not [caption for caption in captions if "photo of" in caption.lower()]


def test_captions_are_of_every_kind(captions):
    text = "\n".join(captions)
    for pattern, least in (
        (r"\b(two|three|four|five|six|seven|eight)\b", 70),
        (r"left of|right of|behind|between", 40),
    ):
        assert len(re.findall(pattern, text, re.IGNORECASE)) >= least
    assert len(re.findall(r"\b(red|blue|green|yellow|crimson|teal|purple|orange)\b", text, re.IGNORECASE)) >= 60
    assert len(re.findall(r"painting|sketch|print|render|mosaic|poster", text, re.IGNORECASE)) >= 15
    assert len(re.findall(r'"[A-Z]', text)) >= 15
    first_words = [caption.split()[0] for caption in captions]
    assert len(set(first_words)) >= 40
    assert max(map(first_words.count, set(first_words))) < 350
    assert sum(len(caption.split()) > 8 for caption in captions) > 250


def test_a_checkpoint_with_prompts_of_its_own_is_measured_by_them(tmp_path):
    assert default_prompts(find_generator("shapes-janus")) == [caption for _, caption in SHAPES.prompts(100, 777)]
    folder = write_checkpoint(tmp_path / "model", with_head_map=False)
    (folder / PROMPTS_FILE).write_text("a red circle\n\n  two squares \n")
    assert default_prompts(find_generator(str(folder))) == ["a red circle", "two squares"]


@pytest.mark.parametrize(("content", "message"), [(b"a caf\xe9", "not in UTF-8"), (b" \n\n", "has no prompts")])
def test_prompts_of_a_checkpoint_that_cannot_be_read_are_refused_by_name(tmp_path, content, message):
    folder = write_checkpoint(tmp_path / "model", with_head_map=False)
    (folder / PROMPTS_FILE).write_bytes(content)
    with pytest.raises(ReadableError, match=f"{PROMPTS_FILE}:? {message}"):
        default_prompts(find_generator(str(folder)))
