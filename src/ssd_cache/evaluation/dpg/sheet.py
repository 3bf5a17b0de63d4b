"""One 2 x 2 sheet of images per prompt, as the official DPG-Bench script reads it: TL, TR, BL, BR, no gutter.

It writes, finds, checks and cuts sheets. Generating the images and asking the questions are done elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.evaluation.dpg.reading import DPGError, named
from ssd_cache.io.writing import write_files

PICTURES = 4
"""Pictures on a sheet."""


def make_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """A sheet `[2 * side, 2 * side]` of four square pictures `[side, side]`, in the order TL, TR, BL, BR.

    Raises:
        DPGError: not four pictures, or not all square and of one size.
    """
    sizes = [picture.size for picture in pictures]
    if len(sizes) != PICTURES or len(set(sizes)) != 1 or sizes[0][0] != sizes[0][1]:
        raise DPGError(f"{len(sizes)} pictures of sizes {sizes}: a sheet takes {PICTURES} squares of one size")
    side = sizes[0][0]
    sheet = Image.new("RGB", (2 * side, 2 * side))
    for picture, box in zip(pictures, _boxes(side), strict=True):
        sheet.paste(picture.convert("RGB"), box[:2])
    return sheet


def write_sheet(folder: str | Path, item_id: str, pictures: Sequence[Image.Image]) -> Path:
    """Write an item's sheet as `<folder>/<item_id>.png`, whole or not at all, in place of an older one.

    Raises:
        DPGError: see `make_sheet`; or an item id that is no plain file name.
        OSError: the file cannot be written.
    """
    if not item_id or Path(item_id).name != item_id or "." in item_id:
        raise DPGError(f"item id {item_id!r} can not name a picture; give one without dots and slashes")
    content = io.BytesIO()
    make_sheet(pictures).save(content, "PNG")
    path = Path(folder) / f"{item_id}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: content.getvalue()})
    return path


def cut_sheet(sheet: Image.Image, side: int) -> list[Image.Image]:
    """The four pictures `[side, side]` of a sheet, RGB, in the order TL, TR, BL, BR.

    The official script trusts the side it is given and cuts wrong areas without a word; here it must fit.

    Raises:
        DPGError: the sheet is not `2 * side` wide and high.
    """
    check_side(sheet.size, side, "the sheet")
    sheet = sheet.convert("RGB")
    return [sheet.crop(box) for box in _boxes(side)]


def check_side(size: tuple[int, int], side: int, what: str) -> None:
    """Refuse a sheet of another size than the side of one of its pictures says.

    Raises:
        DPGError: it is not `2 * side` wide and high.
    """
    if size != (2 * side, 2 * side):
        width, height = size
        remedy = f"pass side={width // 2}" if width == height and width % 2 == 0 else "draw it anew"
        raise DPGError(
            f"{what} is {width} x {height}; with side={side} it must be {2 * side} x {2 * side}, four pictures in a "
            f"square: {remedy}"
        )


def find_sheets(folder: str | Path) -> dict[str, Path]:
    """Pictures in a folder by item id (the name up to its first dot), of any format that PIL knows, sorted by name.

    Other files, hidden ones and folders are passed over.

    Raises:
        DPGError: two pictures have one id, or there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DPGError(f"{folder} is no folder: give the one that holds the sheets, <item_id>.png")
    formats = Image.registered_extensions()
    sheets: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in formats or not path.is_file():
            continue
        item_id = path.name.split(".")[0]
        if item_id in sheets:
            raise DPGError(f"{sheets[item_id]} and {path.name} are both of item {item_id!r}: take one out")
        sheets[item_id] = path
    return sheets


def missing_sheets(folder: str | Path, item_ids: Iterable[str]) -> list[str]:
    """Items without a sheet yet, in their order: what is left to draw. No folder yet means all of them.

    Sheets of `write_sheet` are whole when they are there, so they are not opened.
    """
    sheets = find_sheets(folder) if Path(folder).exists() else {}
    return [item_id for item_id in item_ids if item_id not in sheets]


def check_sheets(folder: str | Path, item_ids: Iterable[str], side: int) -> dict[str, Path]:
    """Check that every item has a sheet, that no other picture is there, and that each has the right size.

    Returns the sheets by item id, in the order of `item_ids`. Of each picture only the head is read.

    Raises:
        DPGError: says how many there are of how many, and which are missing, not asked for, unreadable or of
            another size.
    """
    item_ids = list(item_ids)
    sheets = find_sheets(folder)
    missing = [item_id for item_id in item_ids if item_id not in sheets]
    if missing:
        raise DPGError(
            f"{folder} has {len(item_ids) - len(missing)} of {len(item_ids)} sheets, not {named(missing)}: draw them"
        )
    unknown = sorted(sheets.keys() - set(item_ids))
    if unknown:
        raise DPGError(f"{folder} has pictures of no item asked for, {named(unknown)}: take them out")
    for item_id in item_ids:
        try:
            with Image.open(sheets[item_id]) as sheet:
                size = sheet.size
        except OSError as error:
            raise DPGError(f"{sheets[item_id]} can not be read ({error}): draw it anew") from error
        check_side(size, side, str(sheets[item_id]))
    return {item_id: sheets[item_id] for item_id in item_ids}


def _boxes(side: int) -> list[tuple[int, int, int, int]]:
    """(left, upper, right, lower) of TL, TR, BL, BR."""
    return [(x, y, x + side, y + side) for y in (0, side) for x in (0, side)]
