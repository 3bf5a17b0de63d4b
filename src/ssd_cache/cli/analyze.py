"""`ssd-cache analyze`: show where a model's heads attend and which tokens they hold, as an HTML page and JSON.

Options only. Measuring and plotting are in `ssd_cache.analysis`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.analysis.plan import NUM_IMAGES, plan_analysis
from ssd_cache.analysis.plotting import check_packages
from ssd_cache.analysis.report import report_paths, write_report
from ssd_cache.analysis.study import run_plan
from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.files import check_writable, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import MODEL, SAMPLING, Device, Dtype, Grid, Guidance, ModelName, Temperature
from ssd_cache.cli.plan import ONLINE, parse_budget
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import BUNDLED, Checkpoint, Sampling, resolve_device, resolve_dtype

PROMPT = "a photo of a red circle and a blue square"
MEASURING = "Measuring"


def analyze(
    prompt: Annotated[str, typer.Argument(help="Prompt of the images.", metavar="PROMPT")] = PROMPT,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A folder for report.html and report.json, or the name of the page, ending in .html.",
            metavar="PLACE",
        ),
    ] = Path("analysis"),
    model: ModelName = BUNDLED,
    grid: Grid = None,
    head_map: Annotated[
        str | None,
        typer.Option(
            help="A folder or Hub id.", metavar="NAME", show_default="in the model's folder", rich_help_panel=MODEL
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    layer: Annotated[
        int | None,
        typer.Option(
            help="With --head: the head to show, from 0.",
            metavar="N",
            show_default="the clearest of each kind",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            help="With --layer: this head replaces the default of its kind.", metavar="N", rich_help_panel=MEASURING
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens a head may hold: a fraction of the grid, or a count (115).",
            metavar="X",
            show_default="what the head map was fitted to, or 0.2",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Slots of each head under the map's own policy: fitted (scales the map's slots) or uniform.",
            metavar="NAME",
            show_default="fitted where the map has slots",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option(
            help="Eviction interval: visual tokens evicted at once.",
            metavar="N",
            show_default="a row of the grid; with a learned score a third",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            help="Visual tokens seen when the tokens that heads hold are read.",
            metavar="N",
            show_default="3/4 of the grid",
            rich_help_panel=MEASURING,
        ),
    ] = None,
    num_images: Annotated[
        int,
        typer.Option(help="Images at once; the margin test needs several.", metavar="N", rich_help_panel=MEASURING),
    ] = NUM_IMAGES,
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
    _check_place(output)
    amount = None if budget is None else parse_budget(budget)
    if (layer is None) != (head is None):
        raise WrongUse("--layer and --head name one head together: give both or neither")
    try:
        check_packages()
    except ImportError as error:
        raise WrongUse(str(error)) from error
    with refusing():
        Sampling(guidance, temperature, seed)
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        checkpoint = find_model(model, grid)
        plan = plan_analysis(
            checkpoint,
            _head_map(checkpoint, head_map),
            budget=amount,
            slots=slots,
            buffer=buffer,
            step=step,
            head=None if layer is None or head is None else (layer, head),
            num_images=num_images,
        )
    generator = load_generator(checkpoint, kind, where)
    try:
        analysis = run_plan(generator, text, plan, guidance_scale=guidance, temperature=temperature, seed=seed)
    except ValueError as error:  # NaN, or a prompt that does not fit: the message names the remedy
        raise Failure(str(error)) from error
    page, numbers = write_report(analysis, output)
    Console(highlight=False, markup=False).print(
        f"{analysis.concentration.sentence(checkpoint.name)}\nwrote {page} and {numbers.name}", soft_wrap=True
    )


def _check_place(output: Path) -> None:
    """Raise WrongUse if `output` cannot be written."""
    page, numbers = report_paths(output)
    folder = page.parent
    for path in (page, numbers):
        if path.is_dir():
            raise WrongUse(f"--output {output}: {path} is a folder; give another name")
    if folder.exists() and not folder.is_dir():
        raise WrongUse(f"--output {output} is a file; give a folder, or a name that ends in .html")
    above = folder if folder.exists() or page.name != "report.html" else folder.parent
    if not above.is_dir():
        raise WrongUse(f"--output {output}: the folder {above} does not exist; make it first")
    check_writable("--output", output, above)


def _head_map(checkpoint: Checkpoint, name: str | None) -> HeadMap:
    if name == ONLINE:
        raise WrongUse(f"--head-map {ONLINE} has no labels to analyze: give a map, or make one with profile")
    head_map = checkpoint.head_map(name)
    if head_map is None:
        raise WrongUse(f"{checkpoint.name} has no head map in its folder: give --head-map, or make one with profile")
    return head_map
