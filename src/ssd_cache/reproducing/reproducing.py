"""`reproduce`: images, scores and speeds of all cells, as one resumable run that ends with a report.

`stages.py` has the stages, `plan.py` estimates them, `report.py` writes the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ssd_cache.evaluation.export import ExportError
from ssd_cache.io.showing import differences
from ssd_cache.models import Generator
from ssd_cache.reproducing.plan import check_disk, make_plan
from ssd_cache.reproducing.report import write_report
from ssd_cache.reproducing.settings import Settings
from ssd_cache.reproducing.stages import Run, generate, measure_speed, score
from ssd_cache.runs.limits import refuse_long_run
from ssd_cache.runs.plan import Plan
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.run_folder import PLAN, RunFolder

FORMAT, WHAT = "ssd-cache reproduce 1", "the plan of ssd-cache reproduce"

SHORTER = "--sample 0.05 with another --output for a share of it"
"""The option that shortens a reproduction, for messages."""


def claim(output: Path, settings: Settings, processes: Processes) -> RunFolder:
    """Begin or continue a run in a folder, before weights are loaded.

    Raises:
        ExportError: a folder with other content, or of a run with other settings.
        ProfilingError: the folder cannot be written, or processes do not agree.
        ValueError: more processes than prompts.
    """
    for benchmark in settings.benchmarks:
        if len(benchmark.captions) < processes.count:
            raise ValueError(
                f"{len(benchmark.captions)} prompts of {benchmark.name} for {processes.count} processes: start fewer "
                "processes, or give a greater --sample"
            )
    if output.exists() and not (output / PLAN).exists() and any(output.iterdir()):
        raise ExportError(f"{output}: it is not empty and has no {PLAN}, so its content is unknown; give a new folder")
    folder, facts = RunFolder(output, FORMAT, WHAT), settings.facts()
    if folder.settings and (differing := differences(folder.settings, facts)):
        raise ExportError(
            f"{output}: a reproduction with other settings ({differing}); give another --output, or the same settings"
        )
    processes.check_agreement(facts)
    if processes.is_main:
        folder.begin(facts)
    return folder


def reproduce(
    generator: Generator,
    settings: Settings,
    folder: RunFolder,
    processes: Processes,
    *,
    max_hours: float | None = None,
    on_plan: Callable[[Plan], object] | None = None,
    progress: bool = True,
) -> Path | None:
    """Generate and score all images, time the caches, and write the report.

    Every image, line of results and finished stage is kept, so the same call goes on after an interruption. Processes
    share the images, and the folders to score; only the main process times caches and writes the report.

    Args:
        generator: the model of the settings.
        settings: of the run.
        folder: as from `claim`.
        processes: that share the run.
        max_hours: refuse a run that is estimated to take longer, after the first batches.
        on_plan: called with the plan in the main process, before the stages run.
        progress: show progress bars.

    Returns:
        The report as Markdown, in the main process; None in the others.

    Raises:
        ProfilingError: a judge that cannot be loaded, a full disk, or a run longer than `max_hours`.
        ExportError: images that cannot be written.
        ValueError: a damaged image or file of results.
    """
    run = Run(generator, settings, folder, processes, progress and processes.is_main)
    if run.shows and not folder.costs:
        tqdm.write("measuring the first batches", file=sys.stderr)
    plan = make_plan(run)
    check_disk(plan, folder.path)
    if max_hours is not None:
        refuse_long_run(settings.checkpoint, settings.device, plan.seconds, max_hours, SHORTER)
    if processes.is_main and on_plan is not None:
        on_plan(plan)
    finished = {estimate.stage for estimate in plan.estimates if estimate.is_finished}
    for benchmark in settings.benchmarks:
        for cell in settings.cells:
            generate(run, benchmark, cell)
        if f"{benchmark.name} scores" not in finished:
            score(run, benchmark)
    if not processes.is_main:
        return None
    for batch_size in settings.speed_batch_sizes:
        if not run.speed(batch_size).exists():
            measure_speed(run, batch_size)
    return write_report(run)
