"""Foreign text on pages and images: model cards, tables of results, the HTML report, figures and contact sheets.

The pages are rendered by two Markdown libraries and read as HTML: no tag, link, image or front matter of its own.
"""

from __future__ import annotations

import io
import re

import pytest
import torch
import yaml
from helpers.pages import pages
from PIL import Image

from ssd_cache import HeadMap
from ssd_cache.analysis.plotting import new_figure, plain_label, to_png
from ssd_cache.bench.results import Report as BenchReport
from ssd_cache.bench.results import Row
from ssd_cache.bench.roofline import Machine
from ssd_cache.cli.eval.score_table import Report
from ssd_cache.cli.sheet import contact_sheet
from ssd_cache.evaluation.plots import plot_result_by_budget
from ssd_cache.evaluation.results_folder import Record
from ssd_cache.evaluation.tables import accuracy_table, summarize, to_markdown
from ssd_cache.head_map.card import card
from ssd_cache.io.markdown import MAX_TEXT, code_block, escape

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[text](javascript:alert(1))",
    "![image](https://evil.example/x.png)",
    "https://evil.example/x www.evil.example <https://evil.example>",
    "a | b | <b>bold</b> |",
    "**bold** __bold__ *it* _it_ ~~gone~~ `code` $x$",
    "``` # heading",
    "# heading",
    "- item",
    "1. item",
    "-",
    "---",
    "===",
    "&lt;script&gt; &amp; \\<b\\>",
    "[ref]: https://evil.example",
    "--- base_model: evil/model ---",
    "base_model: evil/model",
    "<!-- comment",
    "</code></pre><b>",
]
WITH_LINES = [
    *HOSTILE,
    "a\n\n# heading\n\n<b>bold</b>",
    "a\n```\n<script>alert(1)</script>\n```",
    "---\nbase_model: evil/model\n---\n<b>",
    "a\n|---|\n| <b> |",
    "\ud800 \x1b[31m \u202e",
    "x" * 900_000,
]


def check(page_of, hostile: str, is_whole: bool = True) -> None:
    """The page of a hostile text has the tags and links of an innocent text's, and shows the text itself."""
    for found, innocent in zip(pages(page_of(hostile)), pages(page_of("words")), strict=True):
        assert found.tags == innocent.tags, hostile[:80]
        assert found.links == innocent.links, hostile[:80]
        if is_whole:
            assert " ".join(hostile.split()) in " ".join(found.text.split())


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_card_shows_foreign_text_as_it_is(hostile):
    labels = torch.tensor([[True, False]])

    def page_of(text):
        facts = {"model_id": text, "revision": text, "method": text, "model_type": text}
        return body_of(card(HeadMap(labels, **facts, profile={"note": text}), "user/map"))

    check(page_of, hostile)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_card_has_no_foreign_front_matter(hostile):
    text = card(HeadMap(torch.tensor([[True, False]]), model_id=hostile, method=hostile), "user/map")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front.keys() == {"library_name", "tags"}
    assert text.split("---\n")[2].lstrip().startswith("# Head map of ")


def test_the_code_of_a_card_names_the_model_as_python_reads_it():
    name = 'a"b\\c \N{SNOWMAN}\N{GRINNING FACE}'
    text = card(HeadMap(torch.tensor([[True, False]]), model_id=name), "user/map")
    (literal,) = re.findall(r"from_pretrained\((.*), attn_implementation", text)
    assert eval(literal) == name


def body_of(text: str) -> str:
    return text.split("---\n", 2)[2]


def record(policy, number=0):
    return Record(policy, {}, 0.2, 115, "0123", 0, number, "single_object", "a circle", number == 0, "")


def run_of(text):
    conditions = {"grid": [24, 24], "num_per_kind": 1, "prompt_seed": 1, "batch_size": 4, text: text, "settings": {}}
    conditions |= {"bench": "shapes", "guidance_scale": 3.0, "temperature": 1.0, "dtype": text, "device": text}
    entry = {"settings": {text: text}, "slots": {"0.2": 115}, "head_map": text}
    return {"conditions": conditions, "policies": {text: entry}, "command": {"model": text, "head_map": text}}


@pytest.mark.parametrize("hostile", WITH_LINES)
def test_the_tables_of_shapes_hold_no_foreign_markup(hostile):
    is_short = len(hostile) < MAX_TEXT and hostile.isprintable()

    def summary(text):
        return summarize([record(text), record(text, 1), record("full", 1)], run_of(text))

    check(lambda text: to_markdown(summary(text)), hostile, is_short)
    assert len(accuracy_table(summary(hostile)).split("\n")) == 4


@pytest.mark.parametrize("hostile", WITH_LINES)
def test_tables_of_scores_hold_no_foreign_markup(hostile):
    is_short = len(hostile) < MAX_TEXT and hostile.isprintable()

    def page_of(text):
        return Report(text, ("results", text), [(text, 0.5)], [f"files: {text}", text]).markdown()

    check(page_of, hostile, is_short)


@pytest.mark.parametrize("hostile", WITH_LINES)
def test_the_tables_of_a_bench_hold_no_foreign_markup(hostile):
    is_short = len(hostile) < MAX_TEXT and hostile.isprintable()

    def page_of(text):
        conditions = dict.fromkeys(("model", "head map", "device"), text)
        rows = [Row(text, 1, tokens_per_second=2.0), Row("other", 1, failure=text)]
        return BenchReport(text, conditions, Machine(1e9, 1e12), rows).to_markdown()

    check(page_of, hostile, is_short)


@pytest.mark.parametrize("text", WITH_LINES)
def test_a_block_of_code_ends_where_it_should(text):
    text = text[:MAX_TEXT]
    (page, *_) = pages(code_block(text, "bash") + "\n\nafter")
    assert page.tags == ["pre", "code", "p"]
    assert page.text.endswith("after\n")


def test_ordinary_names_stay_as_they_are():
    for name in ("deepseek-community/Janus-Pro-1B", "fitted:score=learned", "ssd:buffer=1,num_recent=0.5 20%"):
        assert escape(name) == name
    for name in ("GenEval rules, HF detector", "DPG rules (VQA = Salesforce/blip-vqa-base)", "24 x 24", "window_mass"):
        assert escape(name) == name


@pytest.mark.parametrize("hostile", [*WITH_LINES, r"$\frac{$", "_hidden", "$" * 3])
def test_figures_are_plotted_with_any_name(hostile):
    pytest.importorskip("matplotlib")
    summary = summarize([record(hostile), record(hostile, 1)], run_of(hostile))
    assert Image.open(io.BytesIO(plot_result_by_budget(summary))).width < 4000
    figure = new_figure(2)
    axes = figure.subplots()
    axes.plot([0, 1], label=plain_label(hostile))
    axes.set_title(plain_label(hostile))
    (label,) = (text.get_text() for text in axes.legend().get_texts())
    assert len(label) <= 80
    to_png(figure, dpi=20)


@pytest.mark.parametrize("hostile", WITH_LINES)
def test_contact_sheets_are_made_with_any_caption(hostile):
    image = Image.new("RGB", (48, 48))
    sheet = contact_sheet({f"{hostile[:40]}\n{hostile[:40]}": [image, image]}, [hostile, "b"], 2)
    assert sheet.width < 2000
