"""`ssd-cache eval dpg`: generate DPG-Bench's sheets, and score a folder of sheets by its rules with a VQA model.

Options, progress and tables. Rules, models and files are in `ssd_cache.evaluation.dpg`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console

from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.eval import benchmarks
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.cli.options import MODEL, Budget, Device, Dtype, Grid, Guidance, HeadMapName, ModelName, Temperature
from ssd_cache.evaluation.dpg import (
    NUM_IMAGES,
    DPGScore,
    SheetFolder,
    check_complete,
    find_sheets,
    load_vqa,
    read_prompts,
    read_questions,
    score_sheets,
)
from ssd_cache.evaluation.export import PROMPTS_FILE, read_settings
from ssd_cache.evaluation.policies import DEFAULT
from ssd_cache.models import BUNDLED

app = typer.Typer()


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """DPG-Bench: generate its sheets, and score them by its rules."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command("export")
def export_dpg(
    output: benchmarks.Output,
    prompts_file: Annotated[
        Path,
        typer.Option(
            help="JSON lines with item_id and prompt, or a folder of files <item_id>.txt.", metavar="PATH", exists=True
        ),
    ] = Path("prompts.jsonl"),
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
    """Generate the images of DPG-Bench: a sheet of 2 x 2 for each prompt, named by its item id.

    After an interruption the same command resumes the run. Several processes
    share the images under
    `accelerate launch -m ssd_cache.cli eval dpg export ...`.
    """
    with refusing():
        prompts = read_prompts(prompts_file)
    options = benchmarks.Options(
        model, grid, head_map, policy, budget, batch_size, guidance, temperature, seed, dtype, device
    )
    benchmarks.export("dpg", SheetFolder(output, prompts), list(prompts.items()), NUM_IMAGES, options)


@app.command("score")
def score_dpg(
    folder: benchmarks.Folder,
    questions: Annotated[
        Path,
        typer.Option(
            help="DPG-Bench's questions: dpg_bench.csv, or a re-packed copy as .jsonl.",
            metavar="FILE",
            exists=True,
        ),
    ],
    vqa: Annotated[
        str,
        typer.Option(
            help="Model that answers: a BLIP for VQA, or any chat model for images; a folder or a Hub id.",
            metavar="NAME",
            show_default=False,
        ),
    ],
    output: benchmarks.Results = None,
    official: Annotated[
        bool, typer.Option("--official", help="Reproduce the official script's quirks: missing answers are left out.")
    ] = False,
    side: Annotated[
        int | None,
        typer.Option(help="Side of one image in pixels.", metavar="N", show_default="half a sheet that was exported"),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Questions answered at once.", metavar="N", rich_help_panel=MODEL)
    ] = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Score a whole folder of DPG-Bench's sheets ("DPG rules (VQA = ...)").

    The numbers differ from those of papers, whose VQA model is mPLUG. A missing
    sheet is an error. A sheet that cannot be read is skipped and named, and the
    exit code is then 1.
    """
    results = output or folder / "results"
    with refusing():
        settings = read_settings(folder)
        own = folder / PROMPTS_FILE
        asked = read_questions(questions, official=official)
        item_ids = list(read_prompts(own)) if own.is_file() else None
        if not official:
            check_complete(folder, asked, item_ids)
        if side is None and not settings:
            raise WrongUse(f"{folder}: another program generated it; give the side of one image, --side 384 for Janus")
        side = side or _side(folder)
        check_place("--output", results, is_folder=True)
        with benchmarks.judge("--vqa", vqa):
            answerer = load_vqa(vqa, dtype=dtype, device=device, batch_size=batch_size)
    with benchmarks.scoring(results, len(asked if item_ids is None else item_ids), " sheets") as bar:
        score = score_sheets(
            folder,
            asked,
            answerer,
            side,
            item_ids=item_ids,
            official=official,
            results=results / "results.jsonl",
            on_prompt=lambda _: bar.update(),
        )
    print_and_save(_report(score, settings), results, Console(highlight=False, markup=False))
    if score.unreadable:
        raise Failure(
            f"{len(score.unreadable)} of {score.num_prompts} sheets could not be read and are left out: "
            f"{'; '.join(score.unreadable.values())}; delete them, export again, and score again"
        )


def _side(folder: Path) -> int:
    """The side of one image: half the first readable sheet."""
    for path in find_sheets(folder).values():
        with suppress(OSError), Image.open(path) as sheet:  # scoring names a sheet that cannot be read
            return sheet.width // 2
    raise WrongUse(f"{folder} has no sheet that can be read; generate them (ssd-cache eval dpg export)")


def _report(score: DPGScore, settings: dict) -> Report:
    """Table of the overall score, the broad categories and the finer categories."""
    error = score.standard_error
    rows = [("overall", f"{score.overall:.2f}", "-" if error is None else f"{error:.2f}")]
    rows += [(name, f"{value:.2f}", "") for level in (score.level1, score.level2) for name, value in level.items()]
    notes = [
        f"{len(score.prompts)} of {score.num_prompts} prompts, {NUM_IMAGES} images each; categories by raw answers of "
        f"{'the last image' if score.is_official else 'all images'}",
        "not official DPG-Bench: another VQA model",
        benchmarks.described(settings),
    ]
    if score.dropped:
        notes.insert(1, f"dropped: {'; '.join(f'{item_id}: {why}' for item_id, why in score.dropped.items())}")
    return Report(
        title=score.name,
        columns=("category", "score", "standard error"),
        rows=rows,
        notes=notes,
        data={**score.to_dict(), "pictures": settings},
    )
