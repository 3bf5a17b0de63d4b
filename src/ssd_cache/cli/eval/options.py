"""Options that the `eval` commands share, and parsers for their lists.

Types for the signatures. Defaults are in the commands. Policy names are parsed in `ssd_cache.evaluation.policies`.
"""

from __future__ import annotations

from typing import Annotated

from ssd_cache.budget import Amount
from ssd_cache.cache.policies import POLICIES
from ssd_cache.cli.errors import WrongUse
from ssd_cache.cli.options import CACHE, option
from ssd_cache.cli.plan import parse_budget
from ssd_cache.evaluation.policies import DEFAULT, OWN

DEFAULT_POLICIES = ",".join(["full", DEFAULT, *(name for name in POLICIES if name not in ("full", "learned"))])


_BUDGETS = "Visual tokens a head may hold: fractions of the grid, or counts (115). full has one, everything."

Policies = Annotated[
    str,
    option(
        f"Policies to compare: {', '.join((*POLICIES, *OWN))}, a folder with a head map. default is the head "
        "map's own settings, shown under their exact name. Settings of one policy follow a colon: "
        "ssd:num_recent=0.5,buffer=8.",
        "NAME,NAME",
        CACHE,
    ),
]
Budgets = Annotated[str, option(_BUDGETS, "X,X", CACHE)]
OwnBudgets = Annotated[str | None, option(_BUDGETS, "X,X", CACHE, default="what the head map was fitted to, or 0.2")]
Buffer = Annotated[
    int | None, option("Eviction interval: visual tokens evicted at once.", "N", CACHE, default="a row of the grid")
]


def parse_budgets(text: str, num_cells: int | None = None) -> list[Amount]:
    """Parse a comma-separated list of budgets of at most `num_cells` tokens, without duplicates; raises WrongUse."""
    budgets = list(dict.fromkeys(parse_budget(part.strip()) for part in text.split(",")))
    for budget in budgets:
        if isinstance(budget, int) and num_cells is not None and budget > num_cells:
            raise WrongUse(f"--budgets {budget}: an image has {num_cells} visual tokens; give at most {num_cells}")
    return budgets


def parse_seeds(text: str) -> list[int]:
    """Parse a comma-separated list of seeds, without duplicates; raises WrongUse."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise WrongUse(f"--seeds {text}: give whole numbers from 0 up, with commas between (0,1,2)")
    return list(dict.fromkeys(map(int, parts)))
