"""`ssd-cache eval shapes`: measure the exact accuracy of policies on shapes-janus, and resume earlier runs.

Holds the options and the order of work. All checks run before weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ssd_cache.cli.errors import Failure, refusing
from ssd_cache.cli.eval.options import (
    DEFAULT_POLICIES,
    Budgets,
    Buffer,
    Policies,
    parse_budgets,
    parse_seeds,
)
from ssd_cache.cli.eval.report import finish
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import load_generator
from ssd_cache.cli.options import SAMPLING, Device, Dtype, Guidance, HeadMapName, ModelName, Temperature, output_option
from ssd_cache.evaluation.conditions import run_conditions
from ssd_cache.evaluation.policies import choose_head_map, parse_policies, resolve_policies
from ssd_cache.evaluation.records import read_records
from ssd_cache.evaluation.results_folder import ResultsFolder
from ssd_cache.evaluation.runner import Plan
from ssd_cache.evaluation.shapes import check_model, run_shapes, shapes_prompts
from ssd_cache.models import BUNDLED, find_generator, resolve_device, resolve_dtype
from ssd_cache.runs.processes import Processes


def shapes(
    policies: Policies = DEFAULT_POLICIES,
    budgets: Budgets = "0.2,0.5",
    num_per_kind: Annotated[int, typer.Option(help="Captions of each of the six kinds.", metavar="N", min=1)] = 100,
    seeds: Annotated[str, typer.Option(help="Seeds: one image of every caption for each seed.", metavar="N,N")] = "0",
    prompt_seed: Annotated[int, typer.Option(help="Seed that determines the captions.", metavar="N")] = 1,
    output: Annotated[
        Path,
        output_option("A folder of results; images it already has are not generated again.", "FOLDER"),
    ] = Path("results"),
    model: ModelName = BUNDLED,
    head_map: HeadMapName = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    buffer: Buffer = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    batch_size: Annotated[
        int, typer.Option(help="Images at once; part of the conditions.", metavar="N", min=1, rich_help_panel=SAMPLING)
    ] = 60,
) -> None:
    """Measure cache policies on shapes-janus with the same seeds and an exact judge.

    Every policy generates images of the same captions. Prints the share of
    correct images for each kind of caption, and paired differences. You can stop
    it at any point: the same command resumes it. Several processes share the
    work under
    `accelerate launch -m ssd_cache.cli eval shapes ...`.
    """
    check_place("--output", output, is_folder=True)
    settings = {} if buffer is None else {"buffer": buffer}
    with refusing():
        processes = Processes()
        where = resolve_device(processes.choose_device(device))
        kind = resolve_dtype(dtype, where)
        checkpoint = find_generator(model)
        check_model(checkpoint)
        sampling = checkpoint.sampling(guidance, temperature)
        chosen = parse_policies(policies)
        labels = choose_head_map(checkpoint, head_map, chosen)
        plan = Plan(
            policies=resolve_policies(chosen, labels, settings),
            budgets=parse_budgets(budgets, labels.num_visual_tokens),
            seeds=parse_seeds(seeds),
            prompts=shapes_prompts(num_per_kind, prompt_seed),
            batch_size=batch_size,
            head_map=labels,
            settings=settings,
        )
        run: dict[str, Any] = {
            "conditions": {
                "bench": "shapes",
                "num_per_kind": num_per_kind,
                "prompt_seed": prompt_seed,
                **run_conditions(
                    checkpoint,
                    plan.prompts,
                    dtype=kind,
                    device=where,
                    batch_size=batch_size,
                    sampling=sampling,
                    settings=settings,
                ),
            },
            "policies": plan.describe(),
            "command": {"model": model, "head_map": head_map},
        }
        processes.check_agreement(run["conditions"] | {"policies": run["policies"]})
        results = ResultsFolder(output, run, processes.index)
    try:
        with results:
            if plan.share(processes.index, processes.count, results.done)[1]:
                run_shapes(load_generator(checkpoint, kind, where), plan, results, sampling, processes)
    except KeyboardInterrupt as error:
        raise Failure(
            f"interrupted; {output} keeps {len(results.done)} images: run the same command again to resume"
        ) from error
    wanted = {key for batch in plan.batches() for key in batch.image_keys()}
    if wanted <= {record.key for record in read_records([output])[0]}:  # the last of several processes
        finish([output], output)
    elif processes.is_main:
        Console(highlight=False, markup=False).print(
            f"process 0 is done; the last one prints the tables, or `ssd-cache eval report {output}`", soft_wrap=True
        )
