"""Reads GenEval's prompt file, evaluation_metadata.jsonl or a part of it, into prompts with their requirements.

An invalid line is refused with its file and number. Nothing is downloaded or judged here. The official file has 553
prompts; a prompt's number in an image folder is that of its line, counted from 0.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_cache.evaluation.geneval.names import CLASSES, COLORS, RELATIONS, TAGS
from ssd_cache.io.showing import ReadableError, printable, shown
from ssd_cache.io.untrusted import parse_json

NUM_PROMPTS = 553
"""Number of prompts in the official file."""


@dataclass(frozen=True)
class Include:
    """Objects that an image must show: `count` of a class, optionally with a colour and a position.

    `position` is (relation, index in the prompt's `include` of the entry that the position is relative to).
    """

    class_name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Exclude:
    """Objects that an image must not show: `count` or more of a class."""

    class_name: str
    count: int


@dataclass(frozen=True)
class GenEvalPrompt:
    """One line of the prompt file; `str(prompt)` is the text to generate from."""

    tag: str
    prompt: str
    include: tuple[Include, ...]
    exclude: tuple[Exclude, ...] = ()

    def __str__(self) -> str:
        return self.prompt

    def to_json(self) -> str:
        """The line of the prompt file, without its line end."""
        include = []
        for item in self.include:
            entry: dict[str, Any] = {"class": item.class_name, "count": item.count}
            if item.color is not None:
                entry["color"] = item.color
            if item.position is not None:
                entry["position"] = list(item.position)
            include.append(entry)
        line: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.exclude:
            line["exclude"] = [{"class": item.class_name, "count": item.count} for item in self.exclude]
        return json.dumps({**line, "prompt": self.prompt})


def read_prompts(path: str | Path) -> list[GenEvalPrompt]:
    """Read the prompts of a file in the format of evaluation_metadata.jsonl, one JSON object per line.

    Raises:
        ValueError: the file cannot be read or is empty, or a line is invalid; the message has its number, from 1.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ReadableError(
            f"{path}: the prompts can not be read ({reason}); give GenEval's evaluation_metadata.jsonl"
        ) from error
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    if not lines:
        raise ReadableError(f"{path}: no prompt in it; give GenEval's evaluation_metadata.jsonl, or some of its lines")
    return [parse_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def parse_prompt(line: str, place: str = "the prompt") -> GenEvalPrompt:
    """Parse one line; `place` is the start of an error message.

    Raises:
        ValueError: the line is not a JSON object, or has requirements unknown to GenEval.
    """
    try:
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise ReadableError(f"not JSON: {error}") from error
        return _prompt_of(entry)
    except ValueError as error:
        raise ReadableError(
            f"{place}: {error}; take the line as it is in GenEval's evaluation_metadata.jsonl"
        ) from error


def _prompt_of(line: Any) -> GenEvalPrompt:
    _check_keys("the line", line, {"tag", "include", "prompt"}, {"exclude"})
    tag = _one_of("tag", line["tag"], TAGS)
    if not isinstance(line["prompt"], str) or not line["prompt"].strip():
        raise ReadableError(f"prompt is {shown(line['prompt'])}, not a text")
    for key in ("include", "exclude"):
        if not isinstance(line.get(key, []), list):
            raise ReadableError(f"{key} is {shown(line[key])}, not a list")
    if not line["include"]:
        raise ReadableError("include is empty, so that every picture would be correct")
    include = tuple(_include_of(f"include[{index}]", item, index) for index, item in enumerate(line["include"]))
    exclude = tuple(_exclude_of(f"exclude[{index}]", item) for index, item in enumerate(line.get("exclude", [])))
    return GenEvalPrompt(tag, line["prompt"], include, exclude)


def _include_of(name: str, item: Any, index: int) -> Include:
    _check_keys(name, item, {"class", "count"}, {"color", "position"})
    color = _one_of(f"{name} color", item["color"], COLORS) if "color" in item else None
    position = None
    if "position" in item:
        position = item["position"]
        if not isinstance(position, list) or len(position) != 2:
            raise ReadableError(f"{name} position is {shown(position)}, not [relation, index of an entry of include]")
        relation, target = _one_of(f"{name} relation", position[0], RELATIONS), position[1]
        if type(target) is not int or not 0 <= target < index:
            raise ReadableError(f"{name} position is relative to entry {shown(target)}, not to one before it, from 0")
        position = (relation, target)
    return Include(_one_of(f"{name} class", item["class"], CLASSES), _count(name, item), color, position)


def _exclude_of(name: str, item: Any) -> Exclude:
    _check_keys(name, item, {"class", "count"}, set())
    return Exclude(_one_of(f"{name} class", item["class"], CLASSES), _count(name, item))


def _check_keys(name: str, item: Any, needed: set[str], more: set[str]) -> None:
    if not isinstance(item, dict):
        raise ReadableError(f"{name} is {shown(item)}, not an object with {', '.join(sorted(needed))}")
    if missing := sorted(needed - item.keys()):
        raise ReadableError(f"{name} has no {', '.join(missing)}")
    if unknown := sorted(item.keys() - needed - more):
        raise ReadableError(f"{name} has {printable(', '.join(unknown), 200)}, which means nothing here")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        listed = ", ".join(known) if len(known) <= 10 else f"one of the {len(known)} in GenEval's object_names.txt"
        raise ReadableError(f"{name} is {shown(value)}, not {listed}")
    return value


def _count(name: str, item: dict[str, Any]) -> int:
    if type(item["count"]) is not int or item["count"] < 1:
        raise ReadableError(f"{name} count is {shown(item['count'])}, not a whole number from 1 up")
    return item["count"]
