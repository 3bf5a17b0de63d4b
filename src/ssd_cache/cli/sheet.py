"""A contact sheet: images in rows, with prompts above the images and a label to the left of each row.

Uses only Pillow and is independent of models and caches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from ssd_cache.io.showing import printable

INK, FAINT, PAPER = (28, 28, 32), (112, 112, 120), (255, 255, 255)
MAX_WIDTH = 4096
MAX_LINES = 6
MAX_TEXT = 1000  # characters of a caption
LINE_HEIGHT = 1.3


@dataclass(frozen=True)
class Row:
    """One row: title, notes, and images, all of one size. A row without a title has no label."""

    images: Sequence[Image.Image]
    title: str = ""
    notes: tuple[str, ...] = ()


def contact_sheet(rows: Sequence[Row], captions: Sequence[str], columns: int) -> Image.Image:
    """Arrange images in rows of `columns`. Further images go into another block of the same rows below.

    Args:
        rows: rows with one image for each caption.
        captions: one for each image. Neighbours with the same caption share it.
        columns: maximum number of images side by side.
    """
    columns = min(columns, len(captions))
    width, height = rows[0].images[0].size
    shrink = max(1, ceil(columns * width / MAX_WIDTH))  # a whole number, so that all cells of pixel art keep equal size
    layout = _Layout(width // shrink, height // shrink, columns, rows)
    starts = range(0, len(captions), columns)
    blocks = [layout.block(captions, range(start, min(start + columns, len(captions)))) for start in starts]
    margin = layout.margin
    size = blocks[0].width + 2 * margin, sum(block.height + margin for block in blocks) + margin
    sheet, top = Image.new("RGB", size, PAPER), margin
    for block in blocks:
        sheet.paste(block, (margin, top))
        top += block.height + margin
    return sheet


class _Layout:
    """Sizes and fonts of one sheet, all derived from the size of a cell."""

    def __init__(self, width: int, height: int, columns: int, rows: Sequence[Row]):
        self.width, self.height, self.columns, self.rows = width, height, columns, rows
        self.gap, self.margin = max(4, width // 32), max(8, width // 16)
        text_size = max(11, width // 19)
        self.font, self.title_font = ImageFont.load_default(text_size), ImageFont.load_default(text_size * 1.25)
        self.line, self.title_line = round(text_size * LINE_HEIGHT), round(text_size * 1.25 * LINE_HEIGHT)
        lengths = [self.title_font.getlength(row.title) for row in rows]
        lengths += [self.font.getlength(note) for row in rows for note in row.notes]
        self.label_width = ceil(max(lengths)) + self.margin if any(row.title for row in rows) else 0

    def span(self, columns: int) -> int:
        """Width of neighbouring cells, including the gaps between them."""
        return columns * (self.width + self.gap) - self.gap

    def block(self, captions: Sequence[str], cells: range) -> Image.Image:
        """Captions and all rows of some neighbouring images."""
        groups = [(caption, len(list(group))) for caption, group in groupby(captions[cell] for cell in cells)]
        heading = [(_wrap(caption, self.font, self.span(number)), number) for caption, number in groups]
        top = max(len(lines) for lines, _ in heading) * self.line + self.gap
        height = top + len(self.rows) * (self.height + self.gap) - self.gap
        block = Image.new("RGB", (self.label_width + self.span(self.columns), height), PAPER)
        draw, left = ImageDraw.Draw(block), self.label_width
        for lines, number in heading:
            for above, line in enumerate(reversed(lines), 1):  # the last line is right above the image
                draw.text((left, top - self.gap - above * self.line), line, INK, self.font)
            left += self.span(number) + self.gap
        for row in self.rows:
            self._draw_label(draw, row, top)
            for column, cell in enumerate(cells):
                image = row.images[cell].convert("RGB")
                if image.size != (self.width, self.height):
                    image = image.resize((self.width, self.height), Image.Resampling.BOX)
                block.paste(image, (self.label_width + column * (self.width + self.gap), top))
            top += self.height + self.gap
        return block

    def _draw_label(self, draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
        top += (self.height - self.title_line - len(row.notes) * self.line) // 2
        draw.text((0, top), row.title, INK, self.title_font)
        for index, note in enumerate(row.notes):
            draw.text((0, top + self.title_line + index * self.line), note, FAINT, self.font)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Split text into at most `MAX_LINES` lines no wider than `width`. Cut text ends in dots."""

    def num_fitting(part: str) -> int:
        """How many first characters of a text fit into a line; at least one."""
        ends = range(1, len(part) + 1)
        return max(1, bisect_right(ends, 0.0, key=lambda end: font.getlength(part[:end]) - width))

    rest = " ".join(printable(text, MAX_TEXT).split())
    lines: list[str] = []
    while rest and len(lines) < MAX_LINES:
        end = num_fitting(rest)
        if end < len(rest) and (space := rest.rfind(" ", 1, end + 1)) > 0:  # else the word is wider than a line
            end = space
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "..."
    return lines or [""]
