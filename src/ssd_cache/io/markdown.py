"""Foreign text in Markdown: the same letters on the page, and no markup of their own.

For model cards and the pages of results. HTML is escaped by the template engine of the analysis report.
"""

from __future__ import annotations

import re

from ssd_cache.io.showing import printable

MAX_TEXT = 1000
"""Characters of a foreign text on a page."""

MARKUP = re.compile(
    r"[\\`*\[\]<>&|#~$@^]"  # emphasis, code, links, HTML, entities, tables, headings, math, mail addresses
    r"|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # an underscore within a word is none
    r"|:(?=//)|(?<=[Ww]{3})\."  # addresses that become links by themselves
    r"|^[-+=](?=\s)|^\d{1,9}[.)](?=\s|$)"  # items of lists
)


def escape(text: object) -> str:
    """The text on one line, with character references for what Markdown or HTML would take for markup."""
    line = " ".join(printable(str(text), MAX_TEXT).split())
    return MARKUP.sub(lambda match: "".join(f"&#{ord(char)};" for char in match[0]), line)


def table(heads: list[str], rows: list[list[str]], num_left: int = 1) -> str:
    """A table of foreign cells, the first `num_left` columns set on the left and the others on the right."""
    rule = ["---"] * num_left + ["---:"] * (len(heads) - num_left)
    lines = [map(escape, heads), rule, *(map(escape, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_block(text: str, language: str = "") -> str:
    """A block of code that nothing in it can end."""
    text = "\n".join(printable(line, 20 * MAX_TEXT) for line in text.split("\n"))
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
