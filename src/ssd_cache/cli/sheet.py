"""A contact sheet: images in rows, with prompts above the images and a label to the left of each row.

Uses only Pillow and is independent of models and caches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
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
    sheet = _Sheet(width // shrink, height // shrink, rows)
    blocks = [range(start, min(start + columns, len(captions))) for start in range(0, len(captions), columns)]
    headings = [list(sheet.headings(captions, block)) for block in blocks]
    image = Image.new("RGB", (sheet.width(columns), sheet.height(headings, len(rows))), PAPER)
    top = sheet.margin
    for block, heading in zip(blocks, headings, strict=True):
        top = sheet.draw_block(ImageDraw.Draw(image), image, top, block, heading)
    return image


class _Sheet:
    """Sizes of one sheet, all derived from the size of a cell."""

    def __init__(self, cell_width: int, cell_height: int, rows: Sequence[Row]):
        self.cell_width, self.cell_height, self.rows = cell_width, cell_height, rows
        self.text_size = max(11, cell_width // 19)
        self.gap, self.margin = max(4, cell_width // 32), max(8, cell_width // 16)
        self.font = ImageFont.load_default(self.text_size)
        self.title_font = ImageFont.load_default(self.text_size * 1.25)
        self.line = round(self.text_size * LINE_HEIGHT)
        self.title_line = round(self.text_size * 1.25 * LINE_HEIGHT)
        widths = [self.title_font.getlength(row.title) for row in rows]
        widths += [self.font.getlength(note) for row in rows for note in row.notes]
        self.label_width = ceil(max(widths)) + self.margin if any(row.title for row in rows) else 0

    def width(self, columns: int) -> int:
        return 2 * self.margin + self.label_width + self.span(columns)

    def span(self, columns: int) -> int:
        """Width of neighbouring cells, including the gaps between them."""
        return columns * (self.cell_width + self.gap) - self.gap

    def height(self, headings: Sequence[Sequence[tuple[int, list[str]]]], num_rows: int) -> int:
        blocks = sum(self.heading_height(heading) + num_rows * (self.cell_height + self.gap) for heading in headings)
        return blocks - self.gap + 2 * self.margin + (len(headings) - 1) * (self.margin - self.gap)

    def heading_height(self, heading: Sequence[tuple[int, list[str]]]) -> int:
        return max(len(lines) for _, lines in heading) * self.line + self.gap

    def headings(self, captions: Sequence[str], block: range) -> Iterator[tuple[int, list[str]]]:
        """Yield (number of cells, lines) for every caption of a block."""
        for caption, cells in groupby(block, key=lambda index: captions[index]):
            number = len(list(cells))
            yield number, _wrap(caption, self.font, self.span(number))

    def draw_block(self, draw: ImageDraw.ImageDraw, image: Image.Image, top: int, block: range, heading) -> int:
        """Draw captions and rows of one block; returns where the next one starts."""
        first = self.margin + self.label_width
        left, bottom = first, top + self.heading_height(heading) - self.gap
        for number, lines in heading:
            for index, line in enumerate(lines):  # the last line is right above the image
                draw.text((left, bottom - (len(lines) - index) * self.line), line, INK, self.font)
            left += self.span(number) + self.gap
        top = bottom + self.gap
        for row in self.rows:
            self._draw_label(draw, row, top)
            for column, index in enumerate(block):
                picture = row.images[index].convert("RGB")
                if picture.size != (self.cell_width, self.cell_height):
                    picture = picture.resize((self.cell_width, self.cell_height), Image.Resampling.BOX)
                image.paste(picture, (first + column * (self.cell_width + self.gap), top))
            top += self.cell_height + self.gap
        return top - self.gap + self.margin

    def _draw_label(self, draw: ImageDraw.ImageDraw, row: Row, top: int) -> None:
        top += (self.cell_height - self.title_line - len(row.notes) * self.line) // 2
        draw.text((self.margin, top), row.title, INK, self.title_font)
        for index, note in enumerate(row.notes):
            draw.text((self.margin, top + self.title_line + index * self.line), note, FAINT, self.font)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Split text into at most `MAX_LINES` lines no wider than `width`. Cut text ends in dots."""

    def length(part: str) -> float:
        return float(font.getlength(part))

    lines = [""]
    for word in printable(text, MAX_TEXT).split():
        pieces = [word]
        while font.getlength(pieces[-1]) > width and len(pieces[-1]) > 1:  # split a word that is wider than a line
            rest = pieces.pop()
            fit = bisect_right([*accumulate(rest)], float(width), 1, len(rest) - 1, key=length)
            pieces += [rest[:fit], rest[fit:]]
        for piece in pieces:
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(piece)
    if len(lines) > MAX_LINES:
        last = lines[MAX_LINES - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: MAX_LINES - 1], last.rstrip() + "..."]
    return lines
