"""`ssd-cache generate`: generate images of prompts, into one file or a folder.

Holds the options and their checks, which run before weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssd_cache.cache.policies import POLICIES
from ssd_cache.cli import options
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import IMAGE_FORMATS, TOKENS, check_output, read_prompts
from ssd_cache.cli.image_file import generate_file
from ssd_cache.cli.image_folder import generate_folder
from ssd_cache.cli.loading import find_model
from ssd_cache.cli.options import CACHE, MODEL, SAMPLING, option, output_option
from ssd_cache.cli.plan import Job, choose_policies, make_caches, parse_budget
from ssd_cache.kernels.eight_bits import KV_DTYPES
from ssd_cache.models import BUNDLED, resolve_device, resolve_dtype
from ssd_cache.runs.batching import MAX_IMAGES
from ssd_cache.runs.processes import Processes


def generate(
    prompts: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    num_images: Annotated[int, option("Images of each prompt.", "N", least=1)] = 1,
    output: Annotated[
        Path | None,
        output_option(
            "Image or contact sheet: .png, .jpg, .webp; or visual tokens: .safetensors.", "FILE", default="picture.png"
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        option(
            "Instead of --output: a folder for one file per image. A second call generates the missing images.",
            "FOLDER",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Use every policy with the same seeds, in one row or folder each.")
    ] = False,
    model: options.ModelName = BUNDLED,
    grid: options.Grid = None,
    head_map: Annotated[
        str | None,
        option(
            "A folder, a Hub id, or online to use no labels.",
            "NAME",
            MODEL,
            default="in the model's folder",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    policy: Annotated[
        str | None,
        option(f"Cache policy: {', '.join(POLICIES)}.", "NAME", CACHE, default="the head map's own settings"),
    ] = None,
    budget: options.Budget = None,
    buffer: options.Buffer = None,
    slots: Annotated[
        str | None,
        option(
            "Slots of each head: fitted (scales the map's slots to --budget) or uniform (equal slots).",
            "NAME",
            CACHE,
            default="fitted where the map has slots",
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        option(f"Store visual tokens quantised: {' or '.join(KV_DTYPES)}.", "NAME", CACHE, default="the model's dtype"),
    ] = None,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Compile the decode steps first: takes 5 to 20 seconds or more, pays off over many images.",
            rich_help_panel=CACHE,
        ),
    ] = False,
    guidance: options.Guidance = None,
    temperature: options.Temperature = None,
    seed: options.Seed = 0,
    batch_size: Annotated[
        int | None,
        option("Images at once.", "N", SAMPLING, default=f"{MAX_IMAGES}, or fewer if memory is short", least=1),
    ] = None,
) -> None:
    """Generate images of prompts with a cache of fixed size.

    Several images come as one contact sheet, or with --output-dir as one file
    each. The images of one batch share a seed: the same command gives the same
    images. Several processes share the images of a folder under
    `accelerate launch --multi_gpu -m ssd_cache.cli generate ...`.
    """
    texts = [text for text in read_prompts(prompts, prompts_file) for _ in range(num_images)]
    if output is not None and output_dir is not None:
        raise WrongUse(f"--output {output} and --output-dir {output_dir}: give one of them")
    place = output_dir or check_output(output or Path("picture.png"), (*IMAGE_FORMATS, TOKENS))
    policies = choose_policies(policy, compare, slots)
    amount = None if budget is None else parse_budget(budget)
    with refusing():
        processes = Processes()
        if processes.count > 1 and output_dir is None:
            raise WrongUse("several processes can only share the images of a folder: give --output-dir")
        where = resolve_device(processes.choose_device(device))
        kind = resolve_dtype(dtype, where)
        checkpoint = find_model(model, grid)
        checkpoint.check_captions(texts)
        sampling = checkpoint.sampling(guidance, temperature, seed)
        if output_dir is not None or place.suffix.lower() != TOKENS:
            checkpoint.check_decodable()
        caches = make_caches(checkpoint, policies, head_map, amount, buffer, kv_dtype)
    job = Job(checkpoint, kind, where, texts, num_images, caches, sampling, batch_size, fast, processes)
    if output_dir is None:
        generate_file(job, place)
    else:
        generate_folder(job, output_dir)
