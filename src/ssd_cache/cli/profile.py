"""`ssd-cache profile`: label a model's heads from images that it generates with a full cache, and save the map.

Options only. Recording and labelling are in `ssd_cache.profiling`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.files import check_place, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import Device, Dtype, Grid, Guidance, ModelName, Prompts, PromptsFile, Seed, Temperature
from ssd_cache.cli.plan import parse_budget
from ssd_cache.cli.resuming import Resume, StateFile
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import BUNDLED, Sampling
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.profiling.profiling import check_profiling, profile_heads
from ssd_cache.runs.processes import Processes


def profile(
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Output folder of the map.", metavar="FOLDER")] = Path(
        "head-map"
    ),
    model: ModelName = BUNDLED,
    grid: Grid = None,
    method: Annotated[
        str,
        typer.Option(
            help="coverage: the kind that retains more of a head's attention. window: attention on the newest tokens "
            "above a threshold.",
            metavar="NAME",
        ),
    ] = "coverage",
    budget: Annotated[
        str, typer.Option(help="Budget to make the map for: 0.2 of the grid, or 115 tokens.", metavar="N")
    ] = "0.2",
    levels: Annotated[
        str | None,
        typer.Option(
            help="Further budgets to measure, for choosing slots: 0.1,0.3,0.5. Fractions too small for --buffer and "
            "--num-recent are raised.",
            metavar="N,N",
            show_default=False,
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Choose the slots and the label of each head from the measurements of --levels."),
    ] = False,
    buffer: Annotated[
        int | None,
        typer.Option(help="Eviction interval: tokens evicted at once.", metavar="N", show_default="a row of the grid"),
    ] = None,
    num_recent: Annotated[
        str, typer.Option(help="Newest tokens that a semantic head keeps: tokens, or a fraction.", metavar="N")
    ] = "0.25",
    num_sinks: Annotated[int, typer.Option(help="First tokens that a spatial head keeps.", metavar="N")] = 0,
    window: Annotated[
        int | None,
        typer.Option(help="Visual tokens that count as near.", metavar="N", show_default="a row of the grid and one"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="With window: minimum share of attention of a spatial head.",
            metavar="X",
            show_default="chosen from the data",
        ),
    ] = None,
    resume: Resume = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images at once.", metavar="N", show_default="4, or fewer if memory is short"),
    ] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Label the heads of a model as spatial or semantic, and save the head map.

    Generates an image of each prompt with a full cache, and labels each head by
    where it attends. Several processes share the images under
    `accelerate launch --multi_gpu -m ssd_cache.cli profile ...`.
    You can stop it at any point: the same command resumes it, also with more
    prompts.
    """
    texts = read_prompts(prompts or [], prompts_file)
    if fit and not levels:
        raise WrongUse(
            "--fit shares slots out by what heads retain at several budgets: give --levels too (0.1,0.3,0.5)"
        )
    check_place("--output", output, is_folder=True)
    state = StateFile(resume, output)
    settings: dict[str, Any] = {
        "method": method,
        "budget": parse_budget(budget),
        "levels": [parse_budget(level, "--levels") for level in levels.split(",")] if levels else None,
        "buffer": buffer,
        "num_recent": parse_budget(num_recent, "--num-recent", least=0),
        "num_sinks": num_sinks,
        "window": window,
        "threshold": threshold,
        "batch_size": batch_size,
    }
    with refusing():
        Sampling(guidance, temperature, seed)
        checkpoint = find_model(model, grid)
        heads = (checkpoint.num_layers, checkpoint.num_kv_heads) if fit else None
        check_profiling(checkpoint.layout, fit=heads, **settings)
        processes = Processes()
        generator = load_generator(checkpoint, dtype, processes.choose_device(device))

    def measure(path: Path) -> HeadMap:
        return profile_heads(
            generator,
            texts,
            **settings,
            guidance_scale=guidance,
            temperature=temperature,
            seed=seed,
            state_file=path,
        )

    head_map = state.run(measure)
    try:
        head_map = fit_heads(head_map, settings["budget"]) if fit else head_map
        folder = head_map.save_pretrained(output) if processes.is_main else output
    except ValueError as error:  # a full disk
        raise Failure(str(error)) from error
    if processes.is_main:
        Console(highlight=False, markup=False).print(f"{head_map!r}\nwrote {folder}", soft_wrap=True)
