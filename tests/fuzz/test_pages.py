"""Pages that the library writes, with foreign text in every place that a file or an argument can fill.

A page must show the text: its tags, links and front matter are those of a page with innocent text.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.fuzzing import fuzz
from helpers.hostile import MARKUP, ODD, text_mutant
from helpers.pages import Page, check_card, pages

from ssd_cache import HeadMap, HeadMapError
from ssd_cache.bench.results import Report as BenchReport
from ssd_cache.bench.results import Row
from ssd_cache.bench.roofline import Machine
from ssd_cache.cli.eval.score_table import Report as ScoreReport
from ssd_cache.evaluation.results_folder import Record
from ssd_cache.evaluation.tables import summarize, to_markdown
from ssd_cache.head_map.card import card
from ssd_cache.io.markdown import code_block, escape, table
from ssd_cache.io.showing import printable
from ssd_cache.preparing.report import render
from ssd_cache.preparing.state import StateFolder
from ssd_cache.runs.plan import Plan


def foreign_text(chance) -> str:
    """A text of one to four hostile parts."""
    text = "".join(chance.choice(chance.choice((MARKUP, ODD))) for _ in range(chance.randint(1, 4)))
    text = text_mutant(text, chance) if chance.random() < 0.3 else text
    return text if printable(text).strip() else "blank"  # an empty line of a list is no line


def check_same_page(page_of, text: str) -> None:
    """The page of a text has the tags and links of a page with an innocent text."""
    for found, innocent in zip(pages(page_of(text)), pages(page_of("words")), strict=True):
        assert found.tags == innocent.tags
        assert found.links == innocent.links


def parts_of_a_page(text):
    heads = ["policy", text]
    lines = [f"# {escape(text)}", f"- {escape(text)}", f"In a line: {escape(text)}", table(heads, [[text, "1"]])]
    return "\n\n".join([*lines, code_block(text, "bash"), "The end."])


def bench(text):
    conditions = dict.fromkeys(("model", "head map", "device"), text)
    rows = [Row(text, 1, tokens_per_second=2.0, served_by=text), Row("other", 1, failure=text)]
    return BenchReport(text, conditions, Machine(1e9, 1e12), rows).to_markdown()


def shapes(text):
    conditions = {"grid": [24, 24], "num_per_kind": 1, "prompt_seed": 1, "batch_size": 4, f"x{text}": text}
    conditions |= {"bench": "shapes", "guidance_scale": 3.0, "temperature": 1.0, "dtype": text, "device": text}
    policy = f"x{text}"
    entry = {"settings": {text: text}, "slots": {"0.2": 115}, "head_map": text}
    run = {
        "conditions": conditions | {"settings": {text: text}},
        "policies": {policy: entry},
        "command": {"model": text, "head_map": text},
    }
    one = [Record(policy, {}, 0.2, 115, "0123", 0, n, "single_object", text, not n, text) for n in range(2)]
    return to_markdown(summarize(one, run))


def scores(text):
    return ScoreReport(text, ("results", text), [(text, 0.5)], [f"files: {text}", text]).markdown()


PAGES = {
    "parts of a page": parts_of_a_page,
    "report of a bench with foreign text": bench,
    "report of shapes": shapes,
    "report of scores": scores,
}


@pytest.mark.parametrize("name", PAGES)
def test_foreign_text_is_no_markup(name):
    fuzz(name, lambda chance: check_same_page(PAGES[name], foreign_text(chance)), errors=())


def test_foreign_text_in_a_card_is_no_markup():
    def attempt(chance):
        names = ("model_id", "revision", "model_type", "method")
        facts = {name: foreign_text(chance)[:256] for name in names if chance.random() < 0.5}
        profile = {foreign_text(chance)[:50]: foreign_text(chance), "fidelity": {"num_images": foreign_text(chance)}}
        head_map = HeadMap(torch.tensor([[True, False]]), **facts, profile=profile if chance.random() < 0.5 else None)
        check_card(card(head_map, foreign_text(chance)))

    fuzz("card", attempt, errors=(HeadMapError,))


def test_foreign_text_in_the_page_of_a_preparation_is_no_markup(tmp_path):
    def page_of(text):
        folder = StateFolder(tmp_path)
        folder.settings = {f"x{text}": text, "budget": [text]}
        head_map = HeadMap(torch.tensor([[True, False]]), profile={"learning": printable(text)})
        return Page(render(Path("out" + text.replace("\0", "")), head_map, Plan(text, text, []), folder, b""))

    def attempt(chance):
        found, innocent = page_of(foreign_text(chance)), page_of("words")
        assert found.tags == innocent.tags
        assert found.links == innocent.links

    fuzz("page of a preparation", attempt, errors=())


def test_every_text_of_a_bench_row_is_tried():
    texts = {field.name for field in fields(Row) if "str" in str(field.type)}
    assert texts == {"cache", "failure", "served_by"}
