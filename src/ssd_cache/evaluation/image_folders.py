"""Folders of images with captions: numbered files that `generate` writes, and the images of any folder.

Prompts may hold any characters, so a file's name is the number of its image. Each file carries its prompt and settings
in a PNG text chunk, and `metadata.jsonl` lists them. Names and order are the same on every machine.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ssd_cache.evaluation.export import ImageSet, read_settings
from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import checked_fields, parse_json, read_bytes, read_json_lines
from ssd_cache.io.writing import write_files

CAPTIONS_FILE = "metadata.jsonl"
"""A list of captions next to the images, as in image folders of the Hub: file_name and prompt (or text) per line."""

CHUNK = "ssd-cache"
"""Keyword of the PNG text chunk with the metadata of an image, an ASCII JSON object."""


class ImageFolderError(ReadableError):
    """A folder whose images or captions cannot be found."""


@dataclass(frozen=True)
class FolderImage:
    """An image in a folder, with its caption if the folder has one; `name` is the path below the folder."""

    name: str
    path: Path
    caption: str = ""

    def open(self) -> Image.Image:
        """Read the image, completely and as RGB; raises the exceptions of PIL."""
        with Image.open(self.path) as file:
            return file.convert("RGB")


def find_images(folder: str | Path) -> list[FolderImage]:
    """List the images of a folder, sorted by path: GenEval's samples, or all images in it and its subfolders.

    Raises:
        ImageFolderError: the folder has no images, or holds the sheets of `eval dpg export`.
        ValueError: a damaged metadata.jsonl or settings.json.
    """
    folder, formats = Path(folder), Image.registered_extensions()
    if str(read_settings(folder).get("format")).startswith("ssd-cache dpg"):
        raise ImageFolderError(f"{folder} has sheets of four images; give a folder with single images")
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in formats and path.is_file())
    found = _geneval_images(folder) or [
        FolderImage(path.relative_to(folder).as_posix(), path) for path in paths if not path.name.startswith(".")
    ]
    if not found:
        raise ImageFolderError(f"{folder} has no images; give a folder with .png, .jpg and the like")
    return found


def find_captioned(folder: str | Path) -> list[FolderImage]:
    """Images with their captions: GenEval's layout, or a `metadata.jsonl`.

    Raises:
        ImageFolderError: none of these; a line of the list without an image inside the folder, or an image listed
            twice.
        ValueError: a file that cannot be read; the message names the line.
    """
    folder = Path(folder)
    found = _geneval_images(folder) or _listed_images(folder)
    if not found:
        raise ImageFolderError(
            f"{folder} has no captions; give GenEval's layout, or images and a {CAPTIONS_FILE} with "
            '{"file_name": ..., "prompt": ...} on each line'
        )
    return found


def _geneval_images(folder: Path) -> list[FolderImage]:
    found = []
    for captions in sorted(folder.glob(f"[0-9]*/{CAPTIONS_FILE}")):
        if samples := sorted((captions.parent / "samples").glob("[0-9]*.png")):
            try:
                text = checked_fields({"prompt": str}, parse_json(read_bytes(captions)))["prompt"]
            except ValueError as error:
                raise ImageFolderError(f"{captions}: {error}; generate the images again") from error
            found += [FolderImage(path.relative_to(folder).as_posix(), path, text) for path in samples]
    return found


def _listed_images(folder: Path) -> list[FolderImage]:
    found: dict[str, FolderImage] = {}
    lines = read_json_lines(folder / CAPTIONS_FILE) if (folder / CAPTIONS_FILE).is_file() else []
    for place, row in lines:
        name, text = row.get("file_name"), row.get("prompt", row.get("text"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise ImageFolderError(f'{place}: {shown(row)} needs texts as "file_name" and "prompt"')
        is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if name in found or not is_inside or not os.path.isfile(folder / name):  # False also for a name too long
            problem = "is listed twice" if name in found else "does not exist" if is_inside else "leaves the folder"
            raise ImageFolderError(f"{place}: the image {shown(name)} {problem}; correct the list")
        found[name] = FolderImage(name, folder / name, text)
    return list(found.values())


@dataclass
class NumberedImages(ImageSet):
    """PNG files named by the number of the image: `num_images` consecutive images per prompt.

    `facts` are the settings that all images share; the metadata of every image include them.
    """

    root: Path
    texts: Sequence[str]
    num_images: int
    batch_size: int
    facts: Mapping[str, Any]

    def path(self, number: int) -> Path:
        """The file of an image, counted from 0; a file that exists is complete."""
        return self.root / f"{number:05}.png"

    def metadata(self, number: int) -> str:
        """The prompt and settings of an image, as JSON. The images of a batch share its seed."""
        batch = number // self.batch_size
        own = {
            "file_name": self.path(number).name,
            "prompt": self.texts[number],
            "index": number,
            "sample": number % self.num_images,
            "batch": batch,
            "batch_seed": self.batch_seed(self.facts["seed"], batch),
        }
        return json.dumps({**own, **self.facts})

    @staticmethod
    def batch_seed(seed: int, batch: int) -> int:
        """torch's seed for a batch."""
        return seed + batch

    def encode(self, number: int, image: Image.Image) -> bytes:
        """A PNG file with the metadata in a text chunk."""
        text, content = PngImagePlugin.PngInfo(), io.BytesIO()
        text.add_text(CHUNK, self.metadata(number))
        image.save(content, format="PNG", pnginfo=text)
        return content.getvalue()

    def write_list(self) -> int:
        """Write `metadata.jsonl`, one line for each existing image; returns their number."""
        existing = [number for number in range(len(self.texts)) if self.path(number).exists()]
        lines = "".join(f"{self.metadata(number)}\n" for number in existing)
        write_files({self.root / CAPTIONS_FILE: lines.encode()})
        return len(existing)
