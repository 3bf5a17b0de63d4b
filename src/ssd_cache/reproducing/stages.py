"""The stages of a reproduction: generate the images of a cell, score a benchmark, time the caches at a batch size.

Each resumes by itself, from the files that it wrote. `reproducing.py` runs them in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssd_cache.bench.results import Row as BenchRow
from ssd_cache.bench.running import run as run_bench
from ssd_cache.bench.subject import make_subject
from ssd_cache.budget import Amount
from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.comparing import compare_results, read_results
from ssd_cache.evaluation.export import claim_folder, generate_images
from ssd_cache.io.showing import ReadableError
from ssd_cache.io.untrusted import checked_fields, parse_json, read_bytes
from ssd_cache.io.writing import write_files
from ssd_cache.models import Generator
from ssd_cache.reproducing.benchmarks import Benchmark, results_file
from ssd_cache.reproducing.settings import Cell, Settings
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.run_folder import RunFolder, write_part
from ssd_cache.runs.run_state import ProfilingError


@dataclass(frozen=True)
class Run:
    """A reproduction in its folder; `shows` is whether this process shows progress."""

    generator: Generator
    settings: Settings
    folder: RunFolder
    processes: Processes
    shows: bool

    def root(self, benchmark: Benchmark, cell: Cell) -> Path:
        """The folder of a benchmark's images with one policy and budget."""
        return self.folder.path / benchmark.name / cell.folder

    def scores(self, benchmark: Benchmark) -> Path:
        """The file of a benchmark's results."""
        return self.folder.path / f"{benchmark.name}.json"

    def speed(self, batch_size: int) -> Path:
        """The file of the speeds at a batch size."""
        return self.folder.path / "speed" / f"batch-{batch_size}.json"


def generate(
    run: Run, benchmark: Benchmark, cell: Cell, num_prompts: int | None = None, root: Path | None = None
) -> None:
    """Generate the missing images of the first prompts, or of all; `root` replaces the folder of the run."""
    settings = run.settings
    images = benchmark.images(root or run.root(benchmark, cell), num_prompts)
    claim_folder(images.root, settings.image_settings(benchmark, cell), benchmark.lines, write=run.processes.is_main)
    generate_images(
        run.generator,
        images,
        lambda: settings.make_cache(cell),
        batch_size=settings.batch_size,
        **asdict(settings.sampling),
        processes=run.processes,
        progress=run.shows,
        title=f"{benchmark.name} {cell.name}",
    )


def score(run: Run, benchmark: Benchmark) -> None:
    """Judge the folders of a benchmark, each by one process, and write results and paired differences."""
    cells, processes = run.settings.cells, run.processes
    own, found = cells[processes.index :: processes.count], {}
    if own:
        judge, images = benchmark.load_judge(run.settings.device), benchmark.images(run.root(benchmark, own[0]))
        total = len(own) * len(images.texts) // images.unit
        with tqdm(total=total, desc=f"{benchmark.name} scores", disable=not run.shows) as bar:
            for cell in own:
                root = run.root(benchmark, cell)
                with making_room(root):
                    found[cell.name] = benchmark.score(judge, root, None, True, bar.update)
    merged: dict[str, dict[str, float]] = {}
    for part in processes.gather_all(found):
        merged |= part
    if processes.is_main:
        paths = [results_file(run.root(benchmark, cell)) for cell in cells]
        files = compare_results(paths).files if len(paths) > 1 else (read_results(paths[0]),)
        strata = dict(zip([cell.name for cell in cells], [file.strata for file in files], strict=True))
        differences = [
            {"first": first.name, "second": second.name}
            | bootstrap.to_json(bootstrap.compare(strata[first.name], strata[second.name]))
            for first, second in pairs(cells)
        ]
        rows = [
            {"policy": cell.policy.label, "budget": cell.budget, "results": bootstrap.to_json(merged[cell.name])}
            for cell in cells
        ]
        facts = {"judge": files[0].judge, "num_prompts": len(files[0].prompts)}
        write_part(run.scores(benchmark), {**facts, "rows": rows, "differences": differences})


def pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """The cells to compare: each with the full cache, and policies that use labels with all others at their budget."""
    full = [cell for cell in cells if cell.policy.name == "full"]
    others = [cell for cell in cells if cell.policy.name != "full"]
    found = [(cell, full[0]) for cell in others if full]
    for first, second in combinations(others, 2):
        if first.budget == second.budget and (first.policy.needs_labels or second.policy.needs_labels):
            found.append((first, second) if first.policy.needs_labels else (second, first))
    return found


def measure_speed(run: Run, batch_size: int) -> None:
    """Time all caches at a batch size, and write the report of the bench; for one process."""
    settings = run.settings
    subject = make_subject(settings.checkpoint.name, run.generator.language_model, settings.labels)
    [report] = run_bench(
        subject,
        settings.cases(),
        batch_sizes=[batch_size],
        windows=settings.windows(),
        rounds=settings.rounds,
        command=f"ssd-cache reproduce {settings.checkpoint.name}",
        progress=run.shows,
    )
    path = run.speed(batch_size)
    with making_room(path):
        write_files({path.with_suffix(".md"): report.to_markdown().encode(), path: report.to_json().encode()})


@dataclass(frozen=True)
class CellScore:
    """The results of a cell by column, in a benchmark's file of results."""

    policy: str
    budget: Amount
    results: dict[str, float | None]


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two cells in such a file; None where it is unknown."""

    first: str
    second: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    num_prompts: int


SCORES = {
    "judge": dict[str, Any],
    "num_prompts": int,
    "rows": list[CellScore],
    "differences": list[PairedDifference],
}
"""Fields of a benchmark's file of results."""


def read_scores(path: Path, num_cells: int) -> dict[str, Any]:
    """The file that `score` wrote, with a row for each cell; raises ProfilingError."""
    with _naming_damage(path):
        found = checked_fields(SCORES, parse_json(read_bytes(path)))
        checked_fields({"scorer": str}, found["judge"], "judge")
        for number, row in enumerate(found["rows"]):
            checked_fields({"standard_error": float | None}, row["results"], f"rows[{number}].results")
        if len(found["rows"]) != num_cells:
            raise ReadableError(f"{len(found['rows'])} rows, expected {num_cells}")
    return found


def read_speeds(path: Path) -> list[dict[str, Any]]:
    """The rows of the file that `measure_speed` wrote; raises ProfilingError."""
    with _naming_damage(path):
        return checked_fields({"rows": list[BenchRow]}, parse_json(read_bytes(path)))["rows"]


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ProfilingError(f"{path}: damaged ({error}); delete it, and run the same command again") from error


@contextmanager
def making_room(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a ProfilingError that says how to go on."""
    try:
        yield
    except OSError as error:
        raise ProfilingError(
            f"{path}: it cannot be written ({error.strerror}); everything before is kept: make room, and run the same "
            "command again to resume"
        ) from error
