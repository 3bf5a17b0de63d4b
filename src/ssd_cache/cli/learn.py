"""`ssd-cache learn`: teach a head map's semantic heads which tokens to keep, and save it with that score.

Options only; the learning is `ssd_cache.learning`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ssd_cache.allocation import fit_heads
from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.files import check_place, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import Device, Dtype, Grid, Guidance, ModelName, OfDistribution, Prompts, PromptsFile, Seed
from ssd_cache.cli.plan import parse_budget
from ssd_cache.learning import check_learning, learn_score
from ssd_cache.models import BUNDLED


def learn(
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    head_map: Annotated[
        str | None,
        typer.Option(
            help="The map to begin with: a folder, or a Hub id.", metavar="NAME", show_default="the model's own"
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder of the map with its score.", metavar="FOLDER")
    ] = Path("learned-map"),
    budget: Annotated[
        str | None,
        typer.Option(
            help="What a head holds: 0.2 of the grid, or 115 tokens.",
            metavar="N",
            show_default="what the map was fitted to",
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Share the slots of --budget out head by head first, as the map's levels tell."),
    ] = False,
    buffer: Annotated[
        int | None, typer.Option(help="Tokens evicted at once.", metavar="N", show_default="a third of a row")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of learning.", metavar="N")] = 400,
    rate: Annotated[float, typer.Option(help="Learning rate at the first of them.", metavar="X")] = 0.02,
    resume: Annotated[
        Path | None,
        typer.Option(help="Keep what is learned here, and go on from it.", metavar="FILE", show_default=False),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Pictures a step; four times as many are drawn at once.", metavar="N")
    ] = 4,
    model: ModelName = BUNDLED,
    grid: Grid = None,
    guidance: Guidance = None,
    temperature: OfDistribution = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Teach semantic heads which tokens to keep, and save the map with that score.

    A picture of each prompt is drawn with a full cache. Its tokens then show how
    far the model moves when heads let tokens go, and a score of few numbers a
    head follows the gradient. Give a few hundred prompts, unlike each other.
    """
    texts = read_prompts(prompts or [], prompts_file)
    check_place("--output", output, is_folder=True)
    if resume is not None:
        check_place("--resume", resume, is_folder=False)
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
    try:
        learned = learn_score(generator, texts, labelled, budget=amount, state_file=resume, **settings)
        folder = learned.save_pretrained(output)
    except ValueError as error:  # NaN, a prompt too long, another run's state, a full disk: each says what to do
        raise Failure(str(error)) from error
    Console(highlight=False, markup=False).print(f"{learned!r}\nwrote {folder}", soft_wrap=True)
