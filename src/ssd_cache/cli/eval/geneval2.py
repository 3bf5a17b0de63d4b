"""`ssd-cache eval geneval2`: generate GenEval 2's images into GenEval's folder layout, and score them by its rules.

Options and tables. Rules and files are in `ssd_cache.evaluation.geneval2`, models in `ssd_cache.evaluation.vqa`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.eval import benchmarks
from ssd_cache.cli.eval.dpg import QuestionBatch
from ssd_cache.cli.eval.score_table import Report
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import Device, Dtype, option
from ssd_cache.evaluation.bootstrap import cell
from ssd_cache.evaluation.export import PROMPTS_FILE, read_settings
from ssd_cache.evaluation.geneval import SampleFolder
from ssd_cache.evaluation.geneval2 import JUDGE, NUM_PROMPTS, GenEval2Score, read_prompts, score_folder
from ssd_cache.evaluation.vqa import ChatVQA, load_vqa

app = benchmarks.new_app("GenEval 2: generate its images, and score them by its rules.")


def _prompts(output: Path, prompts_file: Path, samples: int) -> benchmarks.Prompts:
    prompts = read_prompts(prompts_file)
    lines = "".join(prompt.to_json() + "\n" for prompt in prompts)
    named = [(str(prompt.atom_count), prompt.prompt) for prompt in prompts]
    return SampleFolder(output, prompts, samples), named, lines


EXPORT_HELP = """Generate the images of GenEval 2 into GenEval's folder layout.

The prompts are GenEval 2's geneval2_data.jsonl, or some of its lines. After an interruption the same command resumes
the run. Several processes share the images under
`accelerate launch -m ssd_cache.cli eval geneval2 export ...`.
"""

app.command("export", help=EXPORT_HELP)(benchmarks.export_command("geneval2", 1, _prompts))


@app.command("score")
def score_geneval2(
    folder: benchmarks.Folder,
    vqa: Annotated[str, option("A chat model for images, which answers: a folder or a Hub id.", "NAME")] = JUDGE,
    output: benchmarks.Results = None,
    batch_size: QuestionBatch = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Score a whole folder that `export` wrote ("GenEval 2 rules (VQA = ...)").

    An image that is missing or cannot be read is an error.
    """
    results = output or folder / "results"
    with refusing():
        settings = read_settings(folder)
        if settings.get("format") != "ssd-cache geneval2 export 1":
            raise WrongUse(f"{folder}: give a folder that `ssd-cache eval geneval2 export` wrote")
        images = SampleFolder(folder, read_prompts(folder / PROMPTS_FILE), settings.get("num_samples", 1))
        images.check_complete()
        check_place("--output", results, is_folder=True)
        with benchmarks.judge("--vqa", vqa):
            answerer = load_vqa(vqa, dtype=dtype, device=device, batch_size=batch_size)
        if not isinstance(answerer, ChatVQA):
            raise WrongUse(f"--vqa {vqa}: a BLIP gives no probabilities of answers; give a chat model for images")
    benchmarks.score(
        results,
        len(images.texts),
        "images",
        lambda file, on_image: score_folder(images, answerer, results_file=file, on_image=on_image),
        lambda score: _report(score, settings),
    )


def _report(score: GenEval2Score, settings: Mapping[str, Any]) -> Report:
    """Table of both scores, the skills and the atomicities."""
    part = "" if score.num_prompts == NUM_PROMPTS else f" (a part: GenEval 2 has {NUM_PROMPTS} prompts)"
    return Report(
        title=score.judge["scorer"],
        columns=("", "score", "standard error"),
        rows=[
            ("Soft-TIFA GM", cell(score.soft_tifa_gm, 2), cell(score.gm_error, 2)),
            ("Soft-TIFA AM", cell(score.soft_tifa_am, 2), cell(score.am_error, 2)),
            *((f"{skill} (AM)", cell(value, 2), "") for skill, value in score.skills.items()),
            *((f"{count} atoms (GM)", cell(value, 2), "") for count, value in score.atomicities.items()),
        ],
        notes=(
            f"{score.num_images} images of {score.num_prompts} prompts{part}",
            benchmarks.described(settings),
        ),
        data={**vars(score), "settings": settings},
    )
