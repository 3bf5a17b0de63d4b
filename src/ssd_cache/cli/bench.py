"""`ssd-cache bench`: compare caches and policies in tables of speed, bytes and time, and write files.

Holds options, checks and files. The measurements are in `ssd_cache.bench`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.analysis.plotting import check_packages
from ssd_cache.bench import (
    SHAPES,
    Case,
    Plan,
    Report,
    choose,
    choose_stretches,
    default_cases,
    load_subject,
    product_cases,
    rivals,
    run,
)
from ssd_cache.bench.capacity import parse_memory
from ssd_cache.bench.figure import draw_report
from ssd_cache.bench.roofline import COPY_BYTES
from ssd_cache.bench.subject import find_head_map
from ssd_cache.bench.tables import all_tables, condition_lines, to_markdown
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.eval.options import parse_budgets
from ssd_cache.cli.files import check_writable
from ssd_cache.cli.loading import parse_grid
from ssd_cache.cli.options import Device, Dtype, Grid
from ssd_cache.evaluation.policies import DEFAULT, parse_policies, resolve_policies
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.io.writing import write_files
from ssd_cache.models import BUNDLED, resolve_device, resolve_dtype

CACHES, MEASURING = "Caches", "Measuring"


def bench(
    model: Annotated[
        str,
        typer.Option(
            help=f"A shape with random weights ({', '.join(SHAPES)}), {BUNDLED}, a folder, or a Hub id.", metavar="NAME"
        ),
    ] = "small-cpu",
    grid: Grid = None,
    batch_size: Annotated[
        str,
        typer.Option(help="Images at once, one number or several (1,8,32); guidance doubles the rows.", metavar="N,N"),
    ] = "8",
    dtype: Dtype = "auto",
    device: Device = "auto",
    policies: Annotated[
        str | None,
        typer.Option(
            help="Policies to compare with the full caches. Settings follow a colon: ssd,ssd:buffer=1,h2o.",
            metavar="NAME,NAME",
            show_default="a choice",
            rich_help_panel=CACHES,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens a head may hold, for every policy: 0.5,0.2.",
            metavar="X,X",
            show_default="a choice",
            rich_help_panel=CACHES,
        ),
    ] = None,
    caches: Annotated[
        str | None,
        typer.Option(
            help="Rows of the table to measure: names separated by semicolons: DynamicCache;ssd 20%.",
            metavar="NAME;NAME",
            show_default="all",
            rich_help_panel=CACHES,
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option(help="Also measure compiled decode steps.", rich_help_panel=CACHES)] = True,
    rounds: Annotated[
        int, typer.Option(help="Measured rounds, after one warm-up round.", metavar="N", rich_help_panel=MEASURING)
    ] = 2,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Generate only N tokens, around the middles of the image's quarters, with caches filled to there.",
            metavar="N",
            show_default="whole pictures",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    peak: Annotated[
        bool,
        typer.Option(help="Measure peak memory on a CPU, with one process for each cache.", rich_help_panel=MEASURING),
    ] = True,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Print how many images fit into this much memory: 24GB.",
            metavar="SIZE",
            show_default="not told",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A folder for bench.json, bench.md and bench.png.",
            metavar="FOLDER",
            show_default="the terminal alone",
        ),
    ] = None,
) -> None:
    """Measure speed and memory of caches and policies side by side.

    Every cache generates the same images through transformers, with guidance,
    in interleaved rounds. The baselines are transformers' own full caches and
    this machine's roofline. Random models have random head maps.
    """
    batch_sizes = _parse_batch_sizes(batch_size)
    if rounds < 1:
        raise WrongUse(f"--rounds {rounds}: give a whole number from 1 up")
    with refusing():
        where = resolve_device(device)
        if where.type not in COPY_BYTES:
            raise WrongUse(f"--device {device}: the bench measures on {' and '.join(COPY_BYTES)}")
        kind = resolve_dtype(dtype, where)
        shape = parse_grid(grid)
        head_map = find_head_map(model, shape)
        cases, left_out = _choose_cases(policies, budgets, caches, compiled, head_map)
        stretches = choose_stretches(head_map.num_visual_tokens, tokens)
        limit = None if memory is None else parse_memory(memory)
    if output is not None:
        _check_output(output)
    plan = Plan(
        cases=cases,
        batch_sizes=batch_sizes,
        stretches=stretches,
        rounds=rounds,
        memory=limit,
        with_peak=peak,
        command=_command(
            model=model,
            grid=grid,
            batch_size=",".join(map(str, batch_sizes)),
            dtype=str(kind).removeprefix("torch."),
            device=where,
            policies=policies,
            budgets=budgets,
            caches=caches,
            compiled=compiled,
            rounds=rounds,
            tokens=tokens,
            peak=peak,
            memory=memory,
            output=output and output.name,
        ),
        left_out=left_out,
    )
    with refusing():
        subject = load_subject(model, kind, where, shape)
    report: Report | None = None
    for report in run(subject, plan, progress=True):
        if output is not None:
            _write(report, output)
    if report is not None:
        _print(report)


def _parse_batch_sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise WrongUse(f"--batch-size {text}: give whole numbers from 1 up, with commas between (1,8,32)")
    return sorted(set(map(int, parts)))


def _choose_cases(
    policies: str | None, budgets: str | None, caches: str | None, compiled: bool, head_map: HeadMap
) -> tuple[list[Case], list[str]]:
    """The cases to measure, each checked on the head map, and a line for each case left out. Raises ValueError."""
    cases, left_out = rivals(compiled)
    if policies is None and budgets is None:
        cases += default_cases(compiled, head_map)
    else:
        amounts = parse_budgets(budgets or "0.2")
        cases += product_cases(resolve_policies(parse_policies(policies or DEFAULT), head_map), amounts, compiled)
    if caches is not None:
        try:
            cases = choose(cases, [name.strip() for name in caches.split(";")])
        except ValueError as error:
            raise WrongUse(f"--caches: {error}") from error
        left_out = []
    for case in cases:
        if not case.is_full:
            case.make_ssd(head_map)
    return cases, left_out


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise WrongUse(f"--output {output} is a file; give a folder")
    try:
        check_packages("matplotlib")
    except ImportError as error:
        raise WrongUse(f"--output: {error}") from error
    folder = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    check_writable("--output", output, folder)


def _command(**options) -> str:
    """A command line that repeats the measurement."""
    words = ["ssd-cache", "bench"]
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words += [] if value else [f"--no-{option}"]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return shlex.join(words)


def _write(report: Report, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_files(
        {
            output / "bench.json": report.to_json().encode(),
            output / "bench.md": to_markdown(report).encode(),
            output / "bench.png": draw_report(report),
        }
    )


def _print(report: Report) -> None:
    console = Console(highlight=False, markup=False)
    for cells in all_tables(report):
        console.print(cells.to_rich())
    for line in condition_lines(report):
        console.print(line, soft_wrap=True)
