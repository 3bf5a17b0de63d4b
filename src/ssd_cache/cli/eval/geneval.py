"""`ssd-cache eval geneval`: generate GenEval's images into its folder layout, and score such a folder by its rules.

Options and tables. Rules, models and files are in `ssd_cache.evaluation.geneval`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.eval import benchmarks
from ssd_cache.cli.eval.score_table import Report
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import MODEL, Device, option
from ssd_cache.evaluation.bootstrap import cell
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
from ssd_cache.evaluation.judge_models import CLIP

ClipName = Annotated[str, option("A CLIP model: a folder or a Hub id.", "NAME")]

app = benchmarks.new_app("GenEval: generate its images, and score them by its rules.")


def _prompts(output: Path, prompts_file: Path, samples: int) -> benchmarks.Prompts:
    prompts = read_prompts(prompts_file)
    lines = "".join(prompt.to_json() + "\n" for prompt in prompts)
    return SampleFolder(output, prompts, samples), [(prompt.tag, prompt.prompt) for prompt in prompts], lines


EXPORT_HELP = """Generate the images of GenEval into its official folder layout.

The prompts are GenEval's evaluation_metadata.jsonl, or some of its lines. After an interruption the same command
resumes the run. Several processes share the images under
`accelerate launch -m ssd_cache.cli eval geneval export ...`.
"""

app.command("export", help=EXPORT_HELP)(benchmarks.export_command("geneval", NUM_SAMPLES, _prompts))


@app.command("score")
def score_geneval(
    folder: benchmarks.Folder,
    detector: Annotated[str, option("A Mask2Former for COCO's 80 classes: a folder or a Hub id.", "NAME")] = DETECTOR,
    clip: ClipName = CLIP,
    output: benchmarks.Results = None,
    prompts_file: Annotated[
        Path | None, option("File of the prompts of the images.", "FILE", default=f"{PROMPTS_FILE} in FOLDER")
    ] = None,
    samples: Annotated[int | None, option("Images of each prompt.", "N", default="as generated, or 4")] = None,
    short_side: Annotated[
        int, option("Short side in pixels to which the detector resizes an image.", "N", MODEL)
    ] = 800,
    device: Device = "auto",
) -> None:
    """Score a whole folder of GenEval's images ("GenEval rules, HF detector").

    The numbers differ from official GenEval's, because the detector has other
    weights. An image that is missing or cannot be read is an error.
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
    benchmarks.score(
        results,
        len(images.texts),
        "images",
        lambda file, on_image: score_folder(images, eyes, colors, results_file=file, on_image=on_image),
        lambda score: _report(score, settings),
    )


def _report(score: GenEvalScore, settings: Mapping[str, Any]) -> Report:
    """Table of the six tags and their mean, with standard errors and notes."""
    num_images, num_prompts = sum(score.num_images.values()), sum(score.num_prompts.values())
    rows = [
        (tag, cell(value, 4), cell(score.tag_errors[tag], 4), score.num_images[tag], score.num_prompts[tag])
        for tag, value in score.tags.items()
    ]
    part = "" if num_prompts == NUM_PROMPTS else f" (a part: GenEval has {NUM_PROMPTS} prompts)"
    return Report(
        title=score.judge["scorer"],
        columns=("tag", "score", "standard error", "images", "prompts"),
        rows=[*rows, ("overall", cell(score.overall, 4), cell(score.standard_error, 4), num_images, num_prompts)],
        notes=(
            f"{num_images} images of {num_prompts} prompts{part}; {100 * score.images_correct:.2f}% of the images and "
            f"{100 * score.prompts_correct:.2f}% of the prompts (any of their images) are correct",
            f"detector {score.judge['detector']}, colours by {score.judge['classifier']}: not official GenEval",
            benchmarks.described(settings),
        ),
        data={**vars(score), "settings": settings},
    )
