"""`ssd-cache eval geneval`: generate GenEval's images into its folder layout, and score such a folder by its rules.

Options, progress and tables. Rules, models and files are in `ssd_cache.evaluation.geneval`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from ssd_cache.cli.errors import Failure, WrongUse, failure, refusing
from ssd_cache.cli.eval.drawing import (
    BatchSize,
    BudgetText,
    ExportSeed,
    Options,
    Output,
    PolicyName,
    described,
    export,
    judge,
)
from ssd_cache.cli.eval.options import HeadMapName
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import MODEL, Device, Dtype, Grid, Guidance, ModelName, Temperature
from ssd_cache.evaluation.clip import CLIP
from ssd_cache.evaluation.export import PROMPTS_FILE, read_settings
from ssd_cache.evaluation.geneval import (
    DETECTOR,
    NUM_PROMPTS,
    NUM_SAMPLES,
    ColorClassifier,
    Detector,
    GenEvalPictures,
    GenEvalScore,
    SampleFolder,
    read_prompts,
    score_folder,
)
from ssd_cache.evaluation.policies import DEFAULT
from ssd_cache.models import BUNDLED

app = typer.Typer()


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """GenEval: generate its images, and score them by its rules."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command("export")
def export_geneval(
    output: Output,
    prompts_file: Annotated[
        Path,
        typer.Option(help="GenEval's evaluation_metadata.jsonl, or some of its lines.", metavar="FILE"),
    ] = Path("evaluation_metadata.jsonl"),
    samples: Annotated[int, typer.Option(help="Images of each prompt.", metavar="N")] = NUM_SAMPLES,
    model: ModelName = BUNDLED,
    grid: Grid = None,
    head_map: HeadMapName = None,
    policy: PolicyName = DEFAULT,
    budget: BudgetText = None,
    batch_size: BatchSize = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    seed: ExportSeed = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Generate the images of GenEval into its official folder layout.

    After an interruption the same command resumes the run. Several processes
    share the images under
    `accelerate launch -m ssd_cache.cli eval geneval export ...`.
    """
    with refusing():
        prompts = read_prompts(prompts_file)
        folder = SampleFolder(output, prompts, samples)
    options = Options(
        model, grid, head_map, policy, budget, output, batch_size, guidance, temperature, seed, dtype, device
    )
    pictures = GenEvalPictures(folder)
    export("geneval", pictures, pictures.prompts, [(it.tag, it.prompt) for it in prompts], samples, options)


@app.command("score")
def score_geneval(
    folder: Annotated[Path, typer.Argument(help="The folder of the images.", metavar="FOLDER", show_default=False)],
    detector: Annotated[
        str, typer.Option(help="A Mask2Former for COCO's 80 classes: a folder or a Hub id.", metavar="NAME")
    ] = DETECTOR,
    clip: Annotated[str, typer.Option(help="A CLIP model: a folder or a Hub id.", metavar="NAME")] = CLIP,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Output folder of the results.", metavar="FOLDER", show_default="results in FOLDER"
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="File of the prompts of the images.", metavar="FILE", show_default=f"{PROMPTS_FILE} in FOLDER"
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Images of each prompt.", metavar="N", show_default="as drawn, or 4"),
    ] = None,
    short_side: Annotated[
        int,
        typer.Option(
            help="Short side in pixels to which the detector resizes an image.", metavar="N", rich_help_panel=MODEL
        ),
    ] = 800,
    device: Device = "auto",
) -> None:
    """Score a whole folder of GenEval's images ("GenEval rules, HF detector").

    The numbers differ from official GenEval's, because the detector has other
    weights. A missing image is an error. An image that cannot be read counts as
    wrong and is named, and the exit code is then 1.
    """
    with refusing():
        if not folder.is_dir():
            raise WrongUse(f"{folder}: no such folder; draw the pictures first (ssd-cache eval geneval export)")
        settings = read_settings(folder)
        own = folder / PROMPTS_FILE
        if prompts_file is None and not own.is_file():
            raise WrongUse(
                f"{folder} has no {PROMPTS_FILE}: give the file that its pictures are of, as --prompts-file "
                "evaluation_metadata.jsonl"
            )
        prompts = read_prompts(prompts_file or own)
        pictures = SampleFolder(folder, prompts, samples or settings.get("num_samples", NUM_SAMPLES))
        pictures.check_complete()
        results = output or folder / "results"
        check_place("--output", results, is_folder=True)
        with judge("--detector", detector):
            eyes = Detector.from_pretrained(detector, device=device, short_side=short_side)
        with judge("--clip", clip):
            colors = ColorClassifier.from_pretrained(clip, device=device)
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(pictures), desc="scoring", unit=" pictures") as bar:
            score = score_folder(
                pictures, eyes, colors, results_file=results / "results.jsonl", on_image=lambda _: bar.update()
            )
        print_and_save(_report(score, described(settings), settings), results, Console(highlight=False, markup=False))
    except ValueError as error:
        raise failure(error) from error
    except OSError as error:
        raise Failure(
            f"{results} can not be written ({error.strerror}); the results so far are kept: make room, and run the "
            "same command again to go on"
        ) from error
    if score.unreadable:
        raise Failure(
            f"{len(score.unreadable)} of {len(pictures)} pictures could not be read and count as wrong: "
            f"{', '.join(score.unreadable)}; delete them, export again, and score again"
        )


def _report(score: GenEvalScore, drawn: str, settings: dict) -> Report:
    """Table of the six tags and their mean, with standard errors and notes."""
    rows = [
        (tag, f"{value:.4f}", _error(score.tag_errors[tag]), score.num_images[tag], score.num_prompts[tag])
        for tag, value in score.tags.items()
    ]
    num_images, num_prompts = sum(score.num_images.values()), sum(score.num_prompts.values())
    rows.append(("overall", f"{score.overall:.4f}", _error(score.standard_error), num_images, num_prompts))
    part = "" if num_prompts == NUM_PROMPTS else f" (a part: GenEval has {NUM_PROMPTS} prompts)"
    return Report(
        title=score.scorer,
        columns=("tag", "score", "standard error", "pictures", "prompts"),
        rows=rows,
        notes=(
            f"{num_images} pictures of {num_prompts} prompts{part}; {100 * score.images_correct:.2f}% of the pictures "
            f"and {100 * score.prompts_correct:.2f}% of the prompts (any of their pictures) are correct",
            f"detector {score.settings['detector']}, colours by {score.settings['classifier']}: not official GenEval",
            drawn,
        ),
        data={**score.to_dict(), "pictures": settings},
    )


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
