"""`ssd-cache eval fid` and `ssd-cache eval clipscore`: compare a folder of images with references or prompts.

Options and a table. Measuring is in `ssd_cache.evaluation` (`metrics.py`, `clip_score.py`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from ssd_cache.cli.errors import Failure, refusing
from ssd_cache.cli.eval.benchmarks import judge
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import Device
from ssd_cache.evaluation.clip import CLIP
from ssd_cache.evaluation.clip_score import clip_score
from ssd_cache.evaluation.metrics import USUAL_FID, MetricResult, load_inception
from ssd_cache.evaluation.metrics import fid as frechet_distance
from ssd_cache.evaluation.picture_folders import find_captioned, find_pictures

Folder = Annotated[Path, typer.Argument(help="The folder of the images.", metavar="FOLDER", show_default=False)]
Results = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Also write the result into this folder.", metavar="FOLDER", show_default=False
    ),
]
BatchSize = Annotated[int, typer.Option(help="Images processed at once.", metavar="N")]


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
    output: Results = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> None:
    """Measure the FID of a folder of images against a folder of references.

    Recognises GenEval's layout and DPG-Bench's sheets. From any other folder it
    reads all images in it and in its subfolders.
    """
    with refusing():
        pictures, references = find_pictures(folder), find_pictures(reference)
        if output is not None:
            check_place("--output", output, is_folder=True)
        extractor = None if inception is None else load_inception(inception, device=device)
    with tqdm(total=len(pictures) + len(references), desc="FID", unit=" pictures") as bar:
        try:
            result = frechet_distance(
                pictures,
                references,
                extractor,
                name="Inception-V3" if inception is None else str(inception),
                batch_size=batch_size,
                device=device,
                on_picture=lambda _: bar.update(),
            )
        except ValueError as error:
            raise Failure(str(error)) from error
    notes = [f"{result.num_pictures} pictures of {folder}, {result.num_references} references of {reference}"]
    if min(result.num_pictures, result.num_references) < USUAL_FID:
        notes.append(f"of fewer than {USUAL_FID} pictures an FID is too high; compare sets of one size only")
    _tell(result, notes, output)


def clipscore(
    folder: Folder,
    clip: Annotated[str, typer.Option(help="A CLIP model: a folder or a Hub id.", metavar="NAME")] = CLIP,
    output: Results = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> None:
    """Measure the CLIPScore of images and their prompts.

    The folder has GenEval's layout, or was written by `eval dpg export`, or has a
    metadata.jsonl whose lines have file_name and prompt.
    """
    with refusing():
        captioned = find_captioned(folder)
        if output is not None:
            check_place("--output", output, is_folder=True)
    with tqdm(total=len(captioned), desc="CLIPScore", unit=" pictures") as bar:
        try:
            with judge("--clip", clip):
                result = clip_score(
                    captioned, clip, batch_size=batch_size, device=device, on_picture=lambda _: bar.update()
                )
        except ValueError as error:
            raise Failure(str(error)) from error
    notes = [f"{result.num_pictures} pictures of {folder}"]
    if result.num_cut:
        notes.append(f"{result.num_cut} prompts are longer than the model reads; it saw their beginning")
    _tell(result, notes, output)


def _tell(result: MetricResult, notes: list[str], output: Path | None) -> None:
    report = Report(result.name, ("", "value"), [("all pictures", f"{result.value:.4f}")], notes, asdict(result))
    console = Console(highlight=False, markup=False)
    if output is None:
        report.show(console)
    else:
        output.mkdir(parents=True, exist_ok=True)
        print_and_save(report, output, console)
    if result.unreadable:
        raise Failure(
            f"{len(result.unreadable)} pictures could not be read and count for nothing: "
            f"{'; '.join(f'{name} ({why})' for name, why in result.unreadable.items())}"
        )
