"""Generates a benchmark's images into a folder: in fixed batches, shared by several processes, resumable per image.

The folder records the settings of its images, and a run with other settings is refused. The benchmarks (`geneval`,
`dpg`) define names and layout of the images, and their scorers score them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers import Cache

from ssd_cache.budget import check_count
from ssd_cache.evaluation.conditions import hashed_seed
from ssd_cache.evaluation.judge_models import encode_png
from ssd_cache.io.showing import ReadableError, differences
from ssd_cache.io.untrusted import checked_fields, parse_json, read_bytes
from ssd_cache.io.writing import remove_parts, write_files
from ssd_cache.models import Generator
from ssd_cache.runs.processes import Processes

SETTINGS_FILE = "settings.json"
"""Lies in the folder's root, where neither official scorer takes it for an image."""

PROMPTS_FILE = "prompts.jsonl"
"""File of the prompts of the images, next to the settings; the folder can be scored without another file."""


class ExportError(ReadableError):
    """A folder that a run cannot generate into, or can no longer write to."""


class ImageSet:
    """Images that are numbered from 0, and their files; a subclass defines `path`.

    Attributes:
        root: their folder.
        texts: the prompt of each image.
        unit: images that are written as one file; a batch size is a multiple of it.
    """

    root: Path
    texts: Sequence[str]
    unit: int = 1

    def path(self, number: int) -> Path:
        """The file of an image; a file that exists is complete."""
        raise NotImplementedError

    def missing(self, numbers: range) -> list[int]:
        """Numbers of the images that do not exist yet."""
        return [number for number in numbers if not self.path(number).is_file()]

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write the images of a batch that do not exist yet, each completely or not at all."""
        for number in self.missing(numbers):
            write_files({self.path(number): self.encode(number, images[number - numbers.start])})

    def encode(self, number: int, image: Image.Image) -> bytes:
        """The content of an image's file."""
        return encode_png(image)


def claim_folder(root: Path, settings: Mapping[str, Any], prompts: str, *, write: bool = True) -> None:
    """Record settings and prompts in a new or empty folder, or check that they equal the recorded ones.

    `settings` are everything that the images depend on, `prompts` the text of `PROMPTS_FILE`. Only one of several
    processes writes.

    Raises:
        ExportError: the settings differ, or the folder holds files of unknown origin.
    """
    if (root / SETTINGS_FILE).exists():
        if differing := differences(read_settings(root), json.loads(json.dumps(settings))):
            raise ExportError(
                f"{root}: its images have other settings ({differing}); give another folder, or the same settings"
            )
    elif write:
        check_unclaimed(root)
        root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        write_files({root / PROMPTS_FILE: prompts.encode(), root / SETTINGS_FILE: text.encode()})
    if write:
        remove_parts(root)


def check_unclaimed(root: Path) -> None:
    """Refuse a folder that has files but no settings; raises ExportError."""
    if root.exists() and (not root.is_dir() or any(path.name != PROMPTS_FILE for path in root.iterdir())):
        raise ExportError(
            f"{root}: it is not empty and has no {SETTINGS_FILE}, so its content is unknown; give a new folder"
        )


def read_settings(root: Path) -> dict[str, Any]:
    """Settings of the images in a folder, empty if another program wrote it; raises ExportError."""
    path = root / SETTINGS_FILE
    if not path.exists():
        return {}
    try:
        settings = checked_fields({"format": str}, parse_json(read_bytes(path)))
        if not settings["format"].startswith("ssd-cache "):
            raise ReadableError("ssd-cache did not write it")
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: not the settings of images ({error}); delete it, or generate into another"
        ) from error
    return settings


def recorded_batch_size(root: Path) -> int | None:
    """The batch size recorded in a folder; None for a folder without settings."""
    found = read_settings(root).get("batch_size")
    return found if type(found) is int and found > 0 else None


def generate_images(
    generator: Generator,
    images: ImageSet,
    make_cache: Callable[[], Cache],
    *,
    batch_size: int,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    processes: Processes | None = None,
    progress: bool = True,
    seed_of_batch: Callable[[int, int], int] = hashed_seed,
    title: str = "generating",
) -> int:
    """Generate the missing images; returns how many this process generated.

    Image number n always belongs to batch n // batch_size, and the random numbers of a batch depend only on `seed` and
    its number (`seed_of_batch`). If a batch lacks an image, the whole batch is generated, and only the missing images
    are written. So a run that was killed and resumed writes the same bytes as an uninterrupted one, and every policy
    gets the same random numbers.

    Args:
        generator: generates the images.
        images: prompts and files of the images.
        make_cache: makes a fresh cache; called for every batch.
        batch_size: images generated at once; their prompts are padded to the longest.
        seed: seed of the whole run.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`.
        processes: the processes that share the batches; by default only this one.
        progress: show a progress bar over visual tokens, in the main process.
        seed_of_batch: torch's seed, from `seed` and the number of a batch.
        title: title of the bar.

    Raises:
        ExportError: an image cannot be written; earlier ones are kept.
        ValueError: the batch size is not valid.
    """
    if check_count("batch_size", batch_size, 1) % images.unit:
        raise ExportError(
            f"batch_size={batch_size}: {images.unit} images are written as one; give a multiple of {images.unit}"
        )
    processes = Processes() if processes is None else processes
    total, cells = len(images.texts), generator.checkpoint.num_visual_tokens
    batches = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    todo = [(index, numbers) for index, numbers in enumerate(batches) if images.missing(numbers)]
    processes.gather_all(None)  # all must list what is missing before one writes, or their lists would differ
    own = todo[processes.index :: processes.count]
    count = sum(len(numbers) for _, numbers in own)
    with tqdm(
        total=cells * count,
        desc=title,
        unit=" visual tokens",
        disable=not (progress and processes.is_main),
        mininterval=0.1 if sys.stderr.isatty() else 10,  # fewer lines in a log file
    ) as bar:
        for index, numbers in own:
            tokens = generator.generate(
                [images.texts[number] for number in numbers],
                make_cache(),
                guidance_scale=guidance_scale,
                temperature=temperature,
                seed=seed_of_batch(seed, index),
                on_tokens=bar.update,
            )
            batch = generator.to_images(tokens)  # the whole batch: another batch size may change the last bits
            try:
                images.write(numbers, batch)
            except OSError as error:
                raise ExportError(
                    f"{images.root}: images cannot be written ({error.strerror}); earlier ones are kept: make room, "
                    "and run the same command again to resume"
                ) from error
    processes.gather_all(None)
    return count
