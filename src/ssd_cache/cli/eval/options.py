"""Options that the `eval` commands share, and parsers for their lists.

Types for the signatures. Defaults are in the commands. Policy names are parsed in `ssd_cache.evaluation.policies`.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ssd_cache.budget import Amount
from ssd_cache.cache.policies import POLICIES
from ssd_cache.cache.scorers import SCORES
from ssd_cache.cli.errors import WrongUse
from ssd_cache.cli.options import MODEL
from ssd_cache.cli.plan import parse_budget
from ssd_cache.evaluation.policies import DEFAULT, OWN, SETTINGS

CACHE = "Cache"

DEFAULT_POLICIES = ",".join(["full", DEFAULT, *(name for name in POLICIES if name not in ("full", "learned"))])


def _option(text: str, metavar: str, default: str | bool = "the policy's own", panel: str = CACHE) -> Any:
    return typer.Option(help=text, metavar=metavar, show_default=default, rich_help_panel=panel)


_BUDGETS = "Visual tokens a head may hold: fractions of the grid, or counts (115). full has one, everything."

Policies = Annotated[
    str,
    _option(
        f"Policies to compare: {', '.join((*POLICIES, *OWN))}, a folder with a head map. default is the head "
        "map's own settings, shown under their exact name. Settings of one policy follow a colon: "
        "ssd:num_recent=0.5,buffer=8.",
        "NAME,NAME",
        default=True,
    ),
]
Budgets = Annotated[str, _option(_BUDGETS, "X,X", default=True)]
OwnBudgets = Annotated[str | None, _option(_BUDGETS, "X,X", "what the head map was fitted to, or 0.2")]
HeadMapName = Annotated[str | None, _option("A folder or Hub id.", "NAME", "in the model's folder", MODEL)]
Buffer = Annotated[int | None, _option("Eviction interval: visual tokens evicted at once.", "N", "a row of the grid")]
NumRecent = Annotated[str | None, _option("Newest tokens that a semantic head keeps: tokens, or a fraction.", "N")]
NumSinks = Annotated[int | None, _option("First tokens that every head keeps.", "N")]
ScoreName = Annotated[str | None, _option(f"Score by which semantic heads keep tokens: {', '.join(SCORES)}.", "NAME")]


def parse_budgets(text: str) -> list[Amount]:
    """Parse a comma-separated list of budgets, without duplicates; raises WrongUse."""
    return list(dict.fromkeys(parse_budget(part.strip()) for part in text.split(",")))


def parse_seeds(text: str) -> list[int]:
    """Parse a comma-separated list of seeds, without duplicates; raises WrongUse."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise WrongUse(f"--seeds {text}: give whole numbers from 0 up, with commas between (0,1,2)")
    return list(dict.fromkeys(map(int, parts)))


def cache_settings(
    buffer: int | None, num_recent: str | None, num_sinks: int | None, score: str | None
) -> dict[str, Any]:
    """The given settings for all caches, by their names in `SSDCache`; raises WrongUse."""
    texts = {"buffer": buffer, "num_recent": num_recent, "num_sinks": num_sinks, "score": score}
    settings = {}
    for name, text in texts.items():
        if text is not None:
            try:
                settings[name] = SETTINGS[name](str(text).strip())
            except ValueError as error:
                raise WrongUse(f"--{name.replace('_', '-')} {text}: {error}") from error
    return settings
