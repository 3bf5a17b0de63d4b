"""`ssd-cache eval compare`, `eval fid` and `eval clipscore`: compare finished results, or images of finished folders.

Options and tables. `ssd_cache.evaluation` measures (`comparing.py`, `metrics.py`) and checks what is comparable.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, refusing
from ssd_cache.cli.eval.benchmarks import judge
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import Device
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES, TOO_FEW, cell
from ssd_cache.evaluation.clip import CLIP
from ssd_cache.evaluation.comparing import Row, compare_results
from ssd_cache.evaluation.image_folders import find_captioned, find_images
from ssd_cache.evaluation.metrics import USUAL_FID, MetricResult, clip_score, load_inception
from ssd_cache.evaluation.metrics import fid as frechet_distance
from ssd_cache.evaluation.prompt_results import GENEVAL

Folder = Annotated[Path, typer.Argument(help="The folder of the images.", metavar="FOLDER", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Also write the result into this folder, as Markdown and JSON.",
        metavar="FOLDER",
        show_default=False,
    ),
]


def compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more results.jsonl, or their folders; the others are compared with the first.",
            metavar="RESULTS",
            show_default=False,
        ),
    ],
    output: Output = None,
) -> None:
    """Test differences between scored folders of GenEval or DPG-Bench.

    Reads the results of `eval geneval score` or `eval dpg score`. Prints every
    score with its standard error, and its difference from the first score with a
    95% interval and p, by a paired bootstrap over prompts.
    """
    with refusing():
        _check_output(output)
        comparison = compare_results(results)
    first = comparison.files[0]
    digits, within = (3, " within each tag") if first.benchmark == GENEVAL else (2, "")
    report = Report(
        title=f"{first.benchmark}: differences from {comparison.rows[0].results}",
        columns=("results", "of", "score", "s.e.", "difference", "95% interval", "p"),
        rows=[_cells(row, digits) for row in comparison.rows],
        notes=(
            f"{len(first.prompts)} prompts, {first.num_images} images each",
            f"paired bootstrap over prompts{within}, {NUM_RESAMPLES} resamples: 95% percentile intervals, and "
            f"two-sided p, not corrected for how many there are; {TOO_FEW}",
            f"judged by: {'; '.join(f'{name} {value}' for name, value in first.judge.items())}",
            f"files: {', '.join(str(file.path) for file in comparison.files)}",
        ),
        data=comparison.to_dict(),
    )
    _show(report, output, "comparison")


def _cells(row: Row, digits: int) -> tuple[str, ...]:
    difference = ("", "", "") if row.difference is None else row.difference.cells(digits)
    return row.results, row.task, cell(row.score, digits), cell(row.standard_error, digits), *difference


def fid(
    folder: Folder,
    reference: Annotated[
        Path, typer.Option(help="The folder of the reference images.", metavar="FOLDER", show_default=False)
    ],
    inception: Annotated[
        Path | None,
        typer.Option(
            help="A TorchScript Inception-V3, such as StyleGAN's inception-2015-12-05.pt.",
            metavar="FILE",
            show_default="torch-fidelity's",
        ),
    ] = None,
    output: Output = None,
    device: Device = "auto",
) -> None:
    """Measure the FID of a folder of images against a folder of references.

    Recognises GenEval's layout and DPG-Bench's sheets. From any other folder it
    reads all images in it and in its subfolders.
    """
    with refusing():
        images, references = find_images(folder), find_images(reference)
        _check_output(output)
        extractor = None if inception is None else load_inception(inception, device=device)
        name = "Inception-V3" if inception is None else str(inception)
        result = frechet_distance(images, references, extractor, name=name, device=device)
    notes = [f"{result.num_pictures} images of {folder}, {result.num_references} references of {reference}"]
    if min(result.num_pictures, result.num_references) < USUAL_FID:
        notes.append(f"with fewer than {USUAL_FID} images an FID is too high; compare sets of one size only")
    _show_metric(result, notes, output)


def clipscore(
    folder: Folder,
    clip: Annotated[str, typer.Option(help="A CLIP model: a folder or a Hub id.", metavar="NAME")] = CLIP,
    output: Output = None,
    device: Device = "auto",
) -> None:
    """Measure the CLIPScore of images and their prompts.

    The folder has GenEval's layout, or was written by `eval dpg export`, or has a
    metadata.jsonl whose lines have file_name and prompt.
    """
    with refusing():
        captioned = find_captioned(folder)
        _check_output(output)
        with judge("--clip", clip):
            result = clip_score(captioned, clip, device=device)
    notes = [f"{result.num_pictures} images of {folder}"]
    if result.num_cut:
        notes.append(f"{result.num_cut} prompts are longer than the model reads, and were truncated")
    _show_metric(result, notes, output)


def _show_metric(result: MetricResult, notes: list[str], output: Path | None) -> None:
    report = Report(result.name, ("", "value"), [("all images", f"{result.value:.4f}")], notes, asdict(result))
    _show(report, output, "summary")
    if result.unreadable:
        raise Failure(
            f"{len(result.unreadable)} images could not be read and are left out: "
            f"{'; '.join(f'{name} ({why})' for name, why in result.unreadable.items())}"
        )


def _check_output(output: Path | None) -> None:
    if output is not None:
        check_place("--output", output, is_folder=True)


def _show(report: Report, output: Path | None, name: str) -> None:
    """Print a report, and write it into a folder if there is one."""
    console = Console(highlight=False, markup=False)
    if output is None:
        report.show(console)
    else:
        output.mkdir(parents=True, exist_ok=True)
        print_and_save(report, output, console, name)
