"""`ssd-cache inspect`: what a head map says, as a table.

It reads a map and prints it; making maps is `profile`'s work.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.head_map import HeadMap
from ssd_cache.models import BUNDLED, find_generator


def inspect(
    source: Annotated[
        str, typer.Argument(help=f"Folder or Hub id of a head map, a folder of a model with one, or {BUNDLED}.")
    ] = BUNDLED,
) -> None:
    """Print a head map: its origin and which heads of every layer are spatial."""
    with refusing():
        head_map = _find(source)
    console = Console(highlight=False, markup=False)
    num_spatial = int(head_map.is_spatial.sum())
    facts = {
        "from": head_map.origin,
        "model": head_map.model_id,
        "revision": head_map.revision,
        "model type": head_map.model_type,
        "grid": f"{head_map.grid[0]} x {head_map.grid[1]} visual tokens",
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
    layers = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="# spatial, . semantic", caption_justify="left")
    layers.add_column("layer", justify="right")
    layers.add_column("spatial", justify="right")
    layers.add_column("semantic", justify="right")
    layers.add_column("KV heads")
    for index, row in enumerate(head_map.is_spatial.tolist()):
        layers.add_row(str(index), str(sum(row)), str(len(row) - sum(row)), "".join(".#"[spatial] for spatial in row))
    console.print(layers)


def _find(source: str) -> HeadMap:
    """The map itself, or the one that a model carries."""
    folder = Path(source).expanduser()
    if source != BUNDLED and not (folder / "head_map").is_dir():
        return HeadMap.from_pretrained(source)
    head_map = find_generator(source).head_map()
    if head_map is None:
        raise WrongUse(f"{source} has no head map in its folder")
    return head_map
