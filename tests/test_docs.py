"""The Python in README.md and docs/ runs: the blocks of a page in order, in one namespace, in an empty folder.

A line right before a block says where it differs:

- `<!-- tiny-janus -->`: the block runs with the names in the fixture `tiny_janus_names`, such as a small Janus, whose
  folder takes the place of `deepseek-community/Janus-Pro-1B`;
- `<!-- no-run -->`: the block cannot run here (it needs a model of several GB), and still has to be Python.

Shell blocks are tested in `test_docs_commands.py`. Links and anchors of the built site are checked here, offline.
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from helpers.site import build_site
from helpers.tiny_checkpoint import head_map, write_checkpoint
from transformers import JanusForConditionalGeneration, JanusProcessor

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>[a-z-]+) -->\n+)?```python[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
JANUS = "deepseek-community/Janus-Pro-1B"
PROMPTS = ["a photo of a red circle", "a photo of three squares"]


def _blocks(page: Path, janus: str = JANUS):
    """(code, marker or None), the code padded so that line numbers in a traceback are the page's, `janus` its Janus."""
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        lines_before = text.count("\n", 0, match.start("code"))
        yield compile("\n" * lines_before + match["code"].replace(JANUS, janus), str(page), "exec"), match["marker"]


def _markers(page: Path) -> set[str | None]:
    return {marker for _, marker in _blocks(page)}


@pytest.fixture(scope="module")
def tiny_janus_names(tmp_path_factory):
    """What a reader of the pages has: a Janus with 24 x 24 visual tokens, its processor's inputs."""
    folder = write_checkpoint(tmp_path_factory.mktemp("docs") / "model", side=24)
    processor = JanusProcessor.from_pretrained(folder)
    inputs = processor(
        text=PROMPTS, generation_mode="image", padding=True, padding_side="left", max_length=None, return_tensors="pt"
    )
    model = JanusForConditionalGeneration.from_pretrained(folder, attn_implementation="ssd")
    return {
        "model_id": str(folder),
        "model": model,
        "head_map": head_map(24),
        "inputs": inputs,
        "prompts": PROMPTS,
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
    for code, marker in _blocks(page, namespace.get("model_id", JANUS)):
        if marker != "no-run":
            exec(code, namespace)


def test_the_pages_that_open_the_documentation_run():
    """README's and the first page's code is what users copy first, so none of it may be left out."""
    for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
        assert _markers(page) == {"tiny-janus"}


# The reader's way through the pages


def _first_screen(page: Path) -> str:
    """Picture and table between the two markers of a page."""
    return re.search(r"<!-- first-screen\b.*?-->\n(.*?)<!-- /first-screen -->", page.read_text("utf-8"), re.DOTALL)[1]


def test_the_home_page_opens_as_readme_does():
    readme = _first_screen(ROOT / "README.md")
    assert "docs/compare-emoji-20.png" in readme
    assert readme.replace("](docs/", "](") == _first_screen(ROOT / "docs" / "index.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_long_page_opens_with_a_summary(page):
    text = page.read_text("utf-8")
    opening = text.split("\n## ")[0]
    assert len(text.split()) <= 1500 or re.search(r"^\*\*In short\*\*", opening, re.MULTILINE), "over 1,500 words"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_long_table_folds(page):
    text = page.read_text("utf-8")
    for table in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        before = text[: table.start()]
        is_folded = before.count("<details") > before.count("</details>")
        assert is_folded or table[0].count("\n") <= 25, table[0].splitlines()[0]
    assert text.count("<details") == text.count('<details markdown="1"><summary>') == text.count("</details>")


@pytest.mark.parametrize("name", ["results", "performance", "experiments", "emoji-janus", "shapes-janus"])
def test_a_page_of_results_opens_with_a_plot_and_a_paragraph(name):
    title, plot, paragraph, *_ = (ROOT / "docs" / f"{name}.md").read_text("utf-8").split("\n\n")
    assert title.startswith("# ")
    assert re.fullmatch(r"!\[.+\]\(.+\.png\)", plot)
    assert paragraph[0].isalpha()


# Pages that are read in the repository


OUTSIDE = [*sorted(ROOT.glob("*.md")), ROOT / "hub" / "README.md"]


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Git hosts make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_of_the_repository_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        target = urlsplit(link)
        if target.scheme:
            continue
        file = page.parent / unquote(target.path) if target.path else page
        is_there = file.is_file() and (not target.fragment or target.fragment in _anchors(file))
        if not is_there and not (file.is_dir() and not target.fragment):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("status", [200, 404])
def test_links_to_other_hosts_are_opened(tmp_path, hub, status):
    """`make links`, with a server on this machine."""
    hub.answer_always = status
    page = tmp_path / "page.md"
    page.write_text(f"[one]({hub.url}/one), [again]({hub.url}/one#part) and [here](page.md)")
    done = subprocess.run([sys.executable, ROOT / "docs" / "check_links.py", page], capture_output=True, text=True)
    assert done.returncode == (status != 200), done.stderr
    assert f"1 addresses, {int(status != 200)} do not answer" in done.stdout
    assert (str(page) in done.stdout) == (status != 200)


# The built site


class _Page(HTMLParser):
    """Anchors of a page, what it links to, and what it loads."""

    def __init__(self, file: Path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), set(), set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id"), attributes.get("name") if tag == "a" else None}
        found = self.links if tag == "a" else self.loads
        found |= {attributes[name] for name in ("href", "src") if attributes.get(name) is not None}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Pages of the site by their path."""
    folder = tmp_path_factory.mktemp("site")
    return folder, {file.relative_to(folder).as_posix(): _Page(file) for file in build_site(folder)}


def test_every_link_and_anchor_of_the_site_exists(site):
    folder, pages = site
    broken = []
    for path, page in pages.items():
        for link in page.links | page.loads:
            target = urlsplit(urljoin(f"http://site/{path}", link))
            if target.netloc != "site":
                continue
            file = unquote(target.path).strip("/")
            if (folder / file).is_dir():
                file = f"{file}/index.html".strip("/")
            anchors = pages[file].anchors if file in pages else ()
            if not (folder / file).is_file() or (target.fragment and unquote(target.fragment) not in anchors):
                broken.append(f"{path}: {link}")
    assert len(pages) > 20
    assert broken == []


def test_a_page_loads_nothing_from_elsewhere(site):
    for path, page in site[1].items():
        assert {load for load in page.loads if urlsplit(load).netloc} == set(), path
