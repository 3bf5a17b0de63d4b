"""Shared code of the benchmarks of `eval`: options, the command that exports images, and the frame of a scoring run.

All checks run before weights are loaded. Generating batches and resuming a folder are in
`ssd_cache.evaluation.export`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from tqdm import tqdm

from ssd_cache.cache.settings import equal_budget
from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.eval.score_table import Report, print_and_save
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import (
    CACHE,
    SAMPLING,
    Budget,
    Device,
    Dtype,
    Grid,
    Guidance,
    HeadMapName,
    ModelName,
    Temperature,
    option,
    output_option,
)
from ssd_cache.cli.plan import parse_budget
from ssd_cache.evaluation.conditions import image_settings, run_conditions
from ssd_cache.evaluation.export import ImageSet, claim_folder, generate_images
from ssd_cache.evaluation.policies import DEFAULT, choose_head_map, parse_policy, resolve_policies
from ssd_cache.evaluation.scoring import RESULTS_FILE
from ssd_cache.models import BUNDLED, resolve_device, resolve_dtype
from ssd_cache.models.find import find_folder
from ssd_cache.runs.processes import Processes

Folder = Annotated[
    Path,
    typer.Argument(help="The folder of the images.", metavar="FOLDER", exists=True, file_okay=False),
]
Results = Annotated[Path | None, output_option("Output folder of the results.", "FOLDER", default="results in FOLDER")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Output folder of the images.", metavar="FOLDER", show_default=False)
]
PromptsFile = Annotated[
    Path, typer.Option(help="The benchmark's prompts, or some of them.", metavar="PATH", exists=True)
]
Samples = Annotated[int, option("Images of each prompt.", "N", least=1)]
PolicyName = Annotated[
    str,
    option(
        "Cache policy: full, ssd, h2o, streaming-llm, ..., with settings as in ssd:buffer=8. default is the head map's "
        "own settings, recorded under their exact name.",
        "NAME",
        CACHE,
    ),
]
BatchSize = Annotated[int, option("Images at once; part of the settings.", "N", SAMPLING, least=1)]
ExportSeed = Annotated[
    int, option("Combined with the number of a batch, it gives the seed of the batch.", "N", SAMPLING)
]

Score = TypeVar("Score")


Prompts = tuple[ImageSet, Sequence[tuple[str, str]], str]
"""Images to generate, (tag or id, text) of every prompt, and the content of prompts.jsonl."""


def new_app(help: str) -> typer.Typer:
    """A group of commands that prints its help when it is called without a command."""

    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())
            raise typer.Exit(2)

    return typer.Typer(callback=show_help, invoke_without_command=True, help=help)


def export_command(
    benchmark: str, num_samples: int, read_prompts: Callable[[Path, Path, int], Prompts]
) -> Callable[..., None]:
    """The command that generates the images of a benchmark.

    Args:
        benchmark: its name in the folder's settings.
        num_samples: default number of images per prompt.
        read_prompts: reads the prompts, from the output folder, the prompt file and the number of images per prompt.
    """

    def export(
        output: Output,
        prompts_file: PromptsFile,
        samples: Samples = num_samples,
        model: ModelName = BUNDLED,
        grid: Grid = None,
        head_map: HeadMapName = None,
        policy: PolicyName = DEFAULT,
        budget: Budget = None,
        batch_size: BatchSize = 16,
        guidance: Guidance = None,
        temperature: Temperature = None,
        seed: ExportSeed = 42,
        dtype: Dtype = "auto",
        device: Device = "auto",
    ) -> None:
        with refusing():
            images, prompts, lines = read_prompts(output, prompts_file, samples)
            if batch_size % images.unit:
                raise WrongUse(
                    f"--batch-size {batch_size}: {images.unit} images are written as one; give a multiple of "
                    f"{images.unit}"
                )
            check_place("--output", output, is_folder=True)
            [chosen] = parsed = [parse_policy(policy)]
            amount = None if budget is None else parse_budget(budget)
            processes = Processes()
            where = resolve_device(processes.choose_device(device))
            kind = resolve_dtype(dtype, where)
            checkpoint = find_model(model, grid)
            checkpoint.check_decodable()
            sampling = checkpoint.sampling(guidance, temperature, seed)
            labels = choose_head_map(checkpoint, head_map, parsed)
            [chosen] = resolve_policies(parsed, labels)
            [amount] = chosen.budgets([equal_budget(labels) if amount is None else amount])
            conditions = run_conditions(
                checkpoint,
                prompts,
                dtype=kind,
                device=where,
                batch_size=batch_size,
                sampling=sampling,
                settings={},
            )
            settings = image_settings(
                benchmark,
                chosen.make_cache(labels, amount),
                chosen.label,
                amount,
                model=checkpoint.name,
                seed=sampling.seed,
                num_prompts=len(prompts),
                num_samples=samples,
                conditions=conditions,
            )
            processes.check_agreement(settings | {"prompts": hashlib.sha256(lines.encode()).hexdigest()})
            claim_folder(output, settings, lines, write=processes.is_main)
        generated = generate_images(
            load_generator(checkpoint, kind, where),
            images,
            lambda: chosen.make_cache(labels, amount),
            batch_size=batch_size,
            **asdict(sampling),
            processes=processes,
        )
        if processes.is_main:
            total = len(images.texts)
            here = total - len(images.missing(range(total)))
            share = f"{generated} generated now" if processes.count == 1 else f"{processes.count} processes"
            typer.echo(f"{output}: {here} of {total} images ({share}; {described(settings)})")

    return export


def described(settings: Mapping[str, Any]) -> str:
    """The settings of an export in one line, for tables."""
    if not settings:
        return "generated by another program, settings unknown"
    budget = settings["budget"]
    share = f"{budget:.0%} of the visual tokens" if isinstance(budget, float) else f"{budget} visual tokens"
    by_head = "" if settings["slots"].startswith("uniform") else "head by head, "
    return (
        f"{settings['model']}, policy {settings['policy']}, budget {share} ({by_head}{settings['num_slots']:g} slots a "
        f"head in every row of guidance, the prompt not counted), map {settings['head_map']}, seed {settings['seed']}, "
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


def score(
    folder: Path,
    total: int,
    unit: str,
    work: Callable[[Path, Callable[[], object]], Score],
    report: Callable[[Score], Report],
) -> None:
    """Score images with a progress bar, and write results.jsonl and the report into a folder.

    `work` gets the path of results.jsonl and a function to call after each of the `total` units.
    """
    try:
        with tqdm(total=total, desc="scoring", unit=f" {unit}") as bar:
            result = work(folder / RESULTS_FILE, bar.update)
        print_and_save(report(result), folder)
    except OSError as error:
        raise Failure(
            f"{folder} cannot be written ({error.strerror}); the results so far are kept: make room, and run the same "
            "command again to resume"
        ) from error
