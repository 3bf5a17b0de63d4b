"""GenEval's vocabulary and prompts: evaluation_metadata.jsonl, or a part of it, with the requirements of each prompt.

The classes are COCO's in COCO's order, three of them renamed. A detector's labels are matched by their index here,
never by name. Source: github.com/djghosh13/geneval, evaluation/object_names.txt and the prompts (MIT).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import checked, parse_json, read_json_lines

Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]

TAGS: tuple[Tag, ...] = get_args(Tag)
COLORS: tuple[Color, ...] = get_args(Color)

_CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""

CLASSES = tuple(name.strip() for name in _CLASSES.split(","))

NUM_PROMPTS = 553
"""Number of prompts in the official file."""


@dataclass(frozen=True)
class Objects:
    """A number of objects of one class."""

    class_name: str
    count: int

    def __post_init__(self) -> None:
        if self.class_name not in CLASSES:
            raise ReadableError(f"class={shown(self.class_name)}, expected one of the {len(CLASSES)} of GenEval")
        if self.count < 1:
            raise ReadableError(f"count={self.count}, expected 1 or more")


@dataclass(frozen=True)
class Include(Objects):
    """Objects that an image must show, optionally with a colour and a position.

    `position` is (relation, index in the prompt's `include` of the entry that the position is relative to).
    """

    color: Color | None = None
    position: tuple[Relation, int] | None = None


@dataclass(frozen=True)
class GenEvalPrompt:
    """One line of the prompt file.

    Attributes:
        tag: the task, one of six.
        include: objects that an image must show.
        prompt: the text to generate from.
        exclude: an image must show fewer objects than these.
    """

    tag: Tag
    include: tuple[Include, ...]
    prompt: str
    exclude: tuple[Objects, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.include:
            raise ReadableError("prompt or include is empty")
        for index, item in enumerate(self.include):
            if item.position is not None and not 0 <= item.position[1] < index:
                raise ReadableError(f"include[{index}] is relative to entry {item.position[1]}, not to one before it")

    def to_json(self) -> str:
        """The line of the prompt file, without its line end."""
        line = {"tag": self.tag, "include": self.include, "exclude": self.exclude, "prompt": self.prompt}
        return json.dumps({name: value for name, value in line.items() if value}, default=_entry)


def read_prompts(path: str | Path) -> list[GenEvalPrompt]:
    """Read the prompts of a file in the format of evaluation_metadata.jsonl, one JSON object per line.

    Raises:
        ValueError: the file has no prompts, or a line is invalid; the message has its number, from 1.
        OSError: the file cannot be read.
    """
    prompts = [_prompt_of(line, place) for place, line in read_json_lines(Path(path))]
    if not prompts:
        raise ReadableError(f"{path}: no prompt in it; give lines of GenEval's evaluation_metadata.jsonl")
    return prompts


def parse_prompt(line: str, place: str = "the prompt") -> GenEvalPrompt:
    """Parse one line; `place` is the start of an error message.

    Raises:
        ValueError: the line is not a JSON object, or has requirements unknown to GenEval.
    """
    return _prompt_of(parse_json(line), place)


def _prompt_of(line: Any, place: str) -> GenEvalPrompt:
    try:
        return checked(GenEvalPrompt, _renamed(line))
    except ValueError as error:
        raise ReadableError(f"{place}: {error}; give a line of GenEval's evaluation_metadata.jsonl") from error


def _renamed(value: Any) -> Any:
    """A JSON value with "class_name" in place of "class", which cannot name a field in Python."""
    if isinstance(value, dict):
        return {"class_name" if name == "class" else name: _renamed(entry) for name, entry in value.items()}
    return [_renamed(entry) for entry in value] if isinstance(value, list) else value


def _entry(item: Objects) -> dict[str, Any]:
    """An entry of the prompt file's "include" or "exclude"."""
    given = {name: value for name, value in asdict(item).items() if value is not None}
    return {"class": given.pop("class_name"), **given}
