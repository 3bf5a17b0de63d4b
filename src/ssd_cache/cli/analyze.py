"""`ssd-cache analyze`: show where a model's heads attend and which tokens they hold, as an HTML page and JSON.

Options only. Measuring and plotting are in `ssd_cache.analysis`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.analysis.report import write_report
from ssd_cache.analysis.study import NUM_IMAGES, make_caches
from ssd_cache.analysis.study import analyze as measure
from ssd_cache.cli import options
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import check_place, check_plotting, read_prompts
from ssd_cache.cli.loading import find_labels, find_model, load_generator
from ssd_cache.cli.plan import ONLINE, parse_budget
from ssd_cache.models import BUNDLED, resolve_device, resolve_dtype

PROMPT = "a photo of a red circle and a blue square"


def analyze(
    prompt: Annotated[str, typer.Argument(help="Prompt of the images.", metavar="PROMPT")] = PROMPT,
    output: Annotated[Path, options.output_option("Folder for report.html and report.json.", "FOLDER")] = Path(
        "analysis"
    ),
    model: options.ModelName = BUNDLED,
    grid: options.Grid = None,
    head_map: options.HeadMapName = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    budget: options.Budget = None,
    buffer: options.Buffer = None,
    num_images: Annotated[
        int, options.option("Images at once; the margin test needs several.", "N", options.SAMPLING)
    ] = NUM_IMAGES,
    guidance: options.Guidance = None,
    temperature: options.Temperature = None,
    seed: options.Seed = 0,
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
    check_plotting()
    with refusing():
        place = resolve_device(device)
        kind = resolve_dtype(dtype, place)
        checkpoint = find_model(model, grid)
        checkpoint.sampling(guidance, temperature, seed)
        labels = find_labels(checkpoint, head_map)
        make_caches(checkpoint, labels, amount, buffer, num_images)
    analysis = measure(
        load_generator(checkpoint, kind, place),
        text,
        labels,
        budget=amount,
        buffer=buffer,
        num_images=num_images,
        guidance_scale=guidance,
        temperature=temperature,
        seed=seed,
    )
    page, numbers = write_report(analysis, output)
    Console(highlight=False, markup=False).print(
        f"{analysis.concentration.sentence(checkpoint.name)}\nwrote {page} and {numbers.name}", soft_wrap=True
    )
