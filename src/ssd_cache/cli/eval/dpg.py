"""`ssd-cache eval dpg`: generate DPG-Bench's sheets, and score a folder of sheets by its rules with a VQA model.

Options and tables. Rules and files are in `ssd_cache.evaluation.dpg`, models in `ssd_cache.evaluation.vqa`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.eval import benchmarks
from ssd_cache.cli.eval.score_table import Report
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import MODEL, Device, Dtype, option
from ssd_cache.evaluation.bootstrap import cell
from ssd_cache.evaluation.dpg import (
    NUM_IMAGES,
    DPGScore,
    SheetFolder,
    check_complete,
    prompt_lines,
    read_prompts,
    read_questions,
    score_sheets,
)
from ssd_cache.evaluation.export import PROMPTS_FILE, read_settings
from ssd_cache.evaluation.vqa import load_vqa

VQAName = Annotated[
    str,
    typer.Option(
        help="Model that answers: a BLIP for VQA, or any chat model for images; a folder or a Hub id.",
        metavar="NAME",
        show_default=False,
    ),
]
QuestionBatch = Annotated[int, option("Questions answered at once.", "N", MODEL, least=1)]

app = benchmarks.new_app("DPG-Bench: generate its sheets, and score them by its rules.")


def _prompts(output: Path, prompts_file: Path, samples: int) -> benchmarks.Prompts:
    if samples != NUM_IMAGES:
        raise WrongUse(f"--samples {samples}: a sheet of DPG-Bench has {NUM_IMAGES} images; leave the option out")
    prompts = read_prompts(prompts_file)
    return SheetFolder(output, prompts), list(prompts.items()), prompt_lines(prompts)


EXPORT_HELP = """Generate the images of DPG-Bench: a sheet of 2 x 2 for each prompt, named by its item id.

The prompts are JSON lines with item_id and prompt, or a folder of files <item_id>.txt. After an interruption the same
command resumes the run. Several processes share the images under
`accelerate launch -m ssd_cache.cli eval dpg export ...`.
"""

app.command("export", help=EXPORT_HELP)(benchmarks.export_command("dpg", NUM_IMAGES, _prompts))


@app.command("score")
def score_dpg(
    folder: benchmarks.Folder,
    questions: Annotated[
        Path,
        typer.Option(help="DPG-Bench's questions: dpg_bench.csv of ELLA.", metavar="FILE", exists=True),
    ],
    vqa: VQAName,
    output: benchmarks.Results = None,
    official: Annotated[
        bool, typer.Option("--official", help="Reproduce the official script's quirks: missing answers are left out.")
    ] = False,
    batch_size: QuestionBatch = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Score a whole folder of DPG-Bench's sheets ("DPG rules (VQA = ...)").

    The numbers differ from those of papers, whose VQA model is mPLUG. A sheet that
    is missing or cannot be read is an error.
    """
    results = output or folder / "results"
    with refusing():
        settings = read_settings(folder)
        own = folder / PROMPTS_FILE
        asked = read_questions(questions, official=official)
        item_ids = list(read_prompts(own)) if own.is_file() else list(asked)
        if not official:
            check_complete(folder, asked, item_ids)
        check_place("--output", results, is_folder=True)
        with benchmarks.judge("--vqa", vqa):
            answerer = load_vqa(vqa, dtype=dtype, device=device, batch_size=batch_size)
    benchmarks.score(
        results,
        len(item_ids),
        "sheets",
        lambda file, on_sheet: score_sheets(
            folder,
            asked,
            answerer,
            item_ids=item_ids,
            official=official,
            results_file=file,
            on_sheet=on_sheet,
        ),
        lambda score: _report(score, settings),
    )


def _report(score: DPGScore, settings: Mapping[str, Any]) -> Report:
    """Table of the overall score, the broad categories and the finer categories."""
    rows = [("overall", cell(score.overall, 2), cell(score.standard_error, 2))]
    rows += [(name, f"{value:.2f}", "") for level in (score.level1, score.level2) for name, value in level.items()]
    notes = [
        f"{len(score.prompts)} of {len(score.prompts) + len(score.dropped)} prompts, {NUM_IMAGES} images each; "
        f"categories by raw answers of {'the last image' if score.judge['official'] else 'all images'}",
        "not official DPG-Bench: another VQA model",
        benchmarks.described(settings),
    ]
    if score.dropped:
        notes.insert(1, f"dropped: {'; '.join(f'{item_id}: {why}' for item_id, why in score.dropped.items())}")
    data = {name: value for name, value in vars(score).items() if name != "answers"}
    return Report(
        title=score.judge["scorer"],
        columns=("category", "score", "standard error"),
        rows=rows,
        notes=notes,
        data={**data, "settings": settings},
    )
