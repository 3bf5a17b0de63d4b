"""Shared code of `eval geneval export` and `eval dpg export`: options, checks, and the export itself.

All checks run before weights are loaded. Generating batches and resuming a folder are in
`ssd_cache.evaluation.export`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ssd_cache.budget import check_count
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.settings import equal_budget
from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.eval.options import CACHE
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import SAMPLING
from ssd_cache.cli.plan import parse_budget
from ssd_cache.evaluation.conditions import drawing_conditions
from ssd_cache.evaluation.export import PictureSet, check_unclaimed, claim_folder, draw_pictures, recorded_batch_size
from ssd_cache.evaluation.policies import SETTINGS, choose_head_map, mean_slots, parse_policy, resolve_policies
from ssd_cache.models import Generator, Sampling, resolve_device, resolve_dtype
from ssd_cache.models.find import find_folder
from ssd_cache.runs.batching import default_batch_size
from ssd_cache.runs.processes import Processes

EXPORT_BATCH_SIZE = 16
"""Default batch size if memory suffices; a multiple of the units of both benchmarks."""

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Output folder of the images.", metavar="FOLDER", show_default=False)
]
PolicyName = Annotated[
    str,
    typer.Option(
        help="Cache policy: full, ssd, h2o, streaming-llm, ..., with settings as in ssd:buffer=8. default is the head "
        "map's own settings, recorded under their exact name.",
        metavar="NAME",
        rich_help_panel=CACHE,
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        help="Visual tokens a head may hold: a fraction of the grid, or a count (115).",
        metavar="X",
        show_default="what the head map was fitted to, or 0.2",
        rich_help_panel=CACHE,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Images at once; part of the settings.",
        metavar="N",
        show_default=f"{EXPORT_BATCH_SIZE}, or fewer if memory is short",
        rich_help_panel=SAMPLING,
    ),
]
ExportSeed = Annotated[
    int,
    typer.Option(
        help="Combined with the number of a batch, it gives the seed of the batch.",
        metavar="N",
        rich_help_panel=SAMPLING,
    ),
]


@dataclass(frozen=True)
class Options:
    """The options of an export, as given on the command line."""

    model: str
    grid: str | None
    head_map: str | None
    policy: str
    budget: str | None
    output: Path
    batch_size: int | None
    guidance: float | None
    temperature: float | None
    seed: int
    dtype: str
    device: str


def export(
    bench: str,
    pictures: PictureSet,
    prompts: str,
    tagged: Sequence[tuple[str, str]],
    num_samples: int,
    options: Options,
) -> None:
    """Generate the missing images of a benchmark's folder, and print how many there are.

    Args:
        bench: name of the benchmark in the folder's settings.
        pictures: the images to generate.
        prompts: the text of the folder's own prompt file.
        tagged: tag or id, and text of every prompt, for the settings.
        num_samples: images of each prompt.
        options: the other options.
    """
    budget = None if options.budget is None else parse_budget(options.budget)
    with refusing():
        policy = parse_policy(options.policy)
        Sampling(options.guidance, options.temperature, options.seed)
        wanted = options.batch_size
        if wanted is not None and check_count("batch_size", wanted, 1) % pictures.unit:
            raise WrongUse(
                f"--batch-size {wanted}: {pictures.unit} images are written as one; give a multiple of {pictures.unit}"
            )
        check_place("--output", options.output, is_folder=True)
        processes = Processes()
        where = resolve_device(processes.choose_device(options.device))
        kind = resolve_dtype(options.dtype, where)
        checkpoint = find_model(options.model, options.grid)
        checkpoint.check_decodable()
        labels = choose_head_map(checkpoint, options.head_map, [policy])
        [policy] = resolve_policies([policy], labels)
        [amount] = policy.budgets([equal_budget(labels) if budget is None else budget])
        cache = policy.make_cache(labels, amount)
        generator: Generator | None = None
        batch_size = wanted or processes.gather_all(recorded_batch_size(pictures.root))[0]
        if batch_size is None:  # the default depends on the memory left beside the weights
            check_unclaimed(pictures.root)
            generator = load_generator(checkpoint, kind, where)
            # computed for a full cache, so that the folders of all policies have the same batch size
            batch_size = default_batch_size(
                generator, pictures.texts, EXPORT_BATCH_SIZE, unit=pictures.unit, processes=processes
            )
        settings: dict[str, Any] = {
            "format": f"ssd-cache {bench} export 1",
            "model": checkpoint.name,
            "policy": policy.label,
            "budget": amount,
            "num_slots": mean_slots(cache),
            **_slots_entry(cache),
            "head_map": "online" if cache.head_map.is_online else cache.head_map.digest,
            "seed": options.seed,
            "num_prompts": len(tagged),
            "num_samples": num_samples,
            **drawing_conditions(
                checkpoint,
                tagged,
                dtype=kind,
                device=where,
                batch_size=batch_size,
                guidance_scale=options.guidance,
                temperature=options.temperature,
                settings={name: getattr(cache, name) for name in SETTINGS if name != "slots"},
            ),
        }
        processes.check_agreement(settings | {"prompts": hashlib.sha256(prompts.encode()).hexdigest()})
        claim_folder(pictures.root, settings, prompts, write=processes.is_main)
    generator = generator or load_generator(checkpoint, kind, where)
    try:
        drawn = draw_pictures(
            generator,
            pictures,
            lambda: policy.make_cache(labels, amount),
            batch_size=batch_size,
            seed=options.seed,
            guidance_scale=options.guidance,
            temperature=options.temperature,
            processes=processes,
        )
    except (
        ValueError
    ) as error:  # a full disk, a map that does not fit, an image of another prompt: the message names the remedy
        raise Failure(str(error)) from error
    if processes.is_main:
        total = len(pictures.texts)
        here = total - len(pictures.missing(range(total)))
        share = f"{drawn} drawn now" if processes.count == 1 else f"{processes.count} processes"
        Console(highlight=False, markup=False).print(
            f"{pictures.root}: {here} of {total} pictures ({share}; {described(settings)})", soft_wrap=True
        )


def _slots_entry(cache: SSDCache) -> dict[str, Any]:
    """Digest of the slots if they are not equal. Equal slots have no entry, to match folders of older versions."""
    if cache.slots == "uniform":
        return {}
    digest = hashlib.sha256(json.dumps(cache.num_slots).encode()).hexdigest()[:12]
    return {"slots": f"{cache.slots} {digest}"}


def described(settings: Mapping[str, Any]) -> str:
    """The settings of an export in one line, for tables. Without settings, the line says that they are unknown."""
    if not settings:
        return "drawn by another program, settings unknown"
    budget, slots = settings["budget"], settings["num_slots"]
    share = f"{budget:.0%} of the visual tokens" if isinstance(budget, float) else f"{budget} visual tokens"
    shared = "head by head, " if "slots" in settings else ""
    return (
        f"{settings['model']}, policy {settings['policy']}, budget {share} ({shared}{slots:g} slots a head in "
        f"every row of guidance, the prompt not counted), map {settings['head_map']}, seed {settings['seed']}, "
        f"guidance {settings['guidance_scale']:g}, temperature {settings['temperature']:g}, {settings['dtype']}"
    )


@contextmanager
def judge(option: str, name: str) -> Iterator[None]:
    """Context in which the model of `option` is loaded; turns its errors into messages that name the option.

    Raises:
        WrongUse: there is no such model.
        HubError: the Hub cannot be searched for it.
        Failure: the model cannot be loaded.
    """
    with refusing():
        find_folder(name, f"{option} {name}")
    try:
        yield
    except (OSError, ImportError) as error:
        raise Failure(f"{option} {name}: {error}") from error
