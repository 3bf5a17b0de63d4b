"""`ssd-cache eval`: measure the quality of images generated with a cache policy, one command a benchmark.

Only registers the commands. Options and the order of work are in the other modules of this package. Measuring is in
`ssd_cache.evaluation`.
"""

from __future__ import annotations

from ssd_cache.cli.eval import benchmarks, compare, dpg, exact, fidelity, geneval, geneval2, report
from ssd_cache.evaluation.exact import BENCHMARKS

app = benchmarks.new_app("Measure image quality under cache policies, compared with the full cache and each other.")
for benchmark in BENCHMARKS.values():
    app.command(benchmark.name)(exact.exact_command(benchmark))
app.command("report")(report.report)
app.command("fidelity")(fidelity.fidelity)
app.add_typer(geneval.app, name="geneval")
app.add_typer(geneval2.app, name="geneval2")
app.add_typer(dpg.app, name="dpg")
app.command("compare")(compare.compare)
app.command("fid")(compare.fid)
app.command("clipscore")(compare.clipscore)
app.command("similarity")(compare.similarity)
