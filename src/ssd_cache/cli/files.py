"""Files of the command line: read prompts, check output paths, write images.

Paths are checked before any work. A file is written completely or not at all, so an interrupted run leaves the older
file, or none.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.analysis.plotting import check_packages
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.io.untrusted import parse_json
from ssd_cache.io.writing import write_files
from ssd_cache.models.settings import check_texts

TOKENS = ".safetensors"
"""Suffix of a file of visual tokens: integers `[images, cells]` under the name of each policy."""

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def check_plotting(*names: str) -> None:
    """Raise WrongUse if a package that plots need is not installed; see `check_packages`."""
    try:
        check_packages(*names)
    except ImportError as error:
        raise WrongUse(str(error)) from error


def read_prompts(prompts: Sequence[str] | None, prompts_file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file: one a line, or JSON lines. Raises WrongUse."""
    found = [prompt.strip() for prompt in prompts or ()]
    if prompts_file is not None:
        try:
            lines = prompts_file.read_text("utf-8-sig").split("\n")  # prompts may hold other separators
        except (OSError, UnicodeDecodeError) as error:
            raise WrongUse(f"cannot read --prompts-file {prompts_file}: {error}") from error
        if prompts_file.suffix.lower() == ".jsonl":
            lines = [_prompt_of(line, number, prompts_file) for number, line in enumerate(lines, 1) if line.strip()]
        found += [line.strip() for line in lines if line.strip()]
    if not found:
        raise WrongUse('no prompt: give one or more ("a photo of a red circle"), or a --prompts-file with one a line')
    with refusing():
        check_texts(found)
    return found


def _prompt_of(line: str, number: int, prompts_file: Path) -> str:
    try:
        entry = parse_json(line)
        if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
            return entry["prompt"]
        raise ValueError('not a JSON object with a text under "prompt"')
    except ValueError as error:
        raise WrongUse(f"--prompts-file {prompts_file}, line {number}: {error}") from error


def check_output(output: Path, formats: Sequence[str] = tuple(IMAGE_FORMATS)) -> Path:
    """The path of an image, or of another format in `formats`. Raises WrongUse if it cannot be written."""
    output = output.expanduser()
    if output.suffix.lower() not in formats:
        raise WrongUse(f"--output {output.name}: give a name that ends with {', '.join(formats)}")
    check_place("--output", output, is_folder=False)
    return output


def check_place(option: str, place: Path, is_folder: bool) -> None:
    """Raise WrongUse, before any image is generated, if `place` cannot be written."""
    if place.exists() and place.is_dir() != is_folder:
        wanted, found = ("folder", "file") if is_folder else ("file", "folder")
        raise WrongUse(f"{option} {place} is a {found}; give a {wanted}")
    folder = place if is_folder else place.parent
    while not folder.exists() and is_folder:  # missing parent folders are created later
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WrongUse(f"{option} {place}: cannot write into {folder}: {error.strerror}") from error


def save_image(image: Image.Image, output: Path) -> None:
    """Write an image in the format of its suffix, completely or not at all."""
    content = io.BytesIO()
    image.save(content, format=IMAGE_FORMATS[output.suffix.lower()])
    write_files({output: content.getvalue()})
