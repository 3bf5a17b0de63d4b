"""`ssd-cache eval fidelity`: how far cache policies move a model's output from its full cache, without a judge.

Holds the options, the order of work and a table. All checks run before weights are loaded.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from ssd_cache.cache.settings import equal_budget
from ssd_cache.cli.errors import refusing
from ssd_cache.cli.eval.options import Buffer, OwnBudgets, Policies, parse_budgets
from ssd_cache.cli.eval.score_table import Report
from ssd_cache.cli.files import check_place, check_plotting, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import (
    SAMPLING,
    Device,
    Dtype,
    Grid,
    Guidance,
    HeadMapName,
    ModelName,
    OfDistribution,
    Prompts,
    PromptsFile,
    option,
    output_option,
)
from ssd_cache.cli.plan import words_of_run
from ssd_cache.cli.resuming import Resume, StateFile
from ssd_cache.evaluation.conditions import cache_facts, run_conditions
from ssd_cache.evaluation.fidelity import Fidelity, measure_fidelity, write_fidelity
from ssd_cache.evaluation.policies import DEFAULT, choose_head_map, parse_policies, resolve_policies
from ssd_cache.models import BUNDLED, resolve_device, resolve_dtype

PROMPTS = (
    "a photo of a red circle and a blue square",
    "a photo of three triangles",
    "a photo of a circle left of a square",
    "a photo of a yellow triangle",
)
"""Default prompts. Their words are known to shapes-janus and to every larger model."""


def fidelity(
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    num_images: Annotated[
        int, option("Total images, generated at once: the prompts in order, repeated as needed.", "N", least=1)
    ] = 4,
    batch_size: Annotated[int, option("Images compared at once; each finished part is saved.", "N", least=1)] = 4,
    resume: Resume = None,
    policies: Policies = f"{DEFAULT},h2o,streaming-llm",
    budgets: OwnBudgets = None,
    output: Annotated[Path, output_option("A folder for fidelity.json and fidelity.png.", "FOLDER")] = Path("fidelity"),
    model: ModelName = BUNDLED,
    grid: Grid = None,
    head_map: HeadMapName = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    buffer: Buffer = None,
    guidance: Guidance = None,
    temperature: OfDistribution = None,
    seed: Annotated[int, option("Seed of the images.", "N", SAMPLING)] = 0,
) -> None:
    """Compare cache policies with the full cache at every step, on any model.

    Generates a few images with a full cache and feeds the same tokens to every
    policy (teacher forcing). Measures how far the next token's distribution
    moves, the error of the attention's output, and the share of attention on
    tokens that heads hold. You can stop it at any point: the same command
    resumes it.
    """
    texts = read_prompts(prompts or [], prompts_file) if prompts or prompts_file else list(PROMPTS)
    texts = [texts[index % len(texts)] for index in range(num_images)]
    check_place("--output", output, is_folder=True)
    state = StateFile(resume, output)
    check_plotting("matplotlib")
    settings = {} if buffer is None else {"buffer": buffer}
    with refusing():
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        chosen = parse_policies(policies)
        checkpoint = find_model(model, grid)
        sampling = checkpoint.sampling(guidance, temperature, seed)
        sampling.check_random()
        labels = choose_head_map(checkpoint, head_map, chosen)
        amounts = parse_budgets(budgets, labels.num_visual_tokens) if budgets else [equal_budget(labels)]
        caches, facts = {}, {}
        for policy in resolve_policies(chosen, labels, settings):
            for amount in policy.budgets(amounts):
                name = f"{policy.label} {f'{100 * amount:g}%' if isinstance(amount, float) else amount}"
                caches[name] = policy.make_cache(labels, amount, **settings)
                facts[name] = {"policy": policy.label, "budget": amount, **cache_facts(caches[name])}
    conditions: dict[str, Any] = {
        "model": checkpoint.name,
        "head_map": labels.digest,
        **run_conditions(
            checkpoint,
            [("", text) for text in texts],
            dtype=kind,
            device=where,
            batch_size=num_images,
            sampling=sampling,
            settings=settings,
        ),
        "seeds": "torch's, of the one batch",
        "seed": seed,
        "prompts": texts,
        "policies": facts,
    }
    generator = load_generator(checkpoint, kind, where)
    started = time.perf_counter()
    results = state.run(
        lambda path: measure_fidelity(
            generator,
            texts,
            {name: lambda cache=cache: cache for name, cache in caches.items()},  # type: ignore[misc]
            batch_size=batch_size,
            state_file=path,
            **asdict(sampling),
            progress=True,
        )
    )
    conditions["seconds"] = round(time.perf_counter() - started, 1)
    paths = write_fidelity(results, output, conditions)
    console = Console(highlight=False, markup=False)
    words = f"{len(texts)} image(s), {words_of_run(checkpoint, kind, where, sampling)}, {conditions['seconds']:.0f} s"
    _report(results, words).show(console)
    console.print(f"wrote {' and '.join(path.name for path in paths)} in {output}", soft_wrap=True)


def _report(results: dict[str, Fidelity], words: str) -> Report:
    """Table with one row for each policy and budget."""
    rows = []
    for name, result in results.items():
        error = result.kl_standard_error
        divergence = f"{result.mean_kl:.4f}" + ("" if error is None else f" ± {error:.4f}")
        shares = f"{result.agreement:.2%}", f"{result.mean_attention_error:.1%}", f"{result.mean_retained:.1%}"
        rows.append((*name.rsplit(" ", 1), divergence, *shares))
    return Report(
        title="Fidelity to the full cache",
        columns=("policy", "budget", "mean KL,\nnats", "same\ntop-1", "attention\nerror", "retained\nmass"),
        rows=rows,
        notes=("means over all steps; KL with its standard error over images", words),
    )
