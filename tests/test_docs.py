"""The Python in README.md and docs/ runs: the blocks of a page in order, in one namespace, in an empty folder.

A line right before a block says where it differs:

- `<!-- tiny-janus -->`: the block runs with the names in the fixture `tiny_janus_names`, such as a small Janus;
- `<!-- no-run -->`: the block cannot run here (it needs a model of several GB), and still has to be Python.

Shell blocks are tested in `test_docs_commands.py`; mkdocs checks the links.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.janus_pipeline import janus_pipeline
from helpers.tiny_checkpoint import head_map, write_checkpoint
from transformers import JanusForConditionalGeneration, JanusProcessor

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>[a-z-]+) -->\n+)?```python[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
PROMPTS = ["a photo of a red circle", "a photo of three squares"]


def _blocks(page: Path):
    """(code, marker or None), the code padded so that line numbers in a traceback are the page's."""
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, match.start("code"))
        yield compile("\n" * lines_before + match["code"], str(page), "exec"), match["marker"]


def _markers(page: Path) -> set[str | None]:
    return {marker for _, marker in _blocks(page)}


@pytest.fixture(scope="module")
def tiny_janus_names(tmp_path_factory):
    """What a reader of the pages has: a Janus with 24 x 24 visual tokens, its processor's inputs, a pipeline."""
    folder = write_checkpoint(tmp_path_factory.mktemp("docs") / "model", side=24)
    processor = JanusProcessor.from_pretrained(folder)
    inputs = processor(
        text=PROMPTS, generation_mode="image", padding=True, padding_side="left", max_length=None, return_tensors="pt"
    )
    model = JanusForConditionalGeneration.from_pretrained(folder, attn_implementation="ssd")
    with janus_pipeline(folder) as pipe:
        yield {
            "model_id": str(folder),
            "model": model,
            "head_map": head_map(24),
            "inputs": inputs,
            "prompts": PROMPTS,
            "pipe": pipe,
        }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_seen(page):
    assert len(list(_blocks(page))) == page.read_text("utf-8").count("```python"), "a block is indented or not closed"
    assert _markers(page) <= {None, "tiny-janus", "no-run"}


@pytest.mark.parametrize("page", [page for page in PAGES if _markers(page) - {"no-run"}], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    if "tiny-janus" in _markers(page):
        namespace |= request.getfixturevalue("tiny_janus_names")
        head_map(24).save_pretrained("my-map")
    for code, marker in _blocks(page):
        if marker != "no-run":
            exec(code, namespace)


def test_the_pages_that_open_the_documentation_run():
    """README's and the first page's code is what users copy first, so none of it may be left out."""
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert _markers(page) == {"tiny-janus"}
