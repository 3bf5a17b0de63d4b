"""`ssd-cache bench`: compare caches and policies in tables of speed, steps and memory, and write files.

Holds options, checks and files. The measurements are in `ssd_cache.bench`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ssd_cache.bench import SHAPES, choose_cases, choose_windows, load_subject, run
from ssd_cache.bench.roofline import COPY_BYTES
from ssd_cache.bench.subject import head_map_for
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.eval.options import parse_budgets
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import parse_grid
from ssd_cache.cli.options import MODEL_NAMES, Device, Dtype, Grid, option, output_option
from ssd_cache.io.writing import write_files
from ssd_cache.models import resolve_device, resolve_dtype

CACHES, MEASURING = "Caches", "Measuring"
MODELS = f"A shape with random weights ({', '.join(SHAPES)}), {MODEL_NAMES}"


def bench(
    context: typer.Context,
    model: Annotated[str, option(MODELS, "NAME")] = "small-cpu",
    grid: Grid = None,
    batch_size: Annotated[
        str, option("Images at once, one number or several (1,8,32); guidance doubles the rows.", "N,N")
    ] = "8",
    dtype: Dtype = "auto",
    device: Device = "auto",
    policies: Annotated[
        str | None,
        option(
            "Policies to compare with the full caches. Settings follow a colon: ssd,ssd:buffer=1,h2o.",
            "NAME,NAME",
            CACHES,
            default="a choice",
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        option("Visual tokens a head may hold, for every policy: 0.5,0.2.", "X,X", CACHES, default="a choice"),
    ] = None,
    caches: Annotated[
        str | None,
        option(
            "Rows of the table to measure: names separated by semicolons: DynamicCache;ssd 20%.",
            "NAME;NAME",
            CACHES,
            default="all",
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option(help="Also measure what needs a compiler.", rich_help_panel=CACHES)] = True,
    rounds: Annotated[int, option("Measured rounds, after one warm-up round.", "N", MEASURING, least=1)] = 2,
    tokens: Annotated[
        int | None,
        option(
            "Generate only N tokens, around the middles of the image's quarters, with caches filled to there.",
            "N",
            MEASURING,
            default="whole images",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        output_option("A folder for bench.json and bench.md.", "FOLDER", default="the terminal alone"),
    ] = None,
) -> None:
    """Measure speed and memory of caches and policies side by side.

    Every cache generates the same images through transformers, with guidance,
    in interleaved rounds. The baselines are the fastest full cache and this
    machine's roofline. Random models have random head maps.
    """
    batch_sizes, asked_grid = parse_batch_sizes(batch_size), parse_grid(grid)
    with refusing():
        where = resolve_device(device)
        if where.type not in COPY_BYTES:
            raise WrongUse(f"--device {device}: the bench measures on {' and '.join(COPY_BYTES)}")
        head_map = head_map_for(model, asked_grid)
        cases = choose_cases(
            head_map,
            policies=policies,
            budgets=None if budgets is None else parse_budgets(budgets),
            names=None if caches is None else [name.strip() for name in caches.split(";")],
            is_compiled=compiled,
            on_gpu=where.type == "cuda",
        )
        windows, kind = choose_windows(head_map.num_visual_tokens, tokens), resolve_dtype(dtype, where)
    if output is not None:
        check_place("--output", output, is_folder=True)
    with refusing():
        subject = load_subject(model, kind, where, asked_grid)
    for report in run(
        subject,
        cases,
        batch_sizes=batch_sizes,
        windows=windows,
        rounds=rounds,
        command=_command(context),
        progress=True,
    ):
        if output is not None:
            pages = {"bench.json": report.to_json(), "bench.md": report.to_markdown()}
            write_files({output / name: text.encode() for name, text in pages.items()})
    console = Console(highlight=False, markup=False)
    for title, heads, rows in report.tables():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in heads:
            is_text = head in ("cache", "served by")
            table.add_column(head, justify="left" if is_text else "right", no_wrap=not is_text)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("\n".join(report.condition_lines()), f"\nto repeat it: {report.command}", soft_wrap=True)


def parse_batch_sizes(text: str, option: str = "--batch-size") -> list[int]:
    """Parse a comma-separated list of batch sizes, sorted and without duplicates; raises WrongUse."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise WrongUse(f"{option} {text}: give whole numbers from 1 up, with commas between (1,8,32)")
    return sorted(set(map(int, parts)))


def _command(context: typer.Context) -> str:
    """A command line that repeats the measurement."""
    words = ["ssd-cache", "bench"]
    for name, value in context.params.items():
        option_name = name.replace("_", "-")
        if isinstance(value, bool):
            words += [] if value else [f"--no-{option_name}"]
        elif value is not None:
            words += [f"--{option_name}", value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)
