"""`ssd-cache learn`: train token scores for a head map's semantic heads, and save the map with these scores.

Options only. Training is in `ssd_cache.training.learning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.files import check_place, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import Device, Dtype, Grid, Guidance, ModelName, OfDistribution, Prompts, PromptsFile, Seed
from ssd_cache.cli.plan import parse_budget
from ssd_cache.cli.resuming import Resume, StateFile
from ssd_cache.models import BUNDLED
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.training.learning import check_learning, learn_score


def learn(
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    head_map: Annotated[
        str | None,
        typer.Option(
            help="The map to start from: a folder, or a Hub id.", metavar="NAME", show_default="the model's own"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Output folder: the map with the learned score.", metavar="FOLDER")
    ] = Path("learned-map"),
    budget: Annotated[
        str | None,
        typer.Option(
            help="Budget of a head: 0.2 of the grid, or 115 tokens.",
            metavar="N",
            show_default="what the map was fitted to",
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="First choose the slots of each head for --budget, from the map's levels."),
    ] = False,
    buffer: Annotated[
        int | None,
        typer.Option(help="Eviction interval: tokens evicted at once.", metavar="N", show_default="a third of a row"),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            help="Total number of steps. A larger number extends a finished run. The further steps follow the schedule "
            "of the new total, so the score differs from an uninterrupted run of that total.",
            metavar="N",
        ),
    ] = 400,
    rate: Annotated[float, typer.Option(help="Learning rate at the first step.", metavar="X")] = 0.02,
    resume: Resume = None,
    batch_size: Annotated[
        int, typer.Option(help="Images a step; four times as many are generated at once.", metavar="N")
    ] = 4,
    model: ModelName = BUNDLED,
    grid: Grid = None,
    guidance: Guidance = None,
    temperature: OfDistribution = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Train the score by which semantic heads keep tokens, and save it in the map.

    Generates an image of each prompt with a full cache. Gradient descent on a
    few parameters a head then minimises how far eviction moves the model's
    output on these tokens. Give a few hundred different prompts.
    You can stop it at any point: the same command resumes it.
    """
    texts = read_prompts(prompts or [], prompts_file)
    check_place("--output", output, is_folder=True)
    state = StateFile(resume, output)
    amount = None if budget is None else parse_budget(budget)
    if fit and amount is None:
        raise WrongUse("--fit shares out the slots of --budget: give that too (0.2)")
    settings: dict[str, Any] = {
        "buffer": buffer,
        "num_steps": steps,
        "learning_rate": rate,
        "batch_size": batch_size,
        "guidance_scale": guidance,
        "temperature": temperature,
        "seed": seed,
    }
    with refusing():
        checkpoint = find_model(model, grid)
        labelled = checkpoint.head_map(head_map)
        if labelled is None:
            raise WrongUse(f"{checkpoint.name} has no head map in its folder: give --head-map, as `profile` makes it")
        checkpoint.check_head_map(labelled)
        if fit:
            labelled, amount = fit_heads(labelled, amount), None  # type: ignore[arg-type]
        check_learning(labelled, amount, **settings)
        generator = load_generator(checkpoint, dtype, device)
    learned = state.run(
        lambda path: learn_score(generator, texts, labelled, budget=amount, state_file=path, **settings)
    )
    try:
        folder = learned.save_pretrained(output)
    except ValueError as error:  # a full disk
        raise Failure(str(error)) from error
    lines = repr(learned), _compared(learned.profile["learning"]["held_out"]), f"wrote {folder}"
    Console(highlight=False, markup=False).print("\n".join(lines), soft_wrap=True)


def _compared(held_out: Mapping[str, Any]) -> str:
    change = held_out["after"] - held_out["before"]
    return (
        f"divergence on {held_out['num_images']} held-out images, nats a token: {held_out['before']:.4f} before, "
        f"{held_out['after']:.4f} after, change {change:+.4f} +- {held_out['standard_error']:.4f} (standard error)"
    )
