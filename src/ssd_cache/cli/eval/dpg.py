"""`ssd-cache eval dpg`: generate DPG-Bench's sheets, and score a folder of sheets by its rules with a VQA model.

Options, progress and tables. Rules, models and files are in `ssd_cache.evaluation.dpg`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
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
from ssd_cache.evaluation.dpg import (
    PICTURES,
    DPGPictures,
    DPGResult,
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
    output: Output,
    prompts_file: Annotated[
        Path,
        typer.Option(help="JSON lines with item_id and prompt, or a folder of files <item_id>.txt.", metavar="PATH"),
    ] = Path("prompts.jsonl"),
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
    """Generate the images of DPG-Bench: a sheet of 2 x 2 for each prompt, named by its item id.

    After an interruption the same command resumes the run. Several processes
    share the images under
    `accelerate launch -m ssd_cache.cli eval dpg export ...`.
    """
    with refusing():
        try:
            prompts = read_prompts(prompts_file)
        except OSError as error:
            raise WrongUse(f"can not read --prompts-file {prompts_file}: {error.strerror}") from error
    options = Options(
        model, grid, head_map, policy, budget, output, batch_size, guidance, temperature, seed, dtype, device
    )
    pictures = DPGPictures(output, prompts)
    export("dpg", pictures, pictures.prompts, list(prompts.items()), PICTURES, options)


@app.command("score")
def score_dpg(
    folder: Annotated[Path, typer.Argument(help="The folder of the sheets.", metavar="FOLDER", show_default=False)],
    questions: Annotated[
        Path,
        typer.Option(
            help="DPG-Bench's questions: dpg_bench.csv, or a copy as .jsonl, .json, .parquet.",
            metavar="FILE",
            show_default=False,
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Output folder of the results.", metavar="FOLDER", show_default="results in FOLDER"
        ),
    ] = None,
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
    with refusing():
        if not folder.is_dir():
            raise WrongUse(f"{folder}: no such folder; draw the pictures first (ssd-cache eval dpg export)")
        settings = read_settings(folder)
        own = folder / PROMPTS_FILE
        item_ids = list(read_prompts(own)) if own.is_file() else None
        try:
            asked = read_questions(questions, official=official)
        except OSError as error:
            raise WrongUse(f"can not read --questions {questions}: {error.strerror}") from error
        if not official:
            check_complete(folder, asked, item_ids)
        side = side or _side(folder, exported=bool(settings))
        results = output or folder / "results"
        check_place("--output", results, is_folder=True)
        with judge("--vqa", vqa):
            answerer = load_vqa(vqa, dtype=dtype, device=device, batch_size=batch_size)
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(asked if item_ids is None else item_ids), desc="scoring", unit=" sheets") as bar:
            result = score_sheets(
                folder,
                asked,
                answerer,
                side,
                item_ids=item_ids,
                official=official,
                results=results / "results.jsonl",
                on_prompt=lambda _: bar.update(),
            )
        report = _report(result, described(settings), settings)
        print_and_save(report, results, Console(highlight=False, markup=False))
    except ValueError as error:
        raise failure(error) from error
    except OSError as error:
        raise Failure(
            f"{results} can not be written ({error.strerror}); the answers so far are kept: make room, and run the "
            "same command again to go on"
        ) from error
    if result.unreadable:
        raise Failure(
            f"{len(result.unreadable)} of {result.num_prompts} sheets could not be read and are left out: "
            f"{'; '.join(result.unreadable.values())}; delete them, export again, and score again"
        )


def _side(folder: Path, *, exported: bool) -> int:
    """The side of one image: half the first readable sheet. Only an exported folder is known to hold sheets."""
    if not exported:
        raise WrongUse(
            f"{folder}: another program drew it; give the pixels of one picture's side, --side 384 for Janus"
        )
    for path in find_sheets(folder).values():
        try:
            with Image.open(path) as sheet:
                return sheet.width // 2
        except OSError:  # scoring names this sheet later
            continue
    raise WrongUse(f"{folder} has no sheet that can be read; draw them (ssd-cache eval dpg export)")


def _report(result: DPGResult, drawn: str, settings: dict) -> Report:
    """Table of the overall score, the broad categories and the finer categories."""
    score, error = result.score, result.score.standard_error
    rows = [("overall", f"{score.overall:.2f}", "-" if error is None else f"{error:.2f}")]
    rows += [(name, f"{value:.2f}", "") for level in (score.level1, score.level2) for name, value in level.items()]
    notes = [
        f"{len(score.prompts)} of {result.num_prompts} prompts, {PICTURES} pictures each; categories by raw answers of "
        f"{'the last picture' if result.is_official else 'all pictures'}",
        "not official DPG-Bench: another VQA model",
        drawn,
    ]
    if score.dropped:
        notes.insert(1, f"dropped: {'; '.join(f'{item_id}: {why}' for item_id, why in score.dropped.items())}")
    return Report(
        title=result.name,
        columns=("category", "score", "standard error"),
        rows=rows,
        notes=notes,
        data={**result.to_dict(), "pictures": settings},
    )
