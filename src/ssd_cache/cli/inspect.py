"""`ssd-cache inspect`: what a head map says, as a table, and as a picture.

It reads a map and shows it; making maps is `profile`'s work, and measuring heads `analyze`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ssd_cache.analysis.scores import head_scores
from ssd_cache.cli.errors import refusing
from ssd_cache.cli.files import check_output, save_picture
from ssd_cache.head_map_card import picture
from ssd_cache.models import BUNDLED
from ssd_cache.models.base import find_head_map
from ssd_cache.rasters import format_rasters


def inspect(
    source: Annotated[
        str, typer.Argument(help=f"Folder or Hub id of a head map, a folder of a model with one, or {BUNDLED}.")
    ] = BUNDLED,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Draw the map too: .png, .jpg, .webp.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print a head map: its origin and which heads of every layer are spatial."""
    place = None if output is None else check_output(output)
    with refusing():
        head_map = find_head_map(source)
    console = Console(highlight=False, markup=False)
    num_spatial = int(head_map.is_spatial.sum())
    facts = {
        "from": head_map.origin,
        "model": head_map.model_id,
        "revision": head_map.revision,
        "model type": head_map.model_type,
        "grid": f"{format_rasters(head_map.previews, head_map.grid, ' x ')} visual tokens",
        "method": head_map.method,
        "threshold": None if head_map.threshold is None else f"{head_map.threshold:g}",
        "scores": ", ".join(head_map.scores) or None,
        "digest": head_map.digest,
        "heads": f"{head_map.num_layers} layers x {head_map.num_kv_heads} KV heads: {num_spatial} spatial, "
        f"{head_map.is_spatial.numel() - num_spatial} semantic",
    }
    for name, value in facts.items():
        if value is not None:
            console.print(f"{name:<11}{value}", soft_wrap=True)
    scores = head_scores(head_map)
    caption, shown = "# spatial, . semantic", [""] * head_map.num_layers
    layers = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("layer", "spatial", "semantic"):
        layers.add_column(title, justify="right")
    layers.add_column("KV heads")
    if scores.values is not None:
        layers.add_column((scores.name or "").replace("_", " "))
        if scores.values.min() >= 0 and scores.values.max() <= 1:
            shown = ["".join(map(str, row)) for row in (scores.values * 10).int().clamp(max=9).tolist()]
            caption += "; the score of each head in tenths"
        else:
            shown = [f"{min(row):.3f} to {max(row):.3f}" for row in scores.values.tolist()]
    for index, row in enumerate(head_map.is_spatial.tolist()):
        kinds = "".join(".#"[spatial] for spatial in row)
        layers.add_row(str(index), str(sum(row)), str(len(row) - sum(row)), kinds, shown[index])
    console.print(layers, caption, sep="", soft_wrap=True)
    if place is not None:
        image = picture(head_map)
        save_picture(image, place)
        console.print(f"wrote {output} ({image.width} x {image.height})", soft_wrap=True)
