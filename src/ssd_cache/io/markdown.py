"""Escapes untrusted text in Markdown, so that the page shows the same characters and no markup.

It is used for model cards and result pages. The HTML of the analysis report is escaped by its template engine instead.
"""

from __future__ import annotations

import re

from ssd_cache.io.showing import printable

MAX_TEXT = 1000
"""Maximum number of characters of an untrusted text on a page."""

MARKUP = re.compile(
    r"[\\`*\[\]<>&|#~$@^]"  # emphasis, code, links, HTML, entities, tables, headings, math, mail addresses
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # an underscore within a word is not markup
    r"|:(?=//)|(?<=[Ww]{3})\."  # URLs, which some renderers turn into links
)
AT_LINE_START = re.compile(MARKUP.pattern + r"|^[-+=](?=[\s=-]|$)|^\d{1,9}[.)](?=\s|$)")
"""Also list items, rules and underlined headings."""


def escape(text: object) -> str:
    """The text on one line, with character references in place of Markdown and HTML markup."""
    return _escape(text, AT_LINE_START)


def _escape(text: object, markup: re.Pattern[str]) -> str:
    line = " ".join(printable(str(text), MAX_TEXT).split())
    return markup.sub(lambda match: "".join(f"&#{ord(char)};" for char in match[0]), line)


def table(heads: list[str], rows: list[list[str]], num_left: int = 1) -> str:
    """A table of untrusted cells; the first `num_left` columns are aligned left, the others right."""
    rule = ["---"] * num_left + ["---:"] * (len(heads) - num_left)
    head, *cells = ([_escape(cell, MARKUP) for cell in row] for row in (heads, *rows))  # no cell begins a line
    lines = [head, rule, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_block(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    text = "\n".join(printable(line, 20 * MAX_TEXT) for line in text.split("\n"))
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
