"""Finds the images of a folder and their captions: GenEval's layout, DPG-Bench's sheets, or files and a list.

It opens no image. Names and order are the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ssd_cache.evaluation.dpg.prompts import read_prompts as read_dpg_prompts
from ssd_cache.evaluation.dpg.sheet import NUM_IMAGES, cut_sheet, find_sheets
from ssd_cache.evaluation.export import PROMPTS_FILE
from ssd_cache.evaluation.geneval.prompts import read_prompts
from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import read_json_lines

CAPTIONS_FILE = "metadata.jsonl"
"""A list of captions next to the images, as in image folders of the Hub: file_name and prompt (or text) per line."""


class PictureFolderError(ReadableError):
    """A folder whose images or captions cannot be found."""


@dataclass(frozen=True)
class Picture:
    """An image in a file, or one of the four on a sheet (`quarter` 0 to 3)."""

    name: str
    path: Path
    quarter: int | None = None

    def open(self) -> Image.Image:
        """Read the image, completely and as RGB; raises the exceptions of PIL."""
        with Image.open(self.path) as file:
            image = file.convert("RGB")
        return image if self.quarter is None else cut_sheet(image, image.width // 2)[self.quarter]


Captioned = tuple[Picture, str]
"""An image and its caption."""


def find_pictures(folder: str | Path) -> list[Picture]:
    """All images in a folder and its subfolders, by name; of GenEval's layout only the samples, of sheets the quarters.

    Raises:
        PictureFolderError: no such folder, or no image in it.
    """
    folder = Path(folder)
    _check_folder(folder)
    if sheets := _sheets(folder):
        return [picture for item_id in sheets for picture in _quarters(item_id, sheets[item_id])]
    formats = Image.registered_extensions()
    is_geneval = bool(_geneval_folders(folder))
    found = [
        Picture(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in formats
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (not is_geneval or path.parent.name == "samples")
    ]
    if not found:
        raise PictureFolderError(f"{folder} has no pictures; give a folder with .png, .jpg and the like")
    return found


def find_captioned(folder: str | Path) -> list[Captioned]:
    """Images with their captions: GenEval's layout, sheets of `eval dpg export`, or a `metadata.jsonl`.

    Raises:
        PictureFolderError: none of these; a line of the list without an image, or an image listed twice.
        ValueError: a file that cannot be read; the message names the line.
    """
    folder = Path(folder)
    _check_folder(folder)
    if below := _geneval_folders(folder):
        return [pair for path in below for pair in _geneval_pictures(folder, path)]
    if (folder / CAPTIONS_FILE).is_file():
        return _listed(folder)
    if sheets := _sheets(folder):
        prompts = read_dpg_prompts(folder / PROMPTS_FILE)
        return [(picture, prompts[item]) for item in sheets for picture in _quarters(item, sheets[item])]
    raise PictureFolderError(
        f"{folder}: nothing says what its pictures are of; give GenEval's layout, a folder of `eval dpg export`, or "
        f'a {CAPTIONS_FILE} beside the pictures with {{"file_name": ..., "prompt": ...}} a line'
    )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise PictureFolderError(f"{folder} is no folder; give one with pictures")


def _geneval_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.isdigit() and (path / CAPTIONS_FILE).is_file())


def _geneval_pictures(root: Path, folder: Path) -> list[Captioned]:
    text = read_prompts(folder / CAPTIONS_FILE)[0].prompt
    found = sorted((folder / "samples").glob("*.png"))
    return [(Picture(path.relative_to(root).as_posix(), path), text) for path in found if path.stem.isdigit()]


def _sheets(folder: Path) -> dict[str, Path]:
    """Sheets by item id, if a prompt file of `eval dpg export` says that the images are sheets."""
    path = folder / PROMPTS_FILE
    if not path.is_file() or (folder / CAPTIONS_FILE).is_file() or _geneval_folders(folder):
        return {}
    prompts = read_dpg_prompts(path)
    return {item_id: sheet for item_id, sheet in find_sheets(folder).items() if item_id in prompts}


def _quarters(item_id: str, path: Path) -> list[Picture]:
    return [Picture(f"{path.name} [{quarter}]", path, quarter) for quarter in range(NUM_IMAGES)]


def _listed(folder: Path) -> list[Captioned]:
    found: dict[str, Captioned] = {}
    for where, row in read_json_lines(folder / CAPTIONS_FILE):
        name, text = row.get("file_name"), row.get("prompt", row.get("text"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise PictureFolderError(f'{where}: {shown(row)} needs texts as "file_name" and "prompt"')
        path = folder / name
        if name in found or not path.is_file():
            problem = "stands in it twice" if name in found else "is not there"
            raise PictureFolderError(f"{where}: the picture {shown(name)} {problem}; take the line out, or mend it")
        found[name] = (Picture(name, path), text)
    return list(found.values())
