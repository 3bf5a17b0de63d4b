"""Options that several commands share, with one help text and one help panel each.

Only types for the commands' signatures. Defaults and checks are in the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssd_cache.models import BUNDLED

MODEL, SAMPLING = "Model", "Sampling"

Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        help="Prompt of an image; give several prompts as several arguments.", metavar="PROMPT", show_default=False
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help='Further prompts, one a line. In a .jsonl file, each line has a "prompt".',
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
        help="Rows and columns of visual tokens, including a token that ends a row: 45x46. For models that generate "
        "several sizes, and for other causal language models, which generate plain tokens.",
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
    float, typer.Option(help="Temperature of the distribution, above 0.", metavar="X", rich_help_panel=SAMPLING)
]
"""Temperature for commands that compare distributions: above 0, as the likeliest token alone is not enough."""
Seed = Annotated[
    int, typer.Option(help="Seed of the first batch; each further batch adds 1.", metavar="N", rich_help_panel=SAMPLING)
]
