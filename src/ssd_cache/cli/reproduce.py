"""`ssd-cache reproduce`: repeat the paper's tables with a model, or a share of them, in one run that resumes.

It checks the options, loads the model and calls `ssd_cache.reproducing`, which keeps everything in the output folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssd_cache.cli import options
from ssd_cache.cli.bench import parse_batch_sizes
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.eval import benchmarks as exports
from ssd_cache.cli.eval.geneval import ClipName
from ssd_cache.cli.eval.options import Budgets, Policies, parse_budgets
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import option
from ssd_cache.cli.resuming import interruptible
from ssd_cache.evaluation.geneval import DETECTOR
from ssd_cache.evaluation.judge_models import CLIP
from ssd_cache.evaluation.policies import choose_head_map, parse_policies
from ssd_cache.models import resolve_device, resolve_dtype
from ssd_cache.reproducing import claim
from ssd_cache.reproducing import reproduce as run_reproduction
from ssd_cache.reproducing.benchmarks import Benchmark, DPGBench, GenEval
from ssd_cache.reproducing.plan import least_seconds
from ssd_cache.reproducing.reproducing import SHORTER
from ssd_cache.reproducing.settings import BUDGETS, POLICIES, Settings, choose_cells
from ssd_cache.runs.limits import check_weights_fit, refuse_long_run
from ssd_cache.runs.processes import Processes

JUDGES, SPEED = "Benchmarks and judges", "Speed"

MAX_HOURS = 12.0
"""A run that is estimated to take longer needs --yes."""


def reproduce(
    model: Annotated[str, typer.Argument(help=options.MODEL_NAMES, metavar="MODEL")],
    output: Annotated[Path, options.output_option("Folder of the run.", "FOLDER")] = Path("reproduction"),
    geneval: Annotated[
        Path | None,
        typer.Option(
            help="GenEval's evaluation_metadata.jsonl; left out without it.",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            rich_help_panel=JUDGES,
            show_default=False,
        ),
    ] = None,
    dpg: Annotated[
        Path | None,
        typer.Option(
            help="ELLA's folder dpg_bench, with prompts and dpg_bench.csv; left out without it.",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            rich_help_panel=JUDGES,
            show_default=False,
        ),
    ] = None,
    detector: Annotated[str, option("GenEval's detector: a folder or a Hub id.", "NAME", JUDGES)] = DETECTOR,
    clip: ClipName = CLIP,
    vqa: Annotated[
        str | None, option("Model that answers DPG-Bench's questions: a folder or a Hub id.", "NAME", JUDGES)
    ] = None,
    sample: Annotated[float, option("Share of the prompts and of the timed tokens.", "X")] = 1.0,
    head_map: options.HeadMapName = None,
    policies: Policies = POLICIES,
    budgets: Budgets = BUDGETS,
    batch_size: exports.BatchSize = 16,
    speed_batch_sizes: Annotated[str, option("Batch sizes of the speed tables.", "N,N", SPEED)] = "32,64,128",
    compiled: Annotated[bool, typer.Option(help="Also time compiled decode steps.", rich_help_panel=SPEED)] = True,
    yes: Annotated[
        bool, typer.Option("--yes", help=f"Also start a run that takes more than {MAX_HOURS:g} hours.")
    ] = False,
    grid: options.Grid = None,
    guidance: options.Guidance = None,
    temperature: options.Temperature = None,
    seed: exports.ExportSeed = 42,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Repeat the tables of the SSD paper: GenEval, DPG-Bench, throughput, memory.

    Prints a plan with the time, memory and disk of each stage, measured on first
    batches. Ends with reproduction.md and reproduction.json: our numbers beside
    the paper's, and paired tests. You can stop at any point, and the same command
    resumes. --sample 0.05 runs all of it on a small share. Several processes share
    images and scores under `accelerate launch -m ssd_cache.cli reproduce ...`.
    """
    check_place("--output", output, is_folder=True)
    if not 0 < sample <= 1:
        raise WrongUse(f"--sample {sample:g} is out of range: give a share of the prompts above 0 and up to 1 (0.05)")
    if dpg is not None and vqa is None:
        raise WrongUse(
            "--dpg needs --vqa NAME, the model that answers the questions, such as Salesforce/blip-vqa-capfilt-large"
        )
    sizes = parse_batch_sizes(speed_batch_sizes, "--speed-batch-sizes")
    with refusing():
        used: list[Benchmark] = [] if geneval is None else [GenEval(geneval, sample, detector, clip)]
        if dpg is not None and vqa is not None:
            used.append(DPGBench(dpg, sample, vqa))
        left_out = ["GenEval, without --geneval"] if geneval is None else []
        left_out += ["DPG-Bench, without --dpg"] if dpg is None else []
        checkpoint, parsed = find_model(model, grid), parse_policies(policies)
        labels = choose_head_map(checkpoint, head_map, parsed)
        cells, skipped = choose_cells(parsed, labels, parse_budgets(budgets, labels.num_visual_tokens))
        processes = Processes()
        where = resolve_device(processes.choose_device(device))
        settings = Settings(
            checkpoint=checkpoint,
            benchmarks=used,
            labels=labels,
            cells=cells,
            left_out=[*left_out, *skipped],
            sampling=checkpoint.sampling(guidance, temperature, seed),
            batch_size=batch_size,
            dtype=resolve_dtype(dtype, where),
            device=where,
            sample=sample,
            speed_batch_sizes=sizes,
            is_compiled=compiled,
        )
        settings.check()
        check_weights_fit(checkpoint, settings.dtype, where)
        if not yes:
            seconds = least_seconds(settings, processes.count)
            refuse_long_run(checkpoint, where, seconds, MAX_HOURS, SHORTER, " for its images alone")
        folder = claim(output, settings, processes)
    generator = load_generator(checkpoint, settings.dtype, where)
    with interruptible(lambda: f"{output} keeps the finished parts"):
        page = run_reproduction(
            generator,
            settings,
            folder,
            processes,
            max_hours=None if yes else MAX_HOURS,
            on_plan=lambda plan: typer.echo("\n".join([plan.text(), *settings.omissions()])),
        )
    if page is not None:
        typer.echo(page.read_text("utf-8") + f"\nwrote {page} and {page.with_suffix('.json').name}")
