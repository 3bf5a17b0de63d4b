"""One 2 x 2 sheet of images per prompt, as the official DPG-Bench script reads it: TL, TR, BL, BR, no gutter.

It writes, finds and cuts sheets. Generating the images and asking the questions are done elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.evaluation.judge_models import encode_png
from ssd_cache.io.showing import ReadableError
from ssd_cache.io.writing import write_files

NUM_IMAGES = 4
"""Number of images on a sheet."""


class SheetFolder:
    """A folder with a sheet per prompt; the constructor reads and writes no files.

    Images are numbered: image `n` is part `n % 4` of the sheet of prompt `n // 4`.

    Attributes:
        root: the folder of the sheets, `<item_id>.png`.
        prompts: prompts by item id, as `read_prompts` returns them.
        texts: the text to generate each image from.
        unit: number of images that are written together.
    """

    unit = NUM_IMAGES

    def __init__(self, root: str | Path, prompts: Mapping[str, str]):
        self.root, self.prompts, self._item_ids = Path(root), prompts, list(prompts)
        self.texts: Sequence[str] = [text for text in prompts.values() for _ in range(NUM_IMAGES)]

    def prompt_lines(self) -> str:
        """The prompts as JSON lines that `read_prompts` can read."""
        rows = ({"item_id": item_id, "prompt": text} for item_id, text in self.prompts.items())
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def missing(self, numbers: range) -> list[int]:
        """Those of some images whose sheet does not exist yet."""
        return [n for n in numbers if not (self.root / f"{self._item_ids[n // NUM_IMAGES]}.png").is_file()]

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write the sheets of some images that do not exist yet; raises OSError if one cannot be written."""
        for number in self.missing(numbers)[::NUM_IMAGES]:
            start = number - numbers[0]
            write_sheet(self.root, self._item_ids[number // NUM_IMAGES], images[start : start + NUM_IMAGES])


def write_sheet(folder: str | Path, item_id: str, images: Sequence[Image.Image]) -> Path:
    """Write four square images `[side, side]` as the sheet `<folder>/<item_id>.png`, `[2 * side, 2 * side]`.

    Raises:
        ValueError: there are not four images, or they are not all square and of one size.
        OSError: the file cannot be written; an existing file is then unchanged.
    """
    sizes = [image.size for image in images]
    side = sizes[0][0]
    if sizes != [(side, side)] * NUM_IMAGES:
        raise ReadableError(f"{len(sizes)} images of sizes {sizes}: a sheet takes {NUM_IMAGES} squares of one size")
    sheet = Image.new("RGB", (2 * side, 2 * side))
    for image, box in zip(images, _boxes(side), strict=True):
        sheet.paste(image.convert("RGB"), box[:2])
    path = Path(folder) / f"{item_id}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_files({path: encode_png(sheet)})
    return path


def cut_sheet(sheet: Image.Image, side: int, name: str = "the sheet") -> list[Image.Image]:
    """Cut a sheet into its four images `[side, side]`, RGB, in the order TL, TR, BL, BR.

    The official script does not check `side`, and silently cuts wrong areas. Here, the size must match; `name` stands
    for the sheet in the message.

    Raises:
        ValueError: the sheet is not `2 * side` wide and high.
    """
    width, height = sheet.size
    if (width, height) != (2 * side, 2 * side):
        remedy = f"pass side={width // 2}" if width == height and width % 2 == 0 else "generate it again"
        raise ReadableError(
            f"{name} is {width} x {height}; with side={side} it must be {2 * side} x {2 * side}, four images in a "
            f"square: {remedy}"
        )
    sheet = sheet.convert("RGB")
    return [sheet.crop(box) for box in _boxes(side)]


def find_sheets(folder: str | Path) -> dict[str, Path]:
    """Find the image files of a folder by item id (the name up to its first dot), sorted by name.

    All formats that PIL supports are accepted. Other files, hidden files and subfolders are ignored.

    Raises:
        ValueError: two image files have the same id.
        OSError: the folder does not exist.
    """
    sheets: dict[str, Path] = {}
    formats = Image.registered_extensions()
    for path in sorted(Path(folder).iterdir()):
        if not path.name.startswith(".") and path.suffix.lower() in formats and path.is_file():
            item_id = path.name.split(".")[0]
            if item_id in sheets:
                raise ReadableError(f"{sheets[item_id]} and {path.name} are both of item {item_id!r}; remove one")
            sheets[item_id] = path
    return sheets


def _boxes(side: int) -> list[tuple[int, int, int, int]]:
    """The boxes (left, upper, right, lower) of TL, TR, BL and BR."""
    return [(x, y, x + side, y + side) for y in (0, side) for x in (0, side)]
