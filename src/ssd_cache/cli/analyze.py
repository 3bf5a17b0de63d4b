"""`ssd-cache analyze`: show where a model's heads attend and which tokens they hold, as an HTML page and JSON.

Options only. Measuring and plotting are in `ssd_cache.analysis`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.analysis.report import write_report
from ssd_cache.analysis.study import NUM_IMAGES, plan_analysis, run_plan
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import check_place, check_plotting, read_prompts
from ssd_cache.cli.loading import find_labels, find_model, load_generator
from ssd_cache.cli.options import SAMPLING, Device, Dtype, Grid, Guidance, HeadMapName, ModelName, Temperature
from ssd_cache.cli.plan import ONLINE, parse_budget
from ssd_cache.models import BUNDLED, resolve_device, resolve_dtype

PROMPT = "a photo of a red circle and a blue square"

Number = partial(typer.Option, metavar="N", rich_help_panel="Measuring")


def analyze(
    prompt: Annotated[str, typer.Argument(help="Prompt of the images.", metavar="PROMPT")] = PROMPT,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for report.html and report.json.", metavar="FOLDER")
    ] = Path("analysis"),
    model: ModelName = BUNDLED,
    grid: Grid = None,
    head_map: HeadMapName = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    layer: Annotated[
        int | None, Number(help="With --head: the head to show, from 0.", show_default="the clearest of each kind")
    ] = None,
    head: Annotated[int | None, Number(help="With --layer: this head replaces the default of its kind.")] = None,
    budget: Annotated[
        str | None,
        Number(
            help="Visual tokens a head may hold: a fraction of the grid, or a count (115).",
            metavar="X",
            show_default="what the head map was fitted to, or 0.2",
        ),
    ] = None,
    buffer: Annotated[
        int | None,
        Number(
            help="Eviction interval: visual tokens evicted at once.",
            show_default="a row of the grid; with a learned score a third",
        ),
    ] = None,
    step: Annotated[
        int | None,
        Number(help="Visual tokens seen when the tokens that heads hold are read.", show_default="3/4 of the grid"),
    ] = None,
    num_images: Annotated[int, Number(help="Images at once; the margin test needs several.")] = NUM_IMAGES,
    guidance: Guidance = None,
    temperature: Temperature = None,
    seed: Annotated[int, typer.Option(help="Seed of the images.", metavar="N", rich_help_panel=SAMPLING)] = 0,
) -> None:
    """Measure where a model's heads attend, what they hold, and where K and V carry the prompt.

    Generates the prompt with a full cache, with the head map's own settings, and
    under H2O and StreamingLLM. Writes one HTML page with all figures, and their
    data as JSON.
    """
    [text] = read_prompts([prompt], None)
    check_place("--output", output, is_folder=True)
    amount = None if budget is None else parse_budget(budget)
    if head_map == ONLINE:
        raise WrongUse(f"--head-map {ONLINE} has no labels to analyze: give a map, or make one with profile")
    if (layer is None) != (head is None):
        raise WrongUse("--layer and --head name one head together: give both or neither")
    shown = None if layer is None or head is None else (layer, head)
    check_plotting()
    with refusing():
        place = resolve_device(device)
        kind = resolve_dtype(dtype, place)
        checkpoint = find_model(model, grid)
        sampling = checkpoint.sampling(guidance, temperature, seed)
        labels = find_labels(checkpoint, head_map)
        plan = plan_analysis(checkpoint, labels, sampling, amount, buffer, step, shown, num_images)
    generator = load_generator(checkpoint, kind, place)
    analysis = run_plan(generator, text, plan)
    page, numbers = write_report(analysis, output)
    Console(highlight=False, markup=False).print(
        f"{analysis.concentration.sentence(checkpoint.name)}\nwrote {page} and {numbers.name}", soft_wrap=True
    )
