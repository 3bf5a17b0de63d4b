"""`ssd-cache fit`: choose the slots of each head by how much compressing that head changes the model's output.

Options only. `ssd_cache.evaluation.fidelity` measures, and `ssd_cache.profiling.allocation` distributes the slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.files import check_place, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import Device, Dtype, Grid, Guidance, ModelName, OfDistribution, Prompts, PromptsFile, Seed
from ssd_cache.cli.plan import parse_budget
from ssd_cache.cli.resuming import Resume, StateFile
from ssd_cache.evaluation.fidelity import measure_divergence
from ssd_cache.evaluation.fidelity.divergence import check_fitting
from ssd_cache.evaluation.fidelity.measure import check_settings
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import BUNDLED
from ssd_cache.profiling.allocation import fit_heads, measured_levels


def fit(
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    head_map: Annotated[
        str | None,
        typer.Option(
            help="A map made by `profile --levels`: a folder, or a Hub id.",
            metavar="NAME",
            show_default="the model's own",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder of the fitted map.", metavar="FOLDER")
    ] = Path("fitted-map"),
    budget: Annotated[
        str, typer.Option(help="Average budget of the heads: 0.2 of the grid, or 115 tokens.", metavar="N")
    ] = "0.2",
    levels: Annotated[
        str | None,
        typer.Option(
            help="Slots to measure every head at, each a level of the map: 32,86,173.",
            metavar="N,N",
            show_default="all",
        ),
    ] = None,
    resume: Resume = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.", metavar="N")] = 4,
    model: ModelName = BUNDLED,
    grid: Grid = None,
    guidance: Guidance = None,
    temperature: OfDistribution = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Choose the slots of each head by how much the head matters to the model.

    Generates an image of each prompt with a full cache. Then it compresses one
    head at a time, to every level, and measures with the same tokens how far the
    model's output moves. This takes one pass over the images for each head and
    level, so use a few prompts. You can stop it at any point: the same command
    resumes it.
    """
    texts = read_prompts(prompts or [], prompts_file)
    check_place("--output", output, is_folder=True)
    state = StateFile(resume, output)
    amount = parse_budget(budget)
    if batch_size < 1:
        raise WrongUse(f"--batch-size {batch_size}: give a whole number from 1 up")
    with refusing():
        check_settings(guidance, temperature, seed)
        checkpoint = find_model(model, grid)
        profiled = checkpoint.head_map(head_map)
        if profiled is None:
            raise WrongUse(
                f"{checkpoint.name} has no head map in its folder: give --head-map, as `profile --levels` makes it"
            )
        checkpoint.check_head_map(profiled)
        known = measured_levels(profiled)
        chosen = None if levels is None else [_level(text, known) for text in levels.split(",")]
        check_fitting(profiled, amount, chosen)
        generator = load_generator(checkpoint, dtype, device)

    def measure(state_file: Path) -> HeadMap:
        return measure_divergence(
            generator,
            texts,
            profiled,
            levels=chosen,
            batch_size=batch_size,
            seed=seed,
            guidance_scale=guidance,
            temperature=temperature,
            state_file=state_file,
        )

    fitted = fit_heads(state.run(measure), amount)
    try:
        folder = fitted.save_pretrained(output)
    except ValueError as error:  # a full disk
        raise Failure(str(error)) from error
    Console(highlight=False, markup=False).print(f"{fitted!r}\nwrote {folder}", soft_wrap=True)


def _level(text: str, known: list[int]) -> int:
    if not text.strip().isdecimal() or int(text) not in known:
        raise WrongUse(
            f"--levels {text.strip()}: the map was measured at {', '.join(map(str, known))} slots; give these"
        )
    return int(text)
