"""`ssd-cache inspect`: print a head map and its default settings as a table, or save it as an image.

It only shows an existing map. `profile` makes maps, and `analyze` measures heads.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ssd_cache.analysis.scores import HeadScores, head_scores
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.policies import own_policy, policy_label
from ssd_cache.cache.scorers import SCORES
from ssd_cache.cli.errors import refusing
from ssd_cache.cli.files import check_output, save_picture
from ssd_cache.head_map.card import picture
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import BUNDLED, find_head_map


def inspect(
    source: Annotated[
        str, typer.Argument(help=f"Folder or Hub id of a head map, folder of a model with a map, or {BUNDLED}.")
    ] = BUNDLED,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also save the map as an image: .png, .jpg, .webp.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print a head map: its origin, its default settings, and every head's kind and
    slots.
    """
    place = None if output is None else check_output(output)
    with refusing():
        head_map = find_head_map(source)
    console = Console(highlight=False, markup=False)
    scores = head_scores(head_map)
    num_spatial = int(head_map.is_spatial.sum())
    facts = {
        "from": head_map.origin,
        "model": head_map.model_id,
        "revision": head_map.revision,
        "model type": head_map.model_type,
        "grid": f"{head_map.layout.text()} visual tokens",
        "method": head_map.method,
        "threshold": None if head_map.threshold is None else f"{head_map.threshold:g}",
        "labels by": _words(scores),
        "statistics": ", ".join(name for name in scores.all if name in head_map.scores) or None,
        "digest": head_map.digest,
        "heads": f"{head_map.num_layers} layers x {head_map.num_kv_heads} KV heads: {num_spatial} spatial, "
        f"{head_map.is_spatial.numel() - num_spatial} semantic",
        **_use(head_map),
    }
    for name, value in facts.items():
        if value is not None:
            console.print(f"{name:<11}{value}", soft_wrap=True)
    layers, caption = _layers(head_map, scores)
    wide = max(
        console.width, console.measure(layers, options=console.options.update(width=10_000)).maximum
    )  # with many heads, print longer lines instead of folded ones
    Console(highlight=False, markup=False, width=wide).print(layers)
    console.print(caption, soft_wrap=True)
    if place is not None:
        image = picture(head_map)
        save_picture(image, place)
        console.print(f"wrote {output} ({image.width} x {image.height})", soft_wrap=True)


def _words(scores: HeadScores) -> str | None:
    """The statistic that the labels are based on, in words."""
    if scores.name is None:
        return None
    from_ = "" if scores.threshold is None else f", spatial above {scores.threshold:g}"
    return scores.name.replace("_", " ") + from_


def _use(head_map: HeadMap) -> dict[str, str]:
    """The settings that `SSDCache(head_map)` uses for this map, in words."""
    name, settings = own_policy(head_map)
    learned = "carried by this map" if head_map.learned is not None else "this map carries no learned score"
    found = {"score": f"{SCORES['sum' if head_map.learned is None else 'learned']} ({learned})"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about short windows matter only for generation
            cache = SSDCache(head_map)
    except ValueError as error:
        return {**found, "by default": f"refused: {error}"}
    held = [slots for layer in cache.num_slots for slots in layer]
    share = f"{cache.mean_slots:.1f} a head on average, {cache.mean_slots / head_map.num_visual_tokens:.1%} of the grid"
    own = f"fitted, {min(held)} to {max(held)}; {share}"
    kept = f"num_recent {cache.num_recent:g}, num_sinks {cache.num_sinks}"
    return {
        "slots": own if cache.slots == "fitted" else f"none of its own; {share} unless a budget is given",
        **found,
        "by default": f"policy {policy_label(name, settings)}, buffer {cache.buffer}, {kept}",
    }


def _layers(head_map: HeadMap, scores: HeadScores) -> tuple[Table, str]:
    """Table of every layer's labels, slots and statistic, and a caption that explains the symbols."""
    caption = "# spatial, . semantic"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("layer", "spatial", "semantic"):
        table.add_column(title, justify="right")
    table.add_column("KV heads")
    columns = []
    if head_map.slots is not None:
        table.add_column("slots")
        width = max(len(str(number)) for layer in head_map.slots for number in layer)
        columns.append([" ".join(f"{number:>{width}}" for number in layer) for layer in head_map.slots])
        caption += "; slots of each head"
    if scores.values is not None:
        table.add_column((scores.name or "").replace("_", " "))
        if scores.values.min() >= 0 and scores.values.max() <= 1:
            columns.append(["".join(map(str, row)) for row in (scores.values * 10).int().clamp(max=9).tolist()])
            caption += "; the statistic of each head in tenths"
        else:
            columns.append([f"{min(row):+.3f} to {max(row):+.3f}" for row in scores.values.tolist()])
    for index, row in enumerate(head_map.is_spatial.tolist()):
        kinds = "".join(".#"[spatial] for spatial in row)
        counts = str(sum(row)), str(len(row) - sum(row))
        table.add_row(str(index), *counts, kinds, *(column[index] for column in columns))
    return table, caption
