"""Judges the image files of a benchmark one by one, and keeps a line of results.jsonl for each, so a run can resume.

The benchmarks define what a line says about a file. `comparing.py` uses the fields that all lines have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from ssd_cache.evaluation.judge_models import decode_image
from ssd_cache.io.showing import ReadableError, differences, shown
from ssd_cache.io.untrusted import WrongFileError, checked_fields, parse_json, read_bytes
from ssd_cache.io.writing import write_files

RESULTS_FILE = "results.jsonl"

REMEDY = "give another place for the results, or delete the file to begin anew"

LINE = {**dict.fromkeys(("filename", "tag", "metadata", "sha256"), str), "result": float, "judge": dict}
"""Fields of every line: the file, its kind of prompt, everything that it is judged on, its checksum, and its result.

`judge` holds the benchmark, the models and the settings that the result depends on.
"""

HIGHEST = 100.0
"""The best result of any benchmark; 0 is the worst."""

ROUNDING = 1e-3
"""How far above the best one a result may be, in parts of it: probabilities that add up to 1 may add up to more."""


def judge_files(
    files: Sequence[tuple[Path, Mapping[str, Any]]],
    judge: Callable[[int, Image.Image], Mapping[str, Any]],
    settings: Mapping[str, Any],
    results_file: str | Path | None,
    on_file: Callable[[], object] | None = None,
    kinds: Mapping[str, Any] = MappingProxyType({}),
    highest: float = HIGHEST,
) -> list[dict[str, Any]]:
    """The lines of some files, in order.

    Args:
        files: every file, with the fields of its line that are known before it is judged.
        judge: returns the other fields, from the index of a file and its RGB image.
        settings: the field `judge` of all lines.
        results_file: file of the lines. If it exists, its files are not judged again, except those that have changed.
        on_file: called after every file, for a progress bar.
        kinds: types of fields that `judge` returns, to check in an existing file of results.
        highest: the best result of this benchmark, to check in the same way.

    Raises:
        WrongFileError: the file of results holds something else, or results of another run.
        ValueError: an image cannot be read; the lines before are kept.
        OSError: the file of results cannot be written.
    """
    path = None if results_file is None else Path(results_file)
    earlier = {line["filename"]: line for line in read_lines(path, settings, kinds, highest)}
    lines = []
    for index, (file, known) in enumerate(files):
        content = file.read_bytes()
        known = {**known, "sha256": hashlib.sha256(content).hexdigest(), "judge": dict(settings)}
        line = earlier.get(known["filename"], {})
        if any(line.get(name) != value for name, value in known.items()):
            line = {**known, **judge(index, decode_image(content, file))}
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as lines_file:
                    lines_file.write(json.dumps(line) + "\n")
        lines.append(line)
        if on_file is not None:
            on_file()
    return lines


def read_lines(
    path: Path | None, settings: Mapping[str, Any], kinds: Mapping[str, Any], highest: float
) -> list[dict[str, Any]]:
    """The lines of an earlier run with the same settings; removes an incomplete last line from the file.

    Raises:
        WrongFileError: a line is damaged, or of another run.
        OSError: the file cannot be read or written.
    """
    if path is None or not path.exists():
        return []
    content = read_bytes(path)
    complete = content[: content.rfind(b"\n") + 1]
    lines = []
    for number, text in enumerate(complete.split(b"\n")[:-1], 1):
        try:
            line = check_line(parse_json(text), kinds, highest)
            if differing := differences(line["judge"], settings):
                raise ReadableError(f"a result of another run ({differing})")
        except ValueError as error:
            raise WrongFileError(f"{path}, line {number}: {error}; {REMEDY}") from error
        lines.append(line)
    if complete != content:
        write_files({path: complete})
    return lines


def check_line(line: Any, kinds: Mapping[str, Any] = MappingProxyType({}), highest: float = HIGHEST) -> dict[str, Any]:
    """The line, if it has all fields of a line and `kinds`, and a result from 0 to `highest`; raises ValueError."""
    line = checked_fields({**LINE, **kinds}, line)
    if not 0 <= line["result"] <= highest * (1 + ROUNDING):
        raise ReadableError(f"result={shown(line['result'])}, expected 0 to {highest:g}")
    return line


def wrong_line(path: str | Path | None, line: Mapping[str, Any], problem: str) -> WrongFileError:
    """The error for a line with contradictory fields."""
    return WrongFileError(f"{path}: the line of {shown(line['filename'])} {problem}; {REMEDY}")
