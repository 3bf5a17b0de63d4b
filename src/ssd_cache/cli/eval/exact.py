"""`ssd-cache eval shapes` and `eval emoji`: exact accuracy of policies on a bundled model; resumes earlier runs.

Holds the options and the order of work, which the exact benchmarks share. All checks run before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ssd_cache.cli.errors import refusing
from ssd_cache.cli.eval.options import DEFAULT_POLICIES, Budgets, Buffer, Policies, parse_budgets, parse_seeds
from ssd_cache.cli.eval.report import finish
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import load_generator
from ssd_cache.cli.options import (
    SAMPLING,
    Device,
    Dtype,
    Guidance,
    HeadMapName,
    ModelName,
    Temperature,
    option,
    output_option,
)
from ssd_cache.cli.resuming import interruptible
from ssd_cache.evaluation.conditions import run_conditions
from ssd_cache.evaluation.exact import ExactBenchmark
from ssd_cache.evaluation.exact_run import Plan, run_benchmark
from ssd_cache.evaluation.policies import choose_head_map, parse_policies, resolve_policies
from ssd_cache.evaluation.results_folder import ResultsFolder, read_records
from ssd_cache.models import find_generator, resolve_device, resolve_dtype
from ssd_cache.runs.processes import Processes


def exact_command(benchmark: ExactBenchmark) -> Callable[..., None]:
    """The command that measures policies by an exact benchmark."""

    def measure(
        policies: Policies = DEFAULT_POLICIES,
        budgets: Budgets = "0.2,0.5",
        num_per_kind: Annotated[int, option("Captions of each kind.", "N", least=1)] = 100,
        seeds: Annotated[str, option("Seeds: one image of every caption for each seed.", "N,N")] = "0",
        prompt_seed: Annotated[int, option("Seed that determines the captions.", "N")] = 1,
        output: Annotated[
            Path, output_option("A folder of results; images it already has are not generated again.", "FOLDER")
        ] = Path("results"),
        model: ModelName = benchmark.model,
        head_map: HeadMapName = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        buffer: Buffer = None,
        guidance: Guidance = None,
        temperature: Temperature = None,
        batch_size: Annotated[int, option("Images at once; part of the conditions.", "N", SAMPLING, least=1)] = 60,
    ) -> None:
        check_place("--output", output, is_folder=True)
        settings = {} if buffer is None else {"buffer": buffer}
        with refusing():
            processes = Processes()
            where = resolve_device(processes.choose_device(device))
            kind = resolve_dtype(dtype, where)
            checkpoint = find_generator(model)
            benchmark.check_model(checkpoint)
            sampling = checkpoint.sampling(guidance, temperature)
            chosen = parse_policies(policies)
            labels = choose_head_map(checkpoint, head_map, chosen)
            plan = Plan(
                policies=resolve_policies(chosen, labels, settings),
                budgets=parse_budgets(budgets, labels.num_visual_tokens),
                seeds=parse_seeds(seeds),
                prompts=benchmark.prompts(num_per_kind, prompt_seed),
                batch_size=batch_size,
                head_map=labels,
                settings=settings,
            )
            conditions = run_conditions(
                checkpoint,
                plan.prompts,
                dtype=kind,
                device=where,
                batch_size=batch_size,
                sampling=sampling,
                settings=settings,
            )
            captions = {"bench": benchmark.name, "num_per_kind": num_per_kind, "prompt_seed": prompt_seed}
            conditions = captions | conditions
            command = {"model": model, "head_map": head_map}
            run = {"conditions": conditions, "policies": plan.describe(), "command": command}
            processes.check_agreement(conditions | {"policies": run["policies"]})
            results = ResultsFolder(output, run, processes.index)
        with results, interruptible(lambda: f"{output} keeps {len(results.done)} images"):
            if plan.missing(processes.index, processes.count, results.done):
                run_benchmark(benchmark, load_generator(checkpoint, kind, where), plan, results, sampling, processes)
        wanted = {key for batch in plan.batches() for key in batch.image_keys()}
        if wanted <= {record.key for record in read_records([output], benchmark)[0]}:  # the last of several processes
            finish([output], output)
        elif processes.is_main:
            typer.echo(f"process 0 is done; the last one prints the tables, or `ssd-cache eval report {output}`")

    measure.__doc__ = f"""Measure cache policies on {benchmark.model} with the same seeds and an exact judge.

    Every policy generates images of the same captions. Prints the share of
    correct images for each kind of caption, and paired differences. You can stop
    it at any point: the same command resumes it. Several processes share the
    work under
    `accelerate launch -m ssd_cache.cli eval {benchmark.name} ...`.
    """
    return measure
