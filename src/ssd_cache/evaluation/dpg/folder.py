"""DPG-Bench's prompts, and one 2 x 2 sheet of images for each, as the official script reads it: TL, TR, BL, BR.

The questions are in another file, which `questions.py` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.evaluation.export import ImageSet
from ssd_cache.evaluation.judge_models import encode_png
from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import read_json_lines, read_text
from ssd_cache.io.writing import write_files

NUM_IMAGES = 4
"""Number of images on a sheet."""

MAX_ID = 200
"""Maximum number of bytes of an item id: names of files have at most 255, with the ending and a temporary part."""


def read_prompts(path: str | Path) -> dict[str, str]:
    """Read prompts by item id, without leading and trailing blanks.

    Args:
        path: a file of JSON lines with `item_id` and `prompt`, read in file order; or a folder of `<item_id>.txt`
            files, as ELLA's `dpg_bench/prompts`, read in order of the names.

    Raises:
        ValueError: a line is not JSON, a prompt is empty, an id is repeated or not usable as a file name, or there are
            no prompts. The message names the file and line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    prompts: dict[str, str] = {}
    for place, item_id, prompt in _text_files(path) if path.is_dir() else _json_lines(path):
        if not re.fullmatch(r"[\w-]+", item_id) or len(item_id.encode()) > MAX_ID:
            raise ReadableError(
                f"{place}: item id {shown(item_id)} cannot name an image; use at most {MAX_ID} letters, digits, '_' "
                "and '-' (the official script cuts names at the first dot)"
            )
        if item_id in prompts:
            raise ReadableError(f"{place}: item id {item_id!r} occurs twice; remove one")
        if not prompt.strip():
            raise ReadableError(f"{place}: the prompt is empty")
        prompts[item_id] = prompt.strip()
    if not prompts:
        raise ReadableError(f"{path} has no prompts; give JSON lines, or a folder of <item_id>.txt files")
    return prompts


def _json_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    for place, row in read_json_lines(path):
        item_id, prompt = row.get("item_id"), row.get("prompt")
        if type(item_id) not in (int, str) or not isinstance(prompt, str):
            raise ReadableError(f'{place}: {shown(row)} needs texts as "item_id" and "prompt"')
        yield place, str(item_id), prompt


def _text_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(folder.glob("[!.]*.txt")):
        yield str(path), path.stem, read_text(path)


class SheetFolder(ImageSet):
    """A folder with a sheet per prompt, `<item_id>.png`: image `n` is part `n % 4` of the sheet of prompt `n // 4`.

    The constructor reads and writes no files. `prompts` are as `read_prompts` returns them.
    """

    unit = NUM_IMAGES

    def __init__(self, root: str | Path, prompts: Mapping[str, str]):
        self.root, self._item_ids = Path(root), list(prompts)
        self.texts: Sequence[str] = [text for text in prompts.values() for _ in range(NUM_IMAGES)]

    def path(self, number: int) -> Path:
        """The sheet that holds an image."""
        return self.root / f"{self._item_ids[number // NUM_IMAGES]}.png"

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write the sheets of some images that do not exist yet; raises OSError if one cannot be written."""
        for number in self.missing(numbers)[::NUM_IMAGES]:
            start = number - numbers.start
            write_sheet(self.path(number), images[start : start + NUM_IMAGES])


def prompt_lines(prompts: Mapping[str, str]) -> str:
    """The prompts as JSON lines that `read_prompts` can read."""
    rows = ({"item_id": item_id, "prompt": text} for item_id, text in prompts.items())
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_sheet(path: Path, images: Sequence[Image.Image]) -> None:
    """Write four square images `[side, side]` as a PNG `[2 * side, 2 * side]`, completely or not at all.

    Raises:
        ValueError: there are not four images, or they are not all square and of one size.
        OSError: the file cannot be written.
    """
    sizes = [image.size for image in images]
    side = sizes[0][0]
    if sizes != [(side, side)] * NUM_IMAGES:
        raise ReadableError(f"{len(sizes)} images of sizes {sizes}: a sheet takes {NUM_IMAGES} squares of one size")
    sheet = Image.new("RGB", (2 * side, 2 * side))
    for image, box in zip(images, _boxes(side), strict=True):
        sheet.paste(image.convert("RGB"), box[:2])
    write_files({path: encode_png(sheet)})


def cut_sheet(sheet: Image.Image, name: str = "the sheet") -> list[Image.Image]:
    """Cut a sheet into its four images `[side, side]`, RGB, in the order TL, TR, BL, BR.

    The official script takes the side as an option, and silently cuts wrong areas if it is wrong. Here it is half the
    width, and a sheet that is not square raises ValueError with its `name`.
    """
    width, height = sheet.size
    if width != height or width % 2:
        raise ReadableError(f"{name} is {width} x {height}, not four images in a square; generate it again")
    sheet = sheet.convert("RGB")
    return [sheet.crop(box) for box in _boxes(width // 2)]


def find_sheets(folder: str | Path) -> dict[str, Path]:
    """Find the image files of a folder, of any format of PIL, by item id (the name up to its first dot).

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
