"""`ssd-cache eval`: measure the quality of images generated with a cache policy, one command a benchmark.

Only registers the commands. Options and the order of work are in the other modules of this package. Measuring is in
`ssd_cache.evaluation`.
"""

from __future__ import annotations

import typer

from ssd_cache.cli.eval import compare, dpg, fidelity, geneval, report, shapes

app = typer.Typer()
app.command("shapes")(shapes.shapes)
app.command("report")(report.report)
app.command("fidelity")(fidelity.fidelity)
app.add_typer(geneval.app, name="geneval")
app.add_typer(dpg.app, name="dpg")
app.command("compare")(compare.compare)
app.command("fid")(compare.fid)
app.command("clipscore")(compare.clipscore)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure image quality under cache policies, compared with the full cache and each other."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
