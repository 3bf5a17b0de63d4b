"""`ssd-cache inspect`: print a head map and its default settings as a table.

It only shows an existing map. `profile` makes maps, and `analyze` measures heads.
"""

from __future__ import annotations

import warnings
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
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import BUNDLED, BUNDLED_MODELS, find_head_map


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            help=f"Folder or Hub id of a head map, or a model with a map: its folder, {' or '.join(BUNDLED_MODELS)}."
        ),
    ] = BUNDLED,
) -> None:
    """Print a head map: its origin, its default settings, and every head's kind and slots."""
    with refusing():
        head_map = find_head_map(source)
    statistics = head_scores(head_map)
    for name, value in (_facts(head_map, statistics) | _use(head_map)).items():
        if value is not None:
            typer.echo(f"{name:<11}{value}")
    console, (table, caption) = Console(), _layers(head_map, statistics)
    # with many heads, print longer lines instead of folded ones
    width = console.measure(table, options=console.options.update(width=10_000)).maximum
    Console(highlight=False, markup=False, width=max(console.width, width)).print(table)
    typer.echo(caption)


def _facts(head_map: HeadMap, statistics: HeadScores) -> dict[str, str | None]:
    """What the map is, and how it was made."""
    num_heads, num_spatial = head_map.is_spatial.numel(), int(head_map.is_spatial.sum())
    cut = "" if statistics.threshold is None else f", spatial above {statistics.threshold:g}"
    return {
        "from": head_map.origin,
        "model": head_map.model_id,
        "revision": head_map.revision,
        "model type": head_map.model_type,
        "grid": f"{head_map.layout.text()} visual tokens",
        "method": head_map.method,
        "labels by": None if statistics.name is None else statistics.name.replace("_", " ") + cut,
        "statistics": ", ".join(head_map.scores) or None,
        "digest": head_map.digest,
        "heads": f"{head_map.num_layers} layers x {head_map.num_kv_heads} KV heads: {num_spatial} spatial, "
        f"{num_heads - num_spatial} semantic",
    }


def _use(head_map: HeadMap) -> dict[str, str]:
    """The settings that `SSDCache(head_map)` uses for this map, in words."""
    learned = head_map.ranking or "this map carries no learned score"
    score = f"{SCORES['sum' if head_map.learned is None else 'learned'].words} ({learned})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about short windows matter only for generation
            cache = SSDCache(head_map)
    except ValueError as error:
        return {"score": score, "by default": f"refused: {error}"}
    held = [slots for layer in cache.num_slots for slots in layer]
    share = f"{cache.mean_slots:.1f} a head on average, {cache.mean_slots / head_map.num_visual_tokens:.1%} of the grid"
    fitted = f"fitted, {min(held)} to {max(held)}; {share}"
    kept = f"num_recent {cache.num_recent:g}, num_sinks {cache.num_sinks}"
    return {
        "slots": fitted if cache.slots == "fitted" else f"none of its own; {share} unless a budget is given",
        "score": score,
        "by default": f"policy {policy_label(*own_policy(head_map))}, buffer {cache.buffer}, {kept}",
    }


def _layers(head_map: HeadMap, statistics: HeadScores) -> tuple[Table, str]:
    """Table of every layer's labels, slots and statistic, and a caption that explains the symbols."""
    table, caption = Table(box=box.SIMPLE_HEAD, pad_edge=False), "# spatial, . semantic"
    columns = {"layer": [str(index) for index in range(head_map.num_layers)]}
    columns["KV heads"] = ["".join(".#"[label] for label in labels) for labels in head_map.is_spatial.tolist()]
    if head_map.slots is not None:
        width = max(len(str(number)) for layer in head_map.slots for number in layer)
        columns["slots"] = [" ".join(f"{number:>{width}}" for number in layer) for layer in head_map.slots]
        caption += "; slots of each head"
    if (values := statistics.values) is not None:
        name = (statistics.name or "").replace("_", " ")
        columns[name] = [f"{min(row):+.3f} to {max(row):+.3f}" for row in values.tolist()]
    for title in columns:
        table.add_column(title, justify="right" if title == "layer" else "left")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table, caption
