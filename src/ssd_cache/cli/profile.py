"""`ssd-cache profile`: label the heads of a model from pictures it draws with a full cache, and save the map.

Options only; the watching and labelling is `ssd_cache.profiling`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import read_prompts
from ssd_cache.models import BUNDLED, check_drawing, find_generator
from ssd_cache.profiling import THRESHOLD, check_profiling, profile_heads


def profile(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to draw; several prompts as several arguments.", metavar="PROMPT", show_default=False
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Further prompts, one a line.", metavar="FILE", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the map.", metavar="FOLDER")] = Path(
        "head-map"
    ),
    model: Annotated[
        str, typer.Option(help=f"{BUNDLED} (comes with the package), a folder, or a Hub id.", metavar="NAME")
    ] = BUNDLED,
    window: Annotated[
        int | None,
        typer.Option(help="Visual tokens that count as near.", metavar="N", show_default="a row of the grid and one"),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Share of attention in the window from which a head is spatial.", metavar="X")
    ] = THRESHOLD,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at once.", metavar="N")] = 4,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, above 1.", metavar="X", show_default="the model's own")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token.", metavar="X", show_default="the model's own"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first batch; the next batch adds 1.", metavar="N")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.", metavar="NAME")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ..., or auto.", metavar="NAME")] = "auto",
) -> None:
    """Label the heads of a model as spatial or semantic, and save the head map.

    A picture of each prompt is drawn with a full cache, and each head's share of
    attention on its nearest visual tokens is held against the threshold.
    """
    texts = read_prompts(prompts or [], prompts_file)
    if output.exists() and not output.is_dir():
        raise WrongUse(f"--output {output} is a file; give a folder")
    with refusing():
        check_drawing(guidance, temperature, seed)
        checkpoint = find_generator(model)
        check_profiling(checkpoint.grid, window, threshold, batch_size)
        generator = checkpoint.load(dtype, device)
    head_map = profile_heads(
        generator,
        texts,
        window=window,
        threshold=threshold,
        batch_size=batch_size,
        guidance_scale=guidance,
        temperature=temperature,
        seed=seed,
    )
    folder = head_map.save_pretrained(output)
    Console(highlight=False, markup=False).print(f"{head_map!r}\nwrote {folder}", soft_wrap=True)
