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
"""Number of images on a sheet."""


def make_sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Make a sheet `[2 * side, 2 * side]` of four square images `[side, side]`, in the order TL, TR, BL, BR.

    Raises:
        DPGError: there are not four images, or they are not all square and of one size.
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
    """Write an item's sheet atomically as `<folder>/<item_id>.png`. An existing file is replaced.

    Raises:
        DPGError: see `make_sheet`; or the item id is not a plain file name.
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
    """Cut a sheet into its four images `[side, side]`, RGB, in the order TL, TR, BL, BR.

    The official script does not check `side`, and silently cuts wrong areas. Here, the size must match.

    Raises:
        DPGError: the sheet is not `2 * side` wide and high.
    """
    check_side(sheet.size, side, "the sheet")
    sheet = sheet.convert("RGB")
    return [sheet.crop(box) for box in _boxes(side)]


def check_side(size: tuple[int, int], side: int, what: str) -> None:
    """Check the size of a sheet against the side of one of its images.

    Raises:
        DPGError: the sheet is not `2 * side` wide and high.
    """
    if size != (2 * side, 2 * side):
        width, height = size
        remedy = f"pass side={width // 2}" if width == height and width % 2 == 0 else "draw it anew"
        raise DPGError(
            f"{what} is {width} x {height}; with side={side} it must be {2 * side} x {2 * side}, four pictures in a "
            f"square: {remedy}"
        )


def find_sheets(folder: str | Path) -> dict[str, Path]:
    """Find the image files of a folder by item id (the name up to its first dot), sorted by name.

    All formats that PIL supports are accepted. Other files, hidden files and subfolders are ignored.

    Raises:
        DPGError: two image files have the same id, or the folder does not exist.
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
    """Items that still lack a sheet, in the given order. If the folder does not exist, these are all items.

    Sheets are not opened, because `write_sheet` never leaves incomplete files.
    """
    sheets = find_sheets(folder) if Path(folder).exists() else {}
    return [item_id for item_id in item_ids if item_id not in sheets]


def check_sheets(folder: str | Path, item_ids: Iterable[str], side: int) -> dict[str, Path]:
    """Check that every item has a sheet, that there are no other images, and that each sheet has the right size.

    Returns the sheets by item id, in the order of `item_ids`. Only the header of each image file is read.

    Raises:
        DPGError: a sheet is missing, unexpected, unreadable or of another size. The message names the sheets and says
            how many exist.
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
    """The boxes (left, upper, right, lower) of TL, TR, BL and BR."""
    return [(x, y, x + side, y + side) for y in (0, side) for x in (0, side)]
