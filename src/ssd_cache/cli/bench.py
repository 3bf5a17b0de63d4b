"""`ssd-cache bench`: the policies side by side on a decoder with random weights, as a table of speed and bytes.

Options and a table; what is timed is in `ssd_cache.bench`.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ssd_cache.bench import SHAPES, Case, Measurement, default_cases, measure, random_janus
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.options import Device, Dtype
from ssd_cache.cli.report import size
from ssd_cache.head_map import HeadMap
from ssd_cache.models import BUNDLED, find_generator, resolve_device, resolve_dtype

RIVALS = ("DynamicCache", "StaticCache")
"""transformers' full caches, which speeds are compared with."""


def bench(
    model: Annotated[
        str,
        typer.Option(help=f"A shape with random weights ({', '.join(SHAPES)}), or {BUNDLED}.", metavar="NAME"),
    ] = "small-cpu",
    batch_size: Annotated[int, typer.Option(help="Pictures at once; guidance doubles the rows.", metavar="N")] = 8,
    rounds: Annotated[int, typer.Option(help="Counted rounds, after one to warm up.", metavar="N")] = 2,
    caches: Annotated[
        str | None,
        typer.Option(
            help="Rows of the table to measure, by name and separated by semicolons: DynamicCache;ssd 20%.",
            metavar="NAME;NAME",
            show_default="all",
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Measure speed and memory of cache policies side by side.

    Every policy draws the same number of whole pictures through transformers'
    own generate; half of a random model's heads, drawn at random, are spatial.
    """
    if batch_size < 1 or rounds < 1:
        raise WrongUse("--batch-size and --rounds: give whole numbers from 1 up")
    with refusing():
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        if model in SHAPES:
            network = random_janus(**SHAPES[model], dtype=kind).to(where)
            config = network.config.text_config
            generator = torch.Generator().manual_seed(0)
            labels = torch.rand(config.num_hidden_layers, config.num_key_value_heads, generator=generator) < 0.5
            head_map: HeadMap | None = HeadMap(labels)
        else:
            checkpoint = find_generator(model)
            network, head_map = checkpoint.load(kind, where).model, checkpoint.head_map()
    if head_map is None:
        raise WrongUse(f"--model {model} has no head map in its folder")
    console = Console(highlight=False, markup=False)
    results: list[Measurement]
    cases = _choose(default_cases(network, head_map), caches)
    *_, results = measure(network, cases, batch_size=batch_size, rounds=rounds, progress=True)
    report = Table(
        box=box.SIMPLE_HEAD,
        caption=f"{model}, {batch_size} pictures of {head_map.num_visual_tokens} tokens with guidance, {kind} on "
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {rounds} rounds",
        caption_justify="left",
    )
    for title in ("cache", "tokens/s", "against Dynamic", "against Static", "K and V"):
        report.add_column(title, justify="left" if title == "cache" else "right")
    speeds = {result.name: result.tokens_per_second for result in results}
    for result in results:
        speed = speeds[result.name]
        ratios = [f"{speed / speeds[rival]:.2f}x" if rival in speeds else "-" for rival in RIVALS]
        report.add_row(result.name, f"{speed:.0f}", *ratios, size(result.nbytes))
    console.print(report)


def _choose(cases: list[Case], names: str | None) -> list[Case]:
    """The cases of these names, in the order of the table; all when none are given."""
    if names is None:
        return cases
    wanted = [name.strip() for name in names.split(";")]
    known = {case.name for case in cases}
    if unknown := [name for name in wanted if name not in known]:
        raise WrongUse(f"--caches {unknown[0]}: give names of {'; '.join(case.name for case in cases)}")
    return [case for case in cases if case.name in wanted]
