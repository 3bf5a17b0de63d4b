"""The command line `ssd-cache`: reads options, calls the library and prints results.

Exit codes: 0 done, 2 wrong use, 1 any other failure, including an interruption. Errors are one line on stderr.
"""

from __future__ import annotations

from typing import Annotated

import typer

import ssd_cache
from ssd_cache.cli import analyze, bench, demo, eval, generate, head_maps, inspect, prepare, reproduce
from ssd_cache.cli.errors import OneLineGroup

app = typer.Typer(
    cls=OneLineGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("prepare")(prepare.prepare)
app.command("profile")(head_maps.profile)
app.command("fit")(head_maps.fit)
app.command("learn")(head_maps.learn)
app.command("analyze")(analyze.analyze)
app.command("bench")(bench.bench)
app.command("reproduce")(reproduce.reproduce)
app.command("app")(demo.app)
app.add_typer(eval.app, name="eval")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ssd-cache {ssd_cache.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Generate images with autoregressive models and a KV cache of fixed size (SSD, arXiv 2510.18716)."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
