"""`ssd-cache generate`: generate images of prompts, and print a table of memory and speed.

Holds the options and the order of work. All checks run before weights are loaded.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import safetensors.torch
import typer
from PIL import Image
from rich.console import Console

from ssd_cache.cache.policies import POLICIES
from ssd_cache.cache.quantized import KV_DTYPES
from ssd_cache.cli.draw import Drawing, draw
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import PICTURE_FORMATS, TOKENS, check_output, read_prompts, save_picture
from ssd_cache.cli.image_folder import Run, find_folders, generate_into
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import (
    MODEL,
    SAMPLING,
    Device,
    Dtype,
    Grid,
    Guidance,
    ModelName,
    Prompts,
    PromptsFile,
    Seed,
    Temperature,
)
from ssd_cache.cli.plan import choose_policies, described, make_caches, parse_budget
from ssd_cache.cli.report import process_peak, size, table
from ssd_cache.cli.sheet import Row, contact_sheet
from ssd_cache.decode.fast_decode import fast_decode
from ssd_cache.evaluation.runner import digest_of
from ssd_cache.io.writing import write_files
from ssd_cache.models import BUNDLED, Generator, Sampling, resolve_device, resolve_dtype
from ssd_cache.profiling.measuring import prompts_sha256
from ssd_cache.runs.batching import MAX_IMAGES, default_batch_size, image_nbytes
from ssd_cache.runs.processes import Processes

CACHE = "Cache"
MAX_COLUMNS = 8
"""Maximum number of images side by side on a contact sheet."""


def generate(
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    num_images: Annotated[int, typer.Option(help="Images of each prompt.", metavar="N")] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Image or contact sheet: .png, .jpg, .webp; or visual tokens: .safetensors.",
            metavar="FILE",
            show_default="picture.png",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --output: a folder for one file per image. A second call generates the missing images.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Use every policy with the same seeds, in one row or folder each.")
    ] = False,
    model: ModelName = BUNDLED,
    grid: Grid = None,
    head_map: Annotated[
        str | None,
        typer.Option(
            help="A folder, a Hub id, or online to label heads during generation.",
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
            help=f"Cache policy: {', '.join(POLICIES)}.",
            metavar="NAME",
            show_default="the head map's own settings",
            rich_help_panel=CACHE,
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
            help="Eviction interval: visual tokens evicted at once.",
            metavar="N",
            show_default="a row of the grid; learned: a third",
            rich_help_panel=CACHE,
        ),
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            help="Slots of each head: fitted (scales the map's slots to --budget) or uniform (equal slots).",
            metavar="NAME",
            show_default="fitted where the map has slots",
            rich_help_panel=CACHE,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Store visual tokens quantised: {' or '.join(KV_DTYPES)}.",
            metavar="NAME",
            show_default="the model's dtype",
            rich_help_panel=CACHE,
        ),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Compile the decode steps first: takes 5 to 20 seconds or more, pays off over many images.",
            rich_help_panel=CACHE,
        ),
    ] = False,
    guidance: Guidance = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Images at once.",
            metavar="N",
            show_default=f"{MAX_IMAGES}, or fewer if memory is short",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
) -> None:
    """Generate images of prompts with a cache of fixed size.

    Several images come as one contact sheet, or with --output-dir as one file
    each. The images of one batch share a seed: the same command gives the same
    images. Several processes share the batches under
    `accelerate launch --multi_gpu -m ssd_cache.cli generate ...`.
    """
    texts = [text for text in read_prompts(prompts or [], prompts_file) for _ in range(num_images)]
    if output is not None and output_dir is not None:
        raise WrongUse(f"--output {output} and --output-dir {output_dir}: give one of them")
    output = output or Path("picture.png")
    place = check_output(output, (*PICTURE_FORMATS, TOKENS)) if output_dir is None else output
    policies = choose_policies(policy, compare)
    amount = None if budget is None else parse_budget(budget)
    for name, number in (("--num-images", num_images), ("--batch-size", batch_size)):
        if number is not None and number < 1:
            raise WrongUse(f"{name} {number}: give a whole number from 1 up")
    with refusing():
        Sampling(guidance, temperature, seed)
        processes = Processes()
        where = resolve_device(processes.choose_device(device))
        kind = resolve_dtype(dtype, where)
        checkpoint = find_model(model, grid)
        if place.suffix.lower() != TOKENS:
            checkpoint.check_decodable()
        caches = make_caches(checkpoint, policies, head_map, amount, buffer, kv_dtype, slots)
        at_most = min(batch_size or MAX_IMAGES, len(texts))
        if processes.count > (num_batches := -(-len(texts) // at_most)):
            raise WrongUse(
                f"{processes.count} processes share the batches, and there are {num_batches}: give a smaller "
                f"--batch-size than {at_most}, or start fewer processes"
            )
        processes.check_agreement(
            {
                "model": checkpoint.name,
                "grid": checkpoint.grid,
                "prompts": prompts_sha256(texts),
                "dtype": kind,
                "guidance": guidance,
                "temperature": temperature,
                "seed": seed,
                "batch size": batch_size,
                **{
                    f"map, budget, buffer, kv_dtype of {name}": [
                        digest_of(cache.head_map),
                        cache.budget,
                        cache.num_slots,
                        cache.buffer,
                        cache.kv_dtype,
                    ]
                    for name, cache in caches.items()
                },
            }
        )
    if output_dir is not None:
        run = Run(checkpoint, kind, where, texts, num_images, guidance, temperature, seed, fast, processes)
        generate_into(find_folders(output_dir, list(caches), compare), caches, run, batch_size)
        return
    generator = load_generator(checkpoint, kind, where)
    largest = max(caches.values(), key=lambda cache: image_nbytes(generator, 0, cache))
    size_of_batch = batch_size or default_batch_size(generator, texts, cache=largest, processes=processes)

    with fast_decode(generator.model) if fast else nullcontext():
        drawings = [
            draw(
                generator,
                name,
                cache,
                texts,
                batch_size=size_of_batch,
                guidance_scale=guidance,
                temperature=temperature,
                seed=seed,
                processes=processes,
            )
            for name, cache in caches.items()
        ]
    if processes.is_main:
        measures = _save(generator, drawings, texts, num_images, place)
        console = Console(highlight=False, markup=False)
        shown = [generator.guidance_scale if guidance is None else guidance]
        shown.append(generator.temperature if temperature is None else temperature)
        shared = f", {processes.count} processes" if processes.count > 1 else ""
        conditions = (
            f"{checkpoint.name} on {where}{shared}, {str(kind).removeprefix('torch.')}, "
            f"{len(texts)} picture(s) a policy, batch {min(size_of_batch, len(texts))}, "
            f"guidance {shown[0]:g}, temperature {shown[1]:g}, seed {seed}{described(caches)}{process_peak()}"
        )
        console.print(table(drawings, conditions))
        console.print(f"wrote {output} ({measures})", soft_wrap=True)


def _save(generator: Generator, drawings: list[Drawing], captions: list[str], num_images: int, place: Path) -> str:
    """Write tokens or images, depending on the suffix of `place`; returns the size as text."""
    if place.suffix.lower() == TOKENS:
        write_files({place: safetensors.torch.save({drawing.policy: drawing.tokens for drawing in drawings})})
        return f"{' x '.join(map(str, drawings[0].tokens.shape))} tokens"
    picture = _sheet([(drawing, generator.to_images(drawing.tokens)) for drawing in drawings], captions, num_images)
    save_picture(picture, place)
    return f"{picture.width} x {picture.height}"


def _sheet(drawings: list[tuple[Drawing, list[Image.Image]]], captions: list[str], num_images: int) -> Image.Image:
    """The image itself if there is only one, else a contact sheet with one row a policy."""
    compare = len(drawings) > 1
    if len(captions) == 1 and not compare:
        return drawings[0][1][0]
    if compare:
        rows = [
            Row(
                images,
                drawing.policy,
                (
                    f"{size(drawing.memory.key_value)} of K and V",
                    f"{drawing.memory.full_cache / drawing.memory.key_value:.1f}x less"
                    if drawing.policy != "full"
                    else "every token",
                    f"{drawing.tokens_per_second:.0f} tokens/s",
                ),
            )
            for drawing, images in drawings
        ]
    else:
        rows = [Row(drawings[0][1])]
    if num_images == 1 and not compare:
        columns = min(MAX_COLUMNS, max(2, round(len(captions) ** 0.5)))
    else:
        columns = max(1, MAX_COLUMNS // num_images) * num_images if compare else num_images
    return contact_sheet(rows, captions, min(columns, MAX_COLUMNS))
