"""`ssd-cache eval geneval`: generate GenEval's images into its folder layout, and score such a folder by its rules.

Options, progress and tables. Rules, models and files are in `ssd_cache.evaluation.geneval`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.eval import benchmarks
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import MODEL, Budget, Device, Dtype, Grid, Guidance, HeadMapName, ModelName, Temperature
from ssd_cache.evaluation.clip import CLIP
from ssd_cache.evaluation.export import PROMPTS_FILE, read_settings
from ssd_cache.evaluation.geneval import (
    DETECTOR,
    NUM_PROMPTS,
    NUM_SAMPLES,
    ColorClassifier,
    Detector,
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
    output: benchmarks.Output,
    prompts_file: Annotated[
        Path,
        typer.Option(help="GenEval's evaluation_metadata.jsonl, or some of its lines.", metavar="FILE", exists=True),
    ] = Path("evaluation_metadata.jsonl"),
    samples: Annotated[int, typer.Option(help="Images of each prompt.", metavar="N", min=1)] = NUM_SAMPLES,
    model: ModelName = BUNDLED,
    grid: Grid = None,
    head_map: HeadMapName = None,
    policy: benchmarks.PolicyName = DEFAULT,
    budget: Budget = None,
    batch_size: benchmarks.BatchSize = 16,
    guidance: Guidance = None,
    temperature: Temperature = None,
    seed: benchmarks.ExportSeed = 42,
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
        images = SampleFolder(output, prompts, samples)
    options = benchmarks.Options(
        model, grid, head_map, policy, budget, batch_size, guidance, temperature, seed, dtype, device
    )
    benchmarks.export("geneval", images, [(prompt.tag, prompt.prompt) for prompt in prompts], samples, options)


@app.command("score")
def score_geneval(
    folder: benchmarks.Folder,
    detector: Annotated[
        str, typer.Option(help="A Mask2Former for COCO's 80 classes: a folder or a Hub id.", metavar="NAME")
    ] = DETECTOR,
    clip: Annotated[str, typer.Option(help="A CLIP model: a folder or a Hub id.", metavar="NAME")] = CLIP,
    output: benchmarks.Results = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help="File of the prompts of the images.", metavar="FILE", show_default=f"{PROMPTS_FILE} in FOLDER"
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Images of each prompt.", metavar="N", show_default="as generated, or 4"),
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
    results = output or folder / "results"
    with refusing():
        settings = read_settings(folder)
        own = folder / PROMPTS_FILE
        if prompts_file is None and not own.is_file():
            raise WrongUse(
                f"{folder} has no {PROMPTS_FILE}: give the prompt file of its images, as --prompts-file "
                "evaluation_metadata.jsonl"
            )
        samples = samples or settings.get("num_samples", NUM_SAMPLES)
        images = SampleFolder(folder, read_prompts(prompts_file or own), samples)
        images.check_complete()
        check_place("--output", results, is_folder=True)
        with benchmarks.judge("--detector", detector):
            eyes = Detector.from_pretrained(detector, device=device, short_side=short_side)
        with benchmarks.judge("--clip", clip):
            colors = ColorClassifier.from_pretrained(clip, device=device)
    with benchmarks.scoring(results, len(images), " images") as bar:
        score = score_folder(
            images, eyes, colors, results_file=results / "results.jsonl", on_image=lambda _: bar.update()
        )
    print_and_save(_report(score, settings), results, Console(highlight=False, markup=False))
    if score.unreadable:
        raise Failure(
            f"{len(score.unreadable)} of {len(images)} images could not be read and count as wrong: "
            f"{', '.join(score.unreadable)}; delete them, export again, and score again"
        )


def _report(score: GenEvalScore, settings: dict) -> Report:
    """Table of the six tags and their mean, with standard errors and notes."""
    num_images, num_prompts = sum(score.num_images.values()), sum(score.num_prompts.values())
    lines = [
        (tag, score.tags[tag], score.tag_errors[tag], score.num_images[tag], score.num_prompts[tag])
        for tag in score.tags
    ]
    lines.append(("overall", score.overall, score.standard_error, num_images, num_prompts))
    part = "" if num_prompts == NUM_PROMPTS else f" (a part: GenEval has {NUM_PROMPTS} prompts)"
    return Report(
        title=score.scorer,
        columns=("tag", "score", "standard error", "images", "prompts"),
        rows=[
            (name, f"{value:.4f}", "-" if error is None else f"{error:.4f}", *numbers)
            for name, value, error, *numbers in lines
        ],
        notes=(
            f"{num_images} images of {num_prompts} prompts{part}; {100 * score.images_correct:.2f}% of the images and "
            f"{100 * score.prompts_correct:.2f}% of the prompts (any of their images) are correct",
            f"detector {score.settings['detector']}, colours by {score.settings['classifier']}: not official GenEval",
            benchmarks.described(settings),
        ),
        data={**score.to_dict(), "pictures": settings},
    )
