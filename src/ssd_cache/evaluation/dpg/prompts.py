"""Reads DPG-Bench prompts by item id, from `prompts.jsonl` or from the official folder of .txt files.

The questions are in another file, which `questions.py` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ssd_cache.evaluation.dpg.reading import DPGError, as_id, as_text, field, json_rows, read_text


def read_prompts(path: str | Path) -> dict[str, str]:
    """Read prompts by item id, without leading and trailing blanks.

    Args:
        path: a file of JSON lines with `item_id` and `prompt`, read in file order; or a folder of `<item_id>.txt`
            files, as ELLA's `dpg_bench/prompts`, read in order of the names.

    Raises:
        DPGError: a line is not JSON, a prompt is empty, an id is repeated or not usable as a file name, or there are
            no prompts. The message names the file and line.
        OSError: the file cannot be read.
    """
    path = Path(path)
    prompts: dict[str, str] = {}
    places: dict[str, str] = {}
    for where, item_id, prompt in _text_files(path) if path.is_dir() else _json_lines(path):
        if not re.fullmatch(r"[\w-]+", item_id):
            raise DPGError(
                f"{where}: item id {item_id!r} can not name a picture; use letters, digits, '_' and '-' only "
                "(the official script cuts names at the first dot)"
            )
        if item_id in prompts:
            raise DPGError(f"{where}: item id {item_id!r} stands in {places[item_id]} already; take one out")
        prompts[item_id], places[item_id] = prompt, where
    if not prompts:
        wanted = "put <item_id>.txt files there" if path.is_dir() else "give a line for each prompt"
        raise DPGError(f"{path} has no prompts: {wanted}")
    return prompts


def _json_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    for where, row in json_rows(path):
        item_id = as_id(field(row, "item_id", where), "item_id", where)
        yield where, item_id, as_text(field(row, "prompt", where), "prompt", where)


def _text_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(folder.glob("*.txt")):
        if path.is_file() and not path.name.startswith("."):
            yield str(path), path.stem, as_text(read_text(path), "the prompt", str(path))
