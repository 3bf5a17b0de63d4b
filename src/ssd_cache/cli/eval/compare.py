"""`ssd-cache eval compare`, `fid`, `clipscore` and `similarity`: compare results, or images of finished folders.

Options and tables. `ssd_cache.evaluation` measures (`comparing.py`, `metrics.py`, `similarity.py`) and checks what is
comparable.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ssd_cache.cli.errors import refusing
from ssd_cache.cli.eval.benchmarks import judge
from ssd_cache.cli.eval.geneval import ClipName
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import Device, option
from ssd_cache.evaluation.bootstrap import NUM_RESAMPLES, TOO_FEW, cell, to_json
from ssd_cache.evaluation.comparing import compare_results
from ssd_cache.evaluation.image_folders import find_captioned, find_images
from ssd_cache.evaluation.judge_models import CLIP
from ssd_cache.evaluation.metrics import USUAL_FID, MetricResult, clip_score, load_inception
from ssd_cache.evaluation.metrics import fid as frechet_distance
from ssd_cache.evaluation.similarity import load_lpips, measure_similarity

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
    """Test differences between scored folders of one benchmark.

    Reads the results of `eval geneval score`, `eval geneval2 score` or `eval dpg
    score`. Prints every score with its standard error, and its difference from the
    first score with a 95% interval and p, by a paired bootstrap over prompts.
    """
    with refusing():
        _check_output(output)
        comparison = compare_results(results)
    first = comparison.files[0]
    benchmark = first.judge["benchmark"]
    digits, within = (3, " within each tag") if benchmark == "GenEval" else (2, "")
    rows = []
    for row in comparison.rows:
        difference = ("", "", "") if row.difference is None else row.difference.cells(digits)
        rows.append((row.results, row.task, cell(row.score, digits), cell(row.standard_error, digits), *difference))
    report = Report(
        title=f"{benchmark}: differences from {comparison.rows[0].results}",
        columns=("results", "of", "score", "s.e.", "difference", "95% interval", "p"),
        rows=rows,
        notes=(
            f"{len(first.prompts)} prompts, {first.num_results} results each",
            f"paired bootstrap over prompts{within}, {NUM_RESAMPLES} resamples: 95% percentile intervals, and "
            f"two-sided p, not corrected for how many there are; {TOO_FEW}",
            f"judged by: {'; '.join(f'{name} {value}' for name, value in first.judge.items())}",
            f"files: {', '.join(str(file.path) for file in comparison.files)}",
        ),
        data=comparison.to_dict(),
    )
    print_and_save(report, output, "comparison")


def fid(
    folder: Folder,
    reference: Annotated[
        Path, typer.Option(help="The folder of the reference images.", metavar="FOLDER", show_default=False)
    ],
    inception: Annotated[
        Path | None,
        option(
            "A TorchScript Inception-V3, such as StyleGAN's inception-2015-12-05.pt.",
            "FILE",
            default="torch-fidelity's",
        ),
    ] = None,
    output: Output = None,
    device: Device = "auto",
) -> None:
    """Measure the FID of a folder of images against a folder of references.

    Reads GenEval's layout, or all images of a folder and its subfolders.
    """
    with refusing():
        images, references = find_images(folder), find_images(reference)
        _check_output(output)
        extractor = None if inception is None else load_inception(inception, device=device)
        name = "Inception-V3" if inception is None else str(inception)
        result = frechet_distance(images, references, extractor, name=name, device=device)
    notes = [f"{result.num_images} images of {folder}, {result.num_references} references of {reference}"]
    if min(result.num_images, result.num_references) < USUAL_FID:
        notes.append(f"with fewer than {USUAL_FID} images an FID is too high; compare sets of one size only")
    _show_metric(result, notes, output)


def clipscore(
    folder: Folder,
    clip: ClipName = CLIP,
    output: Output = None,
    device: Device = "auto",
) -> None:
    """Measure the CLIPScore of images and their prompts.

    The folder has GenEval's layout, or a metadata.jsonl whose lines have file_name
    and prompt.
    """
    with refusing():
        captioned = find_captioned(folder)
        _check_output(output)
        with judge("--clip", clip):
            result = clip_score(captioned, clip, device=device)
    notes = [f"{result.num_images} images of {folder}"]
    if result.num_cut:
        notes.append(f"{result.num_cut} prompts are longer than the model reads, and were truncated")
    _show_metric(result, notes, output)


def similarity(
    folder: Folder,
    reference: Annotated[
        Path, typer.Option(help="The folder of the full cache's images.", metavar="FOLDER", show_default=False)
    ],
    lpips: Annotated[
        str,
        option(
            "alex: AlexNet of torchvision; a TorchScript file, such as StyleGAN's vgg16.pt; none: PSNR alone.", "NAME"
        ),
    ] = "alex",
    output: Output = None,
    device: Device = "auto",
) -> None:
    """Measure PSNR and LPIPS of images against those of the full cache.

    Both folders were written by `eval geneval export`, `eval geneval2 export` or
    `generate --output-dir`, with the same prompts, seed and settings; only the cache may differ.
    """
    with refusing():
        _check_output(output)
        distance = None if lpips == "none" else load_lpips(lpips, device=device)
        results = measure_similarity(folder, reference, distance, device=device)
    rows = [(one.name, cell(one.mean, 4), cell(one.standard_error, 4), one.num_images) for one in results]
    notes = [f"{folder} against {reference}; means over prompts", f"LPIPS: {lpips}"]
    if equal := results[0].num_equal:
        notes.append(f"images that equal their reference: {equal}; their PSNR is infinite and left out")
    columns = ("", "mean", "standard error", "images")
    data = {"folder": str(folder), "reference": str(reference), "lpips": lpips, "results": list(map(to_json, results))}
    print_and_save(Report("Similarity to the full cache", columns, rows, notes, data), output)


def _show_metric(result: MetricResult, notes: list[str], output: Path | None) -> None:
    rows = [("all images", f"{result.value:.4f}")]
    print_and_save(Report(result.name, ("", "value"), rows, notes, asdict(result)), output)


def _check_output(output: Path | None) -> None:
    if output is not None:
        check_place("--output", output, is_folder=True)
