"""`ssd-cache generate`: prompts in, pictures and a table of what they cost out.

Options and the order of work: everything that can be refused is refused before weights are loaded.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.cache import POLICIES
from ssd_cache.cli.draw import Drawing, draw
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import check_output, read_prompts, save_picture
from ssd_cache.cli.loading import load_generator
from ssd_cache.cli.options import (
    MODEL,
    SAMPLING,
    Device,
    Dtype,
    Guidance,
    ModelName,
    Prompts,
    PromptsFile,
    Seed,
    Temperature,
)
from ssd_cache.cli.plan import choose_policies, make_caches, parse_budget
from ssd_cache.cli.report import process_peak, size, table
from ssd_cache.cli.sheet import Row, contact_sheet
from ssd_cache.fast_decode import fast_decode
from ssd_cache.models import (
    BUNDLED,
    check_drawing,
    find_generator,
    resolve_device,
    resolve_dtype,
)

CACHE = "Cache"
MAX_COLUMNS = 8
"""Pictures side by side on a contact sheet."""


def generate(
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.", metavar="N")] = 1,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The picture, or the contact sheet: .png, .jpg, .webp.", metavar="FILE"),
    ] = Path("picture.png"),
    compare: Annotated[
        bool, typer.Option("--compare", help="Draw with every policy on the same seeds, one row each.")
    ] = False,
    model: ModelName = BUNDLED,
    head_map: Annotated[
        str | None,
        typer.Option(
            help="A folder, a Hub id, or online: heads are labelled while drawing.",
            metavar="NAME",
            show_default="in the model's folder",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    policy: Annotated[
        str | None,
        typer.Option(
            help=f"What is kept: {', '.join(POLICIES)}.", metavar="NAME", show_default="ssd", rich_help_panel=CACHE
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Visual tokens a head may hold: a fraction of the grid, or a count (115).",
            metavar="X",
            show_default="what the head map was fitted to, or 0.2",
            rich_help_panel=CACHE,
        ),
    ] = None,
    buffer: Annotated[
        int | None,
        typer.Option(
            help="Visual tokens evicted at once.", metavar="N", show_default="a row of the grid", rich_help_panel=CACHE
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Compile the steps first: half a minute or more, which many pictures win back.",
            rich_help_panel=CACHE,
        ),
    ] = False,
    guidance: Guidance = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Pictures drawn at once.", metavar="N", show_default="all", rich_help_panel=SAMPLING),
    ] = None,
) -> None:
    """Draw pictures of prompts with a cache of fixed size.

    Several pictures come as one contact sheet. The pictures of one batch share a
    seed: the same command gives the same pictures.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WrongUse(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: generate makes one file in one process; for many pictures by "
            "several processes there is examples/several_gpus.py"
        )
    texts = read_prompts(prompts or [], prompts_file)
    place = check_output(output)
    policies = choose_policies(policy, compare)
    amount = None if budget is None else parse_budget(budget)
    for name, number in (("--num-images", num_images), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise WrongUse(f"{name} {number}: give a whole number from 1 up")
    with refusing():
        check_drawing(guidance, temperature, seed)
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        checkpoint = find_generator(model)
        caches = make_caches(checkpoint, policies, head_map, amount, buffer)
    generator = load_generator(checkpoint, kind, where)

    repeated = [text for text in texts for _ in range(num_images)]
    with fast_decode(generator.model) if fast else nullcontext():
        drawings = [
            draw(
                generator,
                name,
                cache,
                repeated,
                batch_size=batch_size or len(repeated),
                guidance_scale=guidance,
                temperature=temperature,
                seed=seed,
            )
            for name, cache in caches.items()
        ]
    picture = _sheet(drawings, repeated, num_images, compare)
    save_picture(picture, place)

    console = Console(highlight=False, markup=False)
    shown = [generator.guidance_scale if guidance is None else guidance]
    shown.append(generator.temperature if temperature is None else temperature)
    conditions = (
        f"{checkpoint.name} on {where}, {str(kind).removeprefix('torch.')}, {len(repeated)} picture(s) a policy, "
        f"batch {min(batch_size or len(repeated), len(repeated))}, guidance {shown[0]:g}, temperature {shown[1]:g}, "
        f"seed {seed}{process_peak()}"
    )
    console.print(table(drawings, conditions))
    console.print(f"wrote {output} ({picture.width} x {picture.height})", soft_wrap=True)


def _sheet(drawings: list[Drawing], captions: list[str], num_images: int, compare: bool):
    """The picture itself when there is but one, else a contact sheet."""
    if len(captions) == 1 and not compare:
        return drawings[0].images[0]
    if compare:
        rows = [
            Row(
                drawing.images,
                drawing.policy,
                (
                    f"{size(drawing.memory.key_value)} of K and V",
                    f"{drawing.memory.full_cache / drawing.memory.key_value:.1f}x less"
                    if drawing.policy != "full"
                    else "every token",
                    f"{drawing.tokens_per_second:.0f} tokens/s",
                ),
            )
            for drawing in drawings
        ]
    else:
        rows = [Row(drawings[0].images)]
    if num_images == 1 and not compare:
        columns = min(MAX_COLUMNS, max(2, round(len(captions) ** 0.5)))
    else:
        columns = max(1, MAX_COLUMNS // num_images) * num_images if compare else num_images
    return contact_sheet(rows, captions, min(columns, MAX_COLUMNS))
