"""`ssd-cache eval`: how good pictures are that were drawn with a cache policy, one command a benchmark.

Commands are entered here, one line each; options and the order of work are in the modules beside, the measuring is
`ssd_cache.evaluation`'s.
"""

from __future__ import annotations

import typer

from ssd_cache.cli.eval import compare, dpg, fidelity, geneval, metrics, report, shapes

app = typer.Typer()
app.command("shapes")(shapes.shapes)
app.command("report")(report.report)
app.command("fidelity")(fidelity.fidelity)
app.add_typer(geneval.app, name="geneval")
app.add_typer(dpg.app, name="dpg")
app.command("compare")(compare.compare)
app.command("fid")(metrics.fid)
app.command("clipscore")(metrics.clipscore)


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Measure how good the pictures of cache policies are, against the full cache and against each other."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
