"""The plan of a reproduction: images, time, memory and disk of each stage, from measured first batches.

The first batch of every cell is part of the run. A few images are judged only to measure this. Speeds are not measured
in advance: their time is estimated from that of the images, as if a larger batch were no faster per image.
"""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from ssd_cache.reproducing.benchmarks import NUM_SAMPLES, Benchmark
from ssd_cache.reproducing.settings import Cell, Settings
from ssd_cache.reproducing.stages import Run, generate
from ssd_cache.runs.batching import image_nbytes
from ssd_cache.runs.limits import step_seconds
from ssd_cache.runs.metering import Cost, metered
from ssd_cache.runs.plan import Estimate, Plan, memory
from ssd_cache.runs.run_state import ProfilingError


def least_seconds(settings: Settings, num_processes: int) -> float:
    """A low estimate of the seconds that all images take, from the configuration alone."""
    rows = settings.batch_size * (1 if settings.checkpoint.family.default_guidance is None else 2)
    batches = sum(
        len(settings.cells) * math.ceil(NUM_SAMPLES * len(benchmark.captions) / settings.batch_size)
        for benchmark in settings.benchmarks
    )
    step = step_seconds(settings.checkpoint, settings.dtype, settings.device, rows)
    return math.ceil(batches / num_processes) * settings.checkpoint.num_visual_tokens * step


def make_plan(run: Run) -> Plan:
    """Measure the first batches that no earlier call has measured, and estimate every stage.

    Every process must call this function; all get the plan of the main process.
    """
    first, *others = run.settings.cells
    for benchmark in run.settings.benchmarks:
        _measure_batch(run, benchmark, first)
        _measure_judge(run, benchmark)  # a judge that fails does so early
    for benchmark in run.settings.benchmarks:
        for cell in others:
            _measure_batch(run, benchmark, cell)
    plan = None
    if run.processes.is_main:
        estimates = [estimate for benchmark in run.settings.benchmarks for estimate in _estimate(run, benchmark)]
        estimates += [_estimate_speed(run, size) for size in run.settings.speed_batch_sizes]
        plan = Plan(run.settings.checkpoint.name, str(run.settings.device), estimates)
    return run.processes.gather_all(plan)[0]


def _first_prompts(run: Run, benchmark: Benchmark) -> int:
    return min(run.settings.batch_size // NUM_SAMPLES, len(benchmark.captions))


def _measure_batch(run: Run, benchmark: Benchmark, cell: Cell) -> None:
    """Generate the first batch of a cell; if an earlier call ended before it was measured, again beside it."""
    name, number = f"{benchmark.name} {cell.name}", _first_prompts(run, benchmark)
    if run.processes.gather_all(name in run.folder.costs)[0]:
        return
    images = benchmark.images(run.root(benchmark, cell), number)
    with TemporaryDirectory() as place, metered(run.settings.device) as cost:
        is_there = not images.missing(range(len(images.texts)))
        generate(run, benchmark, cell, number, Path(place) / "images" if is_there else None)
    if run.processes.is_main:
        run.folder.add_cost(name, cost)


def _measure_judge(run: Run, benchmark: Benchmark) -> None:
    """Judge the images of the first batch, in the main process."""
    name = f"{benchmark.name} scores"
    if run.processes.is_main and name not in run.folder.costs:
        judge, root = benchmark.load_judge(run.settings.device), run.root(benchmark, run.settings.cells[0])
        with metered(run.settings.device) as cost:
            benchmark.score(judge, root, _first_prompts(run, benchmark), False, lambda: None)
        run.folder.add_cost(name, cost)


def _estimate(run: Run, benchmark: Benchmark) -> list[Estimate]:
    """The images and the scores of a benchmark."""
    settings, count, costs = run.settings, run.processes.count, run.folder.costs
    number, missing, seconds, written = NUM_SAMPLES * _first_prompts(run, benchmark), 0, 0.0, 0
    for cell in settings.cells:
        images = benchmark.images(run.root(benchmark, cell))
        lacking = images.missing(range(len(images.texts)))
        batches = {index // settings.batch_size for index in lacking}
        seconds += math.ceil(len(batches) / count) * costs[f"{benchmark.name} {cell.name}"].seconds
        missing += len(lacking)
        written += sum(path.stat().st_size for path in {images.path(index) for index in range(number)})
    disk = round(missing * written / number / len(settings.cells))
    peaks = [costs[f"{benchmark.name} {cell.name}"].peak_bytes or 0 for cell in settings.cells]
    of_process = math.ceil(len(settings.cells) / count) * NUM_SAMPLES * len(benchmark.captions)
    judged, total = costs[f"{benchmark.name} scores"], NUM_SAMPLES * len(benchmark.captions) * len(settings.cells)
    judging = Cost(of_process * judged.seconds / number, judged.peak_bytes)
    return [
        Estimate(benchmark.name, total, Cost(seconds, max(peaks) or None), not missing, disk),
        Estimate(f"{benchmark.name} scores", total, judging, run.scores(benchmark).exists()),
    ]


def _estimate_speed(run: Run, batch_size: int) -> Estimate:
    """The speeds at a batch size, as if an image took as long as in the first batches."""
    settings, costs, [first, *_] = run.settings, run.folder.costs, run.settings.benchmarks
    measured = [costs[f"{first.name} {cell.name}"] for cell in settings.cells]
    of_image = statistics.fmean(cost.seconds for cost in measured) / (NUM_SAMPLES * _first_prompts(run, first))
    images = (settings.rounds + 1) * len(settings.cases()) * batch_size
    share = sum(map(len, settings.windows())) / settings.labels.num_visual_tokens
    peaks = [cost.peak_bytes for cost in measured if cost.peak_bytes is not None]
    more = max(0, batch_size - settings.batch_size) * image_nbytes(run.generator, 0)
    cost = Cost(images * share * of_image, max(peaks) + more if peaks else None)
    return Estimate(f"speed {batch_size}", images, cost, run.speed(batch_size).exists())


def check_disk(plan: Plan, folder: Path) -> None:
    """Refuse images that the disk cannot hold; raises ProfilingError."""
    needed, free = sum(estimate.disk_bytes for estimate in plan.estimates), shutil.disk_usage(folder).free
    if needed > free:
        raise ProfilingError(
            f"{folder}: the missing images take about {memory(needed)}, and {memory(free)} are free; make room, or "
            "give another --output on a larger disk"
        )
