"""Generates a benchmark's images into a folder: in fixed batches, shared by several processes, resumable per image.

The folder records the settings of its images, and a run with other settings is refused. The benchmarks (`geneval`,
`dpg`) define names and layout of the images, and their scorers score them.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm
from transformers import Cache

from ssd_cache.budget import check_count
from ssd_cache.evaluation.conditions import draw_seed
from ssd_cache.io.showing import ReadableError, differences
from ssd_cache.io.untrusted import checked, parse_json
from ssd_cache.io.writing import write_files
from ssd_cache.models import Generator
from ssd_cache.runs.processes import Processes

SETTINGS_FILE = "settings.json"
"""In the folder's root, where neither official scorer takes it for a picture."""

PROMPTS_FILE = "prompts.jsonl"
"""Beside it: the prompts that were drawn, so that the folder is scored without another file."""


class ExportError(ReadableError):
    """A folder that a run cannot draw into, or can no longer write to."""


class PictureSet(Protocol):
    """The pictures of a benchmark, numbered from 0, and where they lie.

    Attributes:
        root: their folder.
        texts: what to draw, one a picture.
        unit: pictures that are written together; a batch is a multiple of it.
    """

    root: Path
    texts: Sequence[str]
    unit: int

    def missing(self, numbers: range) -> list[int]:
        """Those of some pictures that are not there yet."""

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write those of a batch's pictures that are not there yet, each whole or not at all."""


def claim_folder(root: Path, settings: Mapping[str, Any], prompts: str, *, write: bool = True) -> None:
    """Enter settings and prompts into a folder that is new or empty, or see that they are those it has.

    Args:
        root: the folder.
        settings: all that the pictures depend on, as JSON values.
        prompts: the text of `PROMPTS_FILE`.
        write: make the folder; of several processes one does.

    Raises:
        ExportError: other settings, each field with both values; or files of which nobody knows what they are.
        OSError: it cannot be written.
    """
    if (root / SETTINGS_FILE).exists():
        if differing := differences(read_settings(root), json.loads(json.dumps(settings))):
            raise ExportError(
                f"{root}: its pictures were drawn with other settings ({differing}); give another folder, "
                "or the settings it was begun with"
            )
    elif write:
        check_unclaimed(root)
        root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
        write_files({root / PROMPTS_FILE: prompts.encode(), root / SETTINGS_FILE: text.encode()})
    if write:
        for part in root.rglob(".*.part"):  # of a run that was killed while it wrote
            part.unlink(missing_ok=True)


def check_unclaimed(root: Path) -> None:
    """Refuse a folder that has files and no settings; raises ExportError."""
    if root.exists() and (not root.is_dir() or any(path.name != PROMPTS_FILE for path in root.iterdir())):
        raise ExportError(
            f"{root}: it is not empty and has no {SETTINGS_FILE}, so what is there is unknown; give a new folder"
        )


def read_settings(root: Path) -> dict[str, Any]:
    """What the pictures of a folder were drawn with; empty for a folder that some other program wrote.

    Raises:
        ExportError: the file cannot be read.
    """
    path = root / SETTINGS_FILE
    if not path.exists():
        return {}
    try:
        settings = checked(dict, parse_json(path.read_bytes()))
        if not str(settings.get("format")).startswith("ssd-cache "):
            raise ValueError("ssd-cache did not write it")
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{path}: the settings of the pictures can not be read ({error}); take the file away, or draw them anew"
        ) from error
    return settings


def recorded_batch_size(root: Path) -> int | None:
    """The batch size that a folder was begun with; None for a folder without settings.

    Raises:
        ExportError: the settings cannot be read.
    """
    found = read_settings(root).get("batch_size")
    return found if type(found) is int and found > 0 else None


def draw_pictures(
    generator: Generator,
    pictures: PictureSet,
    make_cache: Callable[[], Cache],
    *,
    batch_size: int,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    processes: Processes | None = None,
    progress: bool = True,
    seed_of_batch: Callable[[int, int], int] = draw_seed,
    title: str = "drawing",
) -> int:
    """Draw what is missing; returns how many pictures this process drew.

    Picture number n belongs to batch n // batch_size, always, and a batch's draws of chance depend on `seed` and its
    number alone (`seed_of_batch`). A batch that is there is passed over. One of which a picture is missing is drawn
    whole, and only what was missing is written. So a run that was killed ends with the bytes of an unbroken one,
    every policy gets the same chance, and the first prompts of a file get the pictures that the whole file gives them,
    except in a last batch that is not full.

    Args:
        generator: draws.
        pictures: what to draw, and where to.
        make_cache: called for a fresh cache for every batch.
        batch_size: pictures drawn at once; their prompts are padded to the longest.
        seed: of all of it.
        guidance_scale: the checkpoint's own when not given.
        temperature: likewise.
        processes: those that share the batches; this one alone when not given.
        progress: show a bar over visual tokens, in the main process.
        seed_of_batch: torch's seed, from `seed` and the number of a batch.
        title: of the bar.

    Raises:
        ExportError: a picture cannot be written; those before it are kept.
        ValueError: a batch size that does not fit.
    """
    check_count("batch_size", batch_size, 1)
    if batch_size % pictures.unit:
        raise ExportError(
            f"batch_size={batch_size}: {pictures.unit} pictures are written as one; give a multiple of {pictures.unit}"
        )
    processes = Processes() if processes is None else processes
    total, cells = len(pictures.texts), generator.checkpoint.num_visual_tokens
    batches = [range(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]
    todo = [index for index, numbers in enumerate(batches) if pictures.missing(numbers)]
    wait_for_all(processes)  # before a process writes all must have looked, or they would share other lists
    own, drawn = todo[processes.index :: processes.count], 0
    with tqdm(
        total=cells * sum(len(batches[index]) for index in own),
        desc=title,
        unit=" visual tokens",
        disable=not (progress and processes.is_main),
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file gets a line now and then
    ) as bar:
        for index in own:
            numbers = batches[index]
            tokens = generator.generate(
                [pictures.texts[number] for number in numbers],
                make_cache(),
                guidance_scale=guidance_scale,
                temperature=temperature,
                seed=seed_of_batch(seed, index),
                on_tokens=bar.update,
            )
            images = generator.to_images(tokens)  # all of them: alone, a picture may be decoded to other last bits
            try:
                pictures.write(numbers, images)
            except OSError as error:
                raise ExportError(
                    f"{pictures.root}: pictures can not be written ({error.strerror}); those that are there are kept: "
                    "make room, and run the same command again to go on"
                ) from error
            drawn += len(numbers)
    wait_for_all(processes)
    return drawn


def wait_for_all(processes: Processes) -> None:
    """Go on when every process has come here."""
    if processes.count > 1:
        importlib.import_module("accelerate").PartialState().wait_for_everyone()
