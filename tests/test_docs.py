"""The Python in README.md and docs/ runs: the blocks of a page in order, in one namespace, in an empty folder.

A block that can not run here (it needs a model of several GB) has `<!-- no-run -->` on a line right before it, and
still has to be Python. This does not look at shell blocks, and links are mkdocs' business.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?P<no_run><!-- no-run -->\n+)?```python[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path):
    """(code, whether it runs), the code padded so that line numbers in a traceback are the page's."""
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, match.start("code"))
        yield compile("\n" * lines_before + match["code"], str(page), "exec"), match["no_run"] is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_is_seen(page):
    assert len(list(_blocks(page))) == page.read_text("utf-8").count("```python"), "a block is indented or not closed"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(runs for _, runs in _blocks(page))], ids=lambda page: page.name
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code, runs in _blocks(page):
        if runs:
            exec(code, namespace)
