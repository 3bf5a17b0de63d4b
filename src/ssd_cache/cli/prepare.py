"""`ssd-cache prepare`: make a head map for a model in one run, with a model card and a report.

It checks the options, loads the model and calls `ssd_cache.preparing.prepare`, which keeps its state in a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.utils import validate_repo_id

from ssd_cache.cli import options
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import check_place, check_plotting, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import option
from ssd_cache.cli.plan import parse_budget
from ssd_cache.cli.resuming import interruptible
from ssd_cache.io.showing import shown
from ssd_cache.models import resolve_device, resolve_dtype
from ssd_cache.preparing import prepare as prepare_model
from ssd_cache.preparing.limits import check_hours
from ssd_cache.preparing.preparing import check_state, state_path
from ssd_cache.preparing.report import REPORT, usage
from ssd_cache.preparing.stages import QUICK, STAGES, Settings, check_stages
from ssd_cache.profiling.measuring import DEFAULT_BATCH_SIZE
from ssd_cache.prompts import default_prompts
from ssd_cache.runs.limits import check_weights_fit
from ssd_cache.runs.processes import Processes

MAX_HOURS = 12.0
"""A run that is estimated to take longer needs --yes."""


def prepare(
    model: Annotated[str, typer.Argument(help=options.MODEL_NAMES, metavar="MODEL")],
    output: options.MapFolder = Path("head-map"),
    prompts_file: Annotated[
        Path | None,
        option(
            'Other prompts than those of the package, one a line. In a .jsonl file, each line has a "prompt".', "FILE"
        ),
    ] = None,
    budget: options.MapBudget = "0.2",
    quick: Annotated[bool, typer.Option("--quick", help="Leave learning out, which takes most of the time.")] = False,
    stages: Annotated[
        str | None, option("Stages to run, with those that they need.", "NAME,NAME", default=",".join(STAGES))
    ] = None,
    steps: Annotated[int, option("Training steps.", "N", least=1)] = 600,
    batch_size: Annotated[
        int | None, option("Images at once.", "N", default="4, or fewer if memory is short", least=1)
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help=f"Also start a run that takes more than {MAX_HOURS:g} hours.")
    ] = False,
    push: Annotated[str | None, option("Publish the map in this repository of the Hub.", "USER/REPO")] = None,
    grid: options.Grid = None,
    guidance: options.Guidance = None,
    temperature: options.OfDistribution = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Make a head map for a model: labels, slots, a learned score and a check.

    Prints a plan with the time and memory of each stage, measured on its first
    batch. Everything is kept in the folder OUTPUT.state: you can stop at any
    point, and the same command resumes. Without --prompts-file, the prompts are
    those of the model, or 600 captions that come with the package. Several processes share each stage
    under `accelerate launch -m ssd_cache.cli prepare ...`.
    """
    if quick and stages:
        raise WrongUse("--quick and --stages both choose the stages: give one of them")
    check_place("--output", output, is_folder=True)
    _check_repository(push)
    check_plotting()
    amount = parse_budget(budget)
    names = QUICK if quick else STAGES if stages is None else tuple(name.strip() for name in stages.split(","))
    with refusing():
        checkpoint = find_model(model, grid)
        texts = default_prompts(checkpoint) if prompts_file is None else read_prompts(None, prompts_file)
        sampling = checkpoint.sampling(guidance, temperature, seed)
        settings = Settings(texts, amount, steps, batch_size or DEFAULT_BATCH_SIZE, sampling)
        check_stages(names, checkpoint, settings)
        checkpoint.check_captions(texts)
        check_state(output, checkpoint, settings)
        processes = Processes()
        where = resolve_device(processes.choose_device(device))
        kind = resolve_dtype(dtype, where)
        check_weights_fit(checkpoint, kind, where)
        if not yes:
            check_hours(checkpoint, kind, where, names, len(texts), batch_size, MAX_HOURS)
        generator = load_generator(checkpoint, kind, where)
    with interruptible(lambda: f"{state_path(output)} keeps the finished parts"):
        head_map = prepare_model(
            generator,
            output,
            texts,
            budget=amount,
            stages=names,
            num_steps=steps,
            batch_size=batch_size,
            guidance_scale=guidance,
            temperature=temperature,
            seed=seed,
            max_hours=None if yes else MAX_HOURS,
            on_plan=lambda plan: typer.echo(plan.text()),
        )
    if processes.is_main:
        typer.echo("\n".join([repr(head_map), f"wrote {output}, with {REPORT}; use it with", usage(output)]))
        if push is not None:
            typer.echo(f"published {head_map.push_to_hub(push).commit_url}")


def _check_repository(name: str | None) -> None:
    """Raise WrongUse, before hours of work, for a name that no repository of the Hub can have."""
    try:
        if name is not None:
            validate_repo_id(name)
    except ValueError as error:
        raise WrongUse(f"--push {shown(name)} cannot be the name of a repository: give USER/REPO") from error
