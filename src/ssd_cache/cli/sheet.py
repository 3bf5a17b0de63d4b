"""A contact sheet: labelled rows of images, with the prompts above the images.

Uses only Pillow and is independent of models and caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from ssd_cache.io.showing import printable

INK, PAPER = (28, 28, 32), (255, 255, 255)
MAX_WIDTH = 4096
MAX_LINES = 6
MAX_TEXT = 1000  # characters of a caption
LABEL_WIDTH = 128  # of rows of smaller images


def contact_sheet(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], columns: int) -> Image.Image:
    """Arrange images in rows of `columns`. Further images go into another block of the same rows below.

    Args:
        rows: by label, one image for each caption, all of one size. Labels are at the left of each row.
        captions: one for each image. The next images with the same caption do not repeat it.
        columns: maximum number of images side by side.
    """
    columns = min(columns, len(captions))
    width, height = next(iter(rows.values()))[0].size
    shrink = max(1, ceil(columns * width / MAX_WIDTH))  # a whole number, so that all cells of pixel art keep equal size
    width, height = width // shrink, height // shrink
    labels = [_text(label, max(width, LABEL_WIDTH)) for label in rows]
    empty = Image.new("RGB", (max(label.width for label in labels), 1), PAPER)
    strips = []
    for start in range(0, len(captions), columns):
        numbers = range(start, min(start + columns, len(captions)))
        new = [number == start or captions[number] != captions[number - 1] for number in numbers]
        texts = [captions[number] if is_new else "" for number, is_new in zip(numbers, new, strict=True)]
        strips.append([empty, *(_text(text, width) for text in texts)])
        for label, images in zip(labels, rows.values(), strict=True):
            cells = (images[number].convert("RGB") for number in numbers)
            strips.append([label, *(cell.resize((width, height), Image.Resampling.BOX) for cell in cells)])
    gap, left = max(4, width // 32), max(8, width // 16)
    indent = left + (empty.width + left if empty.width > 1 else 0)
    heights = [max(cell.height for cell in strip) for strip in strips]
    size = indent + columns * (width + gap) - gap + left, sum(heights) + gap * (len(strips) - 1) + 2 * left
    sheet, bottom = Image.new("RGB", size, PAPER), left
    for strip, tall in zip(strips, heights, strict=True):
        bottom += tall
        for column, cell in enumerate(strip):
            x = left if column == 0 else indent + (column - 1) * (width + gap)
            sheet.paste(cell, (x, bottom - cell.height))
        bottom += gap
    return sheet


def _text(text: str, width: int) -> Image.Image:
    """An image of text in at most `MAX_LINES` lines no wider than `width`; cut text ends in dots."""
    size = max(11, width // 19)
    font = ImageFont.load_default(size)
    lines = [line for part in printable(text, MAX_TEXT).split("\n") for line in _wrap(part, font, width)]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"{lines[MAX_LINES - 1][:-3]}..."]
    line_height = ceil(1.3 * size)
    wide = min(width, ceil(max((font.getlength(line) for line in lines), default=0))) or 1
    image = Image.new("RGB", (wide, max(1, line_height * len(lines))), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, number * line_height), line, INK, font)
    return image


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width`, broken between words, and within a word only where it is wider itself."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
