"""Reads DPG-Bench prompts by item id, from `prompts.jsonl` or from the official folder of .txt files.

The questions are in another file, which `questions.py` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import read_json_lines


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
        if not re.fullmatch(r"[\w-]+", item_id):
            raise ReadableError(
                f"{place}: item id {shown(item_id)} cannot name an image; use letters, digits, '_' and '-' only (the "
                "official script cuts names at the first dot)"
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
        if not isinstance(item_id, int | str) or not isinstance(prompt, str):
            raise ReadableError(f'{place}: {shown(row)} needs texts as "item_id" and "prompt"')
        yield place, str(item_id), prompt


def _text_files(folder: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted(folder.glob("[!.]*.txt")):
        yield str(path), path.stem, path.read_text("utf-8-sig")
