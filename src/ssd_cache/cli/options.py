"""Options that several commands share, with one help text and one help panel each.

Only types for the commands' signatures. Defaults and checks are in the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ssd_cache.models import BUNDLED_MODELS

MODEL, CACHE, SAMPLING = "Model", "Cache", "Sampling"


def option(
    help: str, metavar: str, panel: str | None = None, *, default: str | None = None, least: int | None = None
) -> Any:
    """An option with a help text, the name of its value, a help panel, a default in words, and a least number."""
    return typer.Option(help=help, metavar=metavar, rich_help_panel=panel, show_default=default or True, min=least)


def output_option(help: str, metavar: str, *, default: str | None = None) -> Any:
    """The option `--output`, or `-o`, with a help text, the name of its value, and a default in words."""
    return typer.Option("--output", "-o", help=help, metavar=metavar, show_default=default or True)


Prompts = Annotated[
    list[str] | None,
    typer.Argument(help="Prompts, one image each; give several as several arguments.", metavar="PROMPT"),
]
PromptsFile = Annotated[
    Path | None, option('Further prompts, one a line. In a .jsonl file, each line has a "prompt".', "FILE")
]
MapFolder = Annotated[Path, output_option("Folder to save the head map in.", "FOLDER")]

MODEL_NAMES = f"{' or '.join(BUNDLED_MODELS)} (in the package), a folder, or a Hub id."
ModelName = Annotated[str, option(MODEL_NAMES, "NAME", MODEL)]
Grid = Annotated[
    str | None,
    option(
        "Rows and columns of visual tokens, including a token that ends a row: 45x46. For models that generate several "
        "sizes, and for other causal language models, which generate plain tokens.",
        "ROWSxCOLUMNS",
        MODEL,
        default="the model's own",
    ),
]
HeadMapName = Annotated[str | None, option("A folder or Hub id.", "NAME", MODEL, default="in the model's folder")]
Dtype = Annotated[str, option("float32, bfloat16, float16, or auto: float32 on a CPU, else bfloat16.", "NAME", MODEL)]
Device = Annotated[str, option("cpu, cuda:0, ..., or auto: a GPU if there is one.", "NAME", MODEL)]

Budget = Annotated[
    str | None,
    option(
        "Visual tokens a head may hold: a fraction of the grid, or a count (115).",
        "X",
        CACHE,
        default="what the head map was fitted to, or 0.2",
    ),
]
MapBudget = Annotated[str, option("Average budget of the heads: 0.2 of the grid, or 115 tokens.", "X", CACHE)]
Buffer = Annotated[
    int | None,
    option(
        "Eviction interval: visual tokens evicted at once.",
        "N",
        CACHE,
        default="a row of the grid; with a learned score a third",
    ),
]

Guidance = Annotated[float | None, option("Guidance scale, above 1.", "X", SAMPLING, default="the model's own")]
Temperature = Annotated[float | None, option("0 takes the likeliest token.", "X", SAMPLING, default="the model's own")]
OfDistribution = Annotated[
    float | None, option("Temperature of the distribution, above 0.", "X", SAMPLING, default="the model's own")
]
"""Temperature for commands that compare distributions: above 0, as the likeliest token alone is not enough."""
Seed = Annotated[int, option("Seed of the first batch; each further batch adds 1.", "N", SAMPLING)]
