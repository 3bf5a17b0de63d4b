"""Pages that hold foreign text, rendered by Markdown libraries and read as HTML: tags, links and text.

It does not make the pages.
"""

from __future__ import annotations

from html.parser import HTMLParser

import yaml
from markdown_it import MarkdownIt

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])

CARD_TAGS = {"h1", "h2", "p", "em", "code", "pre", "a", "img", "table", "thead", "tbody", "tr", "th", "td"}
CARD_LINKS = {"https://arxiv.org/abs/2510.18716", "head_map.png"}
CARD_FRONT = {"library_name", "tags", "base_model"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; a comment or an attribute with a script is an error."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data):
        self.text += data


def pages(text: str) -> list[Page]:
    """A text by CommonMark with tables, HTML allowed, and by Python-Markdown where it is installed."""
    found = [Page(MARKDOWN.render(text))]
    try:
        import markdown
    except ImportError:
        return found
    return [*found, Page(markdown.markdown(text, extensions=["tables", "fenced_code", "sane_lists"]))]


def check_card(text: str) -> None:
    """Check that a model card has no other front matter, tags and links than every card."""
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    facts = yaml.safe_load(front)
    assert facts.keys() <= CARD_FRONT
    assert facts["library_name"] == "ssd-cache"
    assert isinstance(facts.get("base_model", ""), str)
    for page in pages(body):
        assert set(page.tags) <= CARD_TAGS, set(page.tags) - CARD_TAGS
        assert set(page.links) <= CARD_LINKS, set(page.links) - CARD_LINKS
        assert page.tags.count("h1") == 1
        assert page.tags.count("h2") <= 4
