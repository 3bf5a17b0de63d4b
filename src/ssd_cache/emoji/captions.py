"""Captions of emoji: 80 subjects in two styles on eight backgrounds, and the combinations that are never trained.

A caption names a subject and may name a style and a background. One combination in ten is held out: no training image
shows it, whatever its caption names. `emoji/judge.py` decides whether an image shows what its caption names.
"""

from __future__ import annotations

import difflib
import random
import re
from dataclasses import dataclass
from itertools import product

from ssd_cache.io.showing import MAX_VALUE, ReadableError, shown

SUBJECTS = (
    *("red apple", "banana", "cherries", "grapes", "lemon", "pineapple", "strawberry", "watermelon", "pear"),
    *("carrot", "broccoli", "avocado", "mushroom", "hamburger", "pizza", "hot dog", "french fries", "doughnut"),
    *("cupcake", "coffee", "beer", "bear", "cat", "dog", "fox", "lion", "panda", "pig", "rabbit", "tiger"),
    *("frog", "monkey", "penguin", "owl", "dolphin", "octopus", "turtle", "snail", "butterfly", "ladybug"),
    *("elephant", "unicorn", "snake", "fish", "crab", "cactus", "tree", "palm tree", "sunflower", "tulip"),
    *("rose", "maple leaf", "airplane", "car", "bus", "rocket", "sailboat", "house", "umbrella", "rainbow"),
    *("snowman", "sun", "moon", "fire", "volcano", "soccer ball", "basketball", "trophy", "gift", "light bulb"),
    *("crown", "heart", "robot", "ghost", "skull", "alien", "pumpkin", "diamond", "bomb", "alarm clock"),
)
"""Subjects by their names in captions. Each is one base emoji, so no two are variants of one."""

STYLES = ("noto", "fluent")
"""The sets of icons: Google's Noto Emoji and Microsoft's Fluent Emoji (flat)."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (30, 30, 34),
    "gray": (150, 155, 165),
    "pink": (250, 190, 205),
    "yellow": (250, 225, 120),
    "green": (165, 215, 150),
    "blue": (140, 190, 240),
    "purple": (190, 160, 225),
}
"""RGB of every background."""

TEMPLATES = {
    "subject": ("{subject}", "an emoji of {subject}"),
    "style": ("{subject}, {style} style", "{subject} in {style} style"),
    "background": ("{subject} on a {background} background", "a {background} background with {subject}"),
    "all": (
        "{subject}, {style} style, on a {background} background",
        "{subject} in {style} style on a {background} background",
        "an emoji of {subject}, {style} style, {background} background",
        "a {background} background with {subject}, {style} style",
    ),
}
"""Templates of captions by what they name; `{subject}` includes its article."""

KINDS = (*TEMPLATES, "unseen")
"""Kinds of prompts. "unseen" names all three, in a combination that is held out."""

KIND_SHARES = {"subject": 10, "style": 12, "background": 12, "all": 66}
"""Frequency in training of captions by what they name."""

COMBINATIONS = tuple(product(SUBJECTS, STYLES, BACKGROUNDS))
HELD_OUT = frozenset(random.Random("held-out-0").sample(COMBINATIONS, len(COMBINATIONS) // 10))
"""Combinations (subject, style, background) that no training image shows: 128 of 1,280."""

TRAINED = tuple(each for each in COMBINATIONS if each not in HELD_OUT)

_EXAMPLES = "'a cat', 'a cat in noto style' or 'a cat, noto style, on a blue background'"

MAX_HINTS = 5
"""Maximum number of unknown words that an error names; a caption may be of any length."""

PROMPT_LENGTH = 16
"""Maximum number of tokens of a caption, with begin-of-sequence and begin-of-image."""

WORDS = tuple(
    sorted(
        {word for subject in SUBJECTS for word in subject.split()}
        | {*STYLES, *BACKGROUNDS}
        | {
            word
            for templates in TEMPLATES.values()
            for text in templates
            for word in re.findall(r"(?<!{)\b[a-z]+\b|,", text)
        }
    )
)
"""Words of all captions, and the comma."""


@dataclass(frozen=True)
class Request:
    """What a caption names; a style or background that it leaves open is None."""

    subject: str
    style: str | None
    background: str | None


def write_caption(kind: str, subject: str, style: str, background: str, rng: random.Random) -> str:
    """Write a caption of a kind of `TEMPLATES`; it names only what its kind says."""
    return rng.choice(TEMPLATES[kind]).format(subject=_with_article(subject), style=style, background=background)


def make_caption(rng: random.Random, combination: tuple[str, str, str]) -> tuple[str, str]:
    """Draw a training caption of an image of `combination`; returns its kind and its text."""
    [kind] = rng.choices(tuple(KIND_SHARES), tuple(KIND_SHARES.values()))
    return kind, write_caption(kind, *combination, rng)


def make_prompts(num_per_kind: int, seed: int = 0) -> list[tuple[str, str]]:
    """Make prompts, `num_per_kind` of every kind, as (kind, caption); the same seed gives the same prompts.

    Only prompts of the kind "unseen" name a combination that is held out.
    """
    rng, prompts = random.Random(f"emoji-prompts-{seed}"), []
    held_out = sorted(HELD_OUT)
    for kind in KINDS:
        for _ in range(num_per_kind):
            combination = rng.choice(held_out if kind == "unseen" else TRAINED)
            prompts.append((kind, write_caption("all" if kind == "unseen" else kind, *combination, rng)))
    return prompts


def parse_caption(caption: str) -> Request:
    """Parse a caption into a `Request`.

    Raises:
        ValueError: a caption that fits no template; the message names unknown words with the nearest known ones.
    """
    text = " ".join(caption.lower().split())
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            named = match.groupdict()
            return Request(named["subject"], named.get("style"), named.get("background"))
    raise ReadableError(f"emoji captions do not include {shown(caption)}{_hint(text)}; captions are like {_EXAMPLES}")


def _with_article(subject: str) -> str:
    """The subject with its article; plurals have one too ("a cherries"), since one rule for all is easier to learn."""
    return f"{'an' if subject[0] in 'aeio' or subject == 'umbrella' else 'a'} {subject}"


def _hint(text: str) -> str:
    """Part of a message: a caption's unknown words with the nearest known ones; empty if all are known."""
    unknown = [word for word in dict.fromkeys(re.findall(r"[^\s,]+", text)) if word not in WORDS]
    hints = []
    for word in unknown[:MAX_HINTS]:
        near = difflib.get_close_matches(word[:MAX_VALUE], WORDS, n=3)
        hints.append(f"{shown(word)} is unknown" + (f" (near: {', '.join(near)})" if near else ""))
    more = f" and {len(unknown) - MAX_HINTS} more" if len(unknown) > MAX_HINTS else ""
    return f": {', '.join(hints)}{more}" if hints else ""


def _compile(template: str) -> re.Pattern[str]:
    named = {
        "subject": "an? (?P<subject>" + "|".join(SUBJECTS) + ")",
        "style": "(?P<style>" + "|".join(STYLES) + ")",
        "background": "(?P<background>" + "|".join(BACKGROUNDS) + ")",
    }
    return re.compile(template.format(**named))


_PATTERNS = [_compile(template) for templates in TEMPLATES.values() for template in templates]
