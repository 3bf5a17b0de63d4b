"""Shared code of `eval geneval` and `eval dpg`: options, the export of images, and the frame of a scoring run.

All checks run before weights are loaded. Generating batches and resuming a folder are in
`ssd_cache.evaluation.export`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tqdm import tqdm

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.settings import equal_budget
from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import CACHE, SAMPLING, output_option
from ssd_cache.cli.plan import parse_budget
from ssd_cache.evaluation.conditions import run_conditions
from ssd_cache.evaluation.dpg import SheetFolder
from ssd_cache.evaluation.export import claim_folder, generate_images
from ssd_cache.evaluation.geneval import SampleFolder
from ssd_cache.evaluation.policies import SETTINGS, choose_head_map, parse_policy, resolve_policies
from ssd_cache.models import resolve_device, resolve_dtype
from ssd_cache.models.find import find_folder
from ssd_cache.runs.processes import Processes

Folder = Annotated[
    Path,
    typer.Argument(help="The folder of the images.", metavar="FOLDER", exists=True, file_okay=False),
]
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
BatchSize = Annotated[
    int, typer.Option(help="Images at once; part of the settings.", metavar="N", min=1, rich_help_panel=SAMPLING)
]
ExportSeed = Annotated[
    int,
    typer.Option(
        help="Combined with the number of a batch, it gives the seed of the batch.",
        metavar="N",
        rich_help_panel=SAMPLING,
    ),
]
Results = Annotated[
    Path | None,
    output_option("Output folder of the results.", "FOLDER", default="results in FOLDER"),
]


@dataclass(frozen=True)
class Options:
    """The options of an export, as given on the command line."""

    model: str
    grid: str | None
    head_map: str | None
    policy: str
    budget: str | None
    batch_size: int
    guidance: float | None
    temperature: float | None
    seed: int
    dtype: str
    device: str


def export(
    benchmark: str,
    images: SampleFolder | SheetFolder,
    prompts: Sequence[tuple[str, str]],
    num_samples: int,
    options: Options,
) -> None:
    """Generate the missing images of a benchmark's folder, and print how many there are.

    Args:
        benchmark: name of the benchmark in the folder's settings.
        images: the images to generate.
        prompts: tag or id, and text of every prompt, for the settings.
        num_samples: images of each prompt.
        options: the other options.
    """
    budget = None if options.budget is None else parse_budget(options.budget)
    with refusing():
        policy = parse_policy(options.policy)
        if options.batch_size % images.unit:
            raise WrongUse(
                f"--batch-size {options.batch_size}: {images.unit} images are written as one; give a multiple of "
                f"{images.unit}"
            )
        check_place("--output", images.root, is_folder=True)
        processes = Processes()
        device = resolve_device(processes.choose_device(options.device))
        dtype = resolve_dtype(options.dtype, device)
        checkpoint = find_model(options.model, options.grid)
        checkpoint.check_decodable()
        sampling = checkpoint.sampling(options.guidance, options.temperature, options.seed)
        labels = choose_head_map(checkpoint, options.head_map, [policy])
        [policy] = resolve_policies([policy], labels)
        [amount] = policy.budgets([equal_budget(labels) if budget is None else budget])
        cache = policy.make_cache(labels, amount)
        settings: dict[str, Any] = {
            "format": f"ssd-cache {benchmark} export 1",
            "model": checkpoint.name,
            "policy": policy.label,
            "budget": amount,
            "num_slots": cache.mean_slots,
            **_slots_entry(cache),
            "head_map": "online" if cache.head_map.is_online else cache.head_map.digest,
            "seed": sampling.seed,
            "num_prompts": len(prompts),
            "num_samples": num_samples,
            **run_conditions(
                checkpoint,
                prompts,
                dtype=dtype,
                device=device,
                batch_size=options.batch_size,
                sampling=sampling,
                settings={name: getattr(cache, name) for name in SETTINGS if name != "slots"},
            ),
        }
        lines = images.prompt_lines()
        processes.check_agreement(settings | {"prompts": hashlib.sha256(lines.encode()).hexdigest()})
        claim_folder(images.root, settings, lines, write=processes.is_main)
    generated = generate_images(
        load_generator(checkpoint, dtype, device),
        images,
        lambda: policy.make_cache(labels, amount),
        batch_size=options.batch_size,
        **asdict(sampling),
        processes=processes,
    )
    if processes.is_main:
        total = len(images.texts)
        here = total - len(images.missing(range(total)))
        share = f"{generated} generated now" if processes.count == 1 else f"{processes.count} processes"
        Console(highlight=False, markup=False).print(
            f"{images.root}: {here} of {total} images ({share}; {described(settings)})", soft_wrap=True
        )


def _slots_entry(cache: SSDCache) -> dict[str, Any]:
    """Digest of the slots if they are not equal. Equal slots have no entry, to match folders of older versions."""
    if cache.slots == "uniform":
        return {}
    digest = hashlib.sha256(json.dumps(cache.num_slots).encode()).hexdigest()[:12]
    return {"slots": f"{cache.slots} {digest}"}


def described(settings: Mapping[str, Any]) -> str:
    """The settings of an export in one line, for tables."""
    if not settings:
        return "generated by another program, settings unknown"
    budget = settings["budget"]
    share = f"{budget:.0%} of the visual tokens" if isinstance(budget, float) else f"{budget} visual tokens"
    return (
        f"{settings['model']}, policy {settings['policy']}, budget {share} "
        f"({'head by head, ' if 'slots' in settings else ''}{settings['num_slots']:g} slots a head in every row of "
        f"guidance, the prompt not counted), map {settings['head_map']}, seed {settings['seed']}, guidance "
        f"{settings['guidance_scale']:g}, temperature {settings['temperature']:g}, {settings['dtype']}"
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


@contextmanager
def scoring(results: Path, total: int, unit: str) -> Iterator[tqdm]:
    """Progress bar of a run that writes into the folder `results`; turns errors of the disk into Failures."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tqdm(total=total, desc="scoring", unit=unit) as bar:
            yield bar
    except OSError as error:
        raise Failure(
            f"{results} cannot be written ({error.strerror}); the results so far are kept: make room, and run the same "
            "command again to resume"
        ) from error
