"""Files of the command line: read prompts, check output paths, write images.

Checks run before any work. An image is written under a temporary name in the same folder and then renamed. An
interrupted run therefore leaves the older file, or none.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.cli.errors import WrongUse
from ssd_cache.io.untrusted import parse_json

TOKENS = ".safetensors"
"""Suffix of a file of visual tokens: integers `[images, cells]` under the name of each policy."""

PICTURE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_prompts(prompts: Sequence[str], prompts_file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file, one a line. Empty lines are skipped.

    A line of a `.jsonl` file is an object with the text under "prompt", as in GenEval's evaluation_metadata.jsonl.

    Raises:
        WrongUse: no prompt at all, an empty one, or a file that cannot be read.
    """
    found = [prompt.strip() for prompt in prompts]
    if not all(found):
        raise WrongUse(f"prompt {found.index('') + 1} is empty; write what the picture is to show")
    if prompts_file is not None:
        try:
            lines = prompts_file.read_text(encoding="utf-8-sig").split("\n")  # prompts may hold other separators
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise WrongUse(f"can not read --prompts-file {prompts_file}: {reason}") from error
        if prompts_file.suffix.lower() == ".jsonl":
            lines = [_prompt_of(line, number, prompts_file) for number, line in enumerate(lines, 1) if line.strip()]
        found += [line.strip() for line in lines if line.strip()]
    for number, text in enumerate(found, 1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise WrongUse(f"prompt {number} is not valid Unicode text; give it in UTF-8") from error
    if not found:
        where = f"; {prompts_file} has none" if prompts_file else ""
        raise WrongUse(
            f'no prompt{where}: give one or more ("a photo of a red circle"), or a --prompts-file with one a line'
        )
    return found


def _prompt_of(line: str, number: int, prompts_file: Path) -> str:
    place = f"--prompts-file {prompts_file}, line {number}"
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise WrongUse(f"{place}: {error}") from error
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        return entry["prompt"]
    raise WrongUse(f'{place}: not a JSON object with a text under "prompt"')


def check_output(output: Path, formats: Sequence[str] = tuple(PICTURE_FORMATS)) -> Path:
    """The path of an image, or of another format in `formats`, made absolute.

    Raises:
        WrongUse: another format, a missing folder, or a path that cannot be written.
    """
    output = output.expanduser().absolute()
    if output.suffix.lower() not in formats:
        raise WrongUse(f"--output {output.name}: give a name that ends with {', '.join(formats)}")
    if output.is_dir():
        raise WrongUse(f"--output {output} is a folder; give a file in it")
    if not output.parent.is_dir():
        raise WrongUse(f"--output {output}: the folder {output.parent} does not exist; make it first")
    check_writable("--output", output, output.parent)
    return output


def check_writable(option: str, place: Path, folder: Path) -> None:
    """Raise WrongUse, naming the option and its `place`, if `folder` is not writable."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WrongUse(f"{option} {place}: can not write into {folder}: {error.strerror}") from error


def check_place(option: str, place: Path, is_folder: bool) -> None:
    """Raise WrongUse, before any image is generated, if `place` cannot be written."""
    if place.exists() and place.is_dir() != is_folder:
        wanted, found = ("folder", "file") if is_folder else ("file", "folder")
        raise WrongUse(f"{option} {place} is a {found}; give a {wanted}")
    folder = place if is_folder else place.parent
    while not folder.exists() and is_folder:  # missing parent folders are created later
        folder = folder.parent
    if not folder.is_dir():
        raise WrongUse(f"{option} {place}: can not write into {folder}, which is no folder; give another place")
    check_writable(option, place, folder)


def save_picture(image: Image.Image, output: Path) -> None:
    """Write an image completely or not at all."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        image.save(temporary, format=PICTURE_FORMATS[output.suffix.lower()])
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
