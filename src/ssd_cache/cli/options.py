"""Options that several commands share: one wording, one place in the help.

Types for the commands' signatures; defaults stay with the commands, and nothing is checked here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssd_cache.models import BUNDLED

MODEL, SAMPLING = "Model", "Sampling"

Prompts = Annotated[
    list[str] | None,
    typer.Argument(help="What to draw; several prompts as several arguments.", metavar="PROMPT", show_default=False),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help='Further prompts, one a line; of a .jsonl file, the text under "prompt".',
        metavar="FILE",
        show_default=False,
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        help=f"{BUNDLED} (comes with the package), a folder, or a Hub id.", metavar="NAME", rich_help_panel=MODEL
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(
        help="Rows and columns of visual tokens, a token that ends a row included: 45x46. For models that draw in "
        "several sizes, and for any other causal language model, drawn with as plain tokens.",
        metavar="ROWSxCOLUMNS",
        show_default="the model's own",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: float32 on a CPU, else bfloat16.",
        metavar="NAME",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda:0, ..., or auto: a GPU if there is one.", metavar="NAME", rich_help_panel=MODEL),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale, above 1.", metavar="X", show_default="the model's own", rich_help_panel=SAMPLING
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 takes the likeliest token.", metavar="X", show_default="the model's own", rich_help_panel=SAMPLING
    ),
]
OfDistribution = Annotated[
    float, typer.Option(help="Of the distribution, above 0.", metavar="X", rich_help_panel=SAMPLING)
]
"""A temperature where distributions are compared, which need more than the likeliest token."""
Seed = Annotated[
    int, typer.Option(help="Of the first batch; the next batch adds 1.", metavar="N", rich_help_panel=SAMPLING)
]
