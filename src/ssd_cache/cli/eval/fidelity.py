"""`ssd-cache eval fidelity`: how far cache policies move a model's output from its full cache, without a judge.

Holds the options, the order of work and a table. All checks run before weights are loaded.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ssd_cache.analysis.plotting import check_packages
from ssd_cache.budget import Amount, check_count
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.settings import equal_budget
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.eval.options import (
    Buffer,
    HeadMapName,
    NumRecent,
    NumSinks,
    OwnBudgets,
    Policies,
    ScoreName,
    cache_settings,
    parse_budgets,
)
from ssd_cache.cli.files import check_place, read_prompts
from ssd_cache.cli.loading import find_model, load_generator
from ssd_cache.cli.options import (
    SAMPLING,
    Device,
    Dtype,
    Grid,
    Guidance,
    ModelName,
    OfDistribution,
    Prompts,
    PromptsFile,
)
from ssd_cache.cli.resuming import Resume, StateFile
from ssd_cache.evaluation.conditions import drawing_conditions
from ssd_cache.evaluation.fidelity import Fidelity, write_fidelity
from ssd_cache.evaluation.fidelity.measure import check_settings
from ssd_cache.evaluation.fidelity.parts import measure_in_parts
from ssd_cache.evaluation.policies import (
    DEFAULT,
    Policy,
    choose_head_map,
    mean_slots,
    parse_policies,
    resolve_policies,
)
from ssd_cache.models import BUNDLED, resolve_device, resolve_dtype

PROMPTS = (
    "a photo of a red circle and a blue square",
    "a photo of three triangles",
    "a photo of a circle left of a square",
    "a photo of a yellow triangle",
)
"""Default prompts. Their words are known to shapes-janus and to every larger model."""

Case = tuple[Policy, Amount]


def fidelity(
    context: typer.Context,
    prompts: Prompts = None,
    prompts_file: PromptsFile = None,
    num_images: Annotated[
        int,
        typer.Option(help="Total images, generated at once: the prompts in order, repeated as needed.", metavar="N"),
    ] = 4,
    batch_size: Annotated[
        int, typer.Option(help="Images compared at once; each finished part is saved.", metavar="N")
    ] = 4,
    resume: Resume = None,
    policies: Policies = f"{DEFAULT},h2o,streaming-llm",
    budgets: OwnBudgets = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A folder for fidelity.json and fidelity.png.", metavar="FOLDER")
    ] = Path("fidelity"),
    model: ModelName = BUNDLED,
    grid: Grid = None,
    head_map: HeadMapName = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    buffer: Buffer = None,
    num_recent: NumRecent = None,
    num_sinks: NumSinks = None,
    score: ScoreName = None,
    guidance: Guidance = None,
    temperature: OfDistribution = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the images.", metavar="N", rich_help_panel=SAMPLING)] = 0,
) -> None:
    """Compare cache policies with the full cache at every step, on any model.

    Generates a few images with a full cache and feeds the same tokens to every
    policy (teacher forcing). Measures how far the next token's distribution
    moves, the error of the attention's output, and the share of attention on
    tokens that heads hold. You can stop it at any point: the same command
    resumes it.
    """
    texts = read_prompts(prompts or [], prompts_file) if prompts or prompts_file else list(PROMPTS)
    check_place("--output", output, is_folder=True)
    state = StateFile(resume, output)
    with refusing():
        check_count("num_images", num_images, 1)
        check_count("batch_size", batch_size, 1)
        check_settings(guidance, temperature, seed)
        where = resolve_device(device)
        kind = resolve_dtype(dtype, where)
        chosen = parse_policies(policies)
        given = None if budgets is None else parse_budgets(budgets)
        checkpoint = find_model(model, grid)
        labels = choose_head_map(checkpoint, head_map, chosen)
        settings = cache_settings(buffer, num_recent, num_sinks, score)
        chosen = resolve_policies(chosen, labels, settings)
        amounts = [equal_budget(labels)] if given is None else given
        cells = labels.num_visual_tokens
        for amount in amounts:
            if isinstance(amount, int) and amount > cells:
                raise WrongUse(f"--budgets {amount}: a picture has {cells} visual tokens; give at most {cells}")
        cases = {
            f"{policy.label} {_words(amount)}": (policy, amount)
            for policy in chosen
            for amount in policy.budgets(amounts)
        }
        caches = {name: policy.make_cache(labels, amount, **settings) for name, (policy, amount) in cases.items()}
    try:
        check_packages("matplotlib")
    except ImportError as error:
        raise WrongUse(str(error)) from error
    drawn = [texts[index % len(texts)] for index in range(num_images)]
    conditions: dict[str, Any] = {
        "model": checkpoint.name,
        "head_map": labels.digest,
        **drawing_conditions(
            checkpoint,
            [("", text) for text in drawn],
            dtype=kind,
            device=where,
            batch_size=num_images,
            guidance_scale=guidance,
            temperature=temperature,
            settings=settings,
        ),
        "seeds": "torch's, of the one batch",
        "seed": seed,
        "command": _command(context),
        "prompts": drawn,
        "policies": {name: _facts(cases[name], cache) for name, cache in caches.items()},
    }
    generator = load_generator(checkpoint, kind, where)
    started = time.perf_counter()

    def measure(path: Path) -> dict[str, Fidelity]:
        return measure_in_parts(
            generator,
            drawn,
            {name: partial(_reset, cache) for name, cache in caches.items()},
            batch_size=batch_size,
            state_file=path,
            seed=seed,
            guidance_scale=guidance,
            temperature=temperature,
            progress=True,
        )

    results = state.run(measure)
    conditions["seconds"] = round(time.perf_counter() - started, 1)
    paths = write_fidelity(results, output, conditions)
    console = Console(highlight=False, markup=False)
    console.print(_table(cases, results, _caption(conditions)))
    console.print(f"wrote {' and '.join(path.name for path in paths)} in {output}", soft_wrap=True)


def _reset(cache: SSDCache) -> SSDCache:
    """Reset and reuse the checked cache for the next part, so its warnings are shown only once."""
    cache.reset()
    return cache


def _command(context: typer.Context) -> str:
    """Command line that repeats the run, with every option and the defaults."""
    options = {name: value for name, value in context.params.items() if name != "prompts" and value is not None}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["ssd-cache", "eval", "fidelity", *(context.params["prompts"] or []), *words])


def _words(amount: Amount) -> str:
    return f"{100 * amount:g}%" if isinstance(amount, float) else str(amount)


def _facts(case: Case, cache: SSDCache) -> dict[str, Any]:
    policy, amount = case
    return {
        "policy": policy.label,
        "budget": amount,
        "num_slots": mean_slots(cache),
        "slots": cache.slots,
        "buffer": cache.buffer,
        "num_recent": cache.num_recent,
        "num_sinks": cache.num_sinks,
        "score": cache.score,
        "kv_dtype": cache.kv_dtype,
        "head_map": "online" if cache.head_map.is_online else cache.head_map.digest,
    }


def _caption(conditions: Mapping[str, Any]) -> str:
    return (
        f"{conditions['model']}, {len(conditions['prompts'])} picture(s) drawn with the full cache, guidance "
        f"{conditions['guidance_scale']:g}, temperature {conditions['temperature']:g}, seed {conditions['seed']}, "
        f"{conditions['dtype']} on {conditions['device']}, {conditions['seconds']:.0f} s; means over all steps, KL "
        "with its standard error over pictures"
    )


def _table(cases: Mapping[str, Case], results: Mapping[str, Fidelity], conditions: str) -> Table:
    """Table with one row a policy and budget. `conditions` is the caption: the settings of the measurement."""
    table = Table(box=box.SIMPLE_HEAD, caption=conditions, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("policy")
    for title in ("budget", "mean KL,\nnats", "same\ntop-1", "attention\nerror", "retained\nmass"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, (policy, amount) in cases.items():
        result = results[name]
        error = result.kl_standard_error
        table.add_row(
            policy.label,
            _words(amount),
            f"{result.mean_kl:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            f"{result.agreement:.2%}",
            f"{result.mean_attention_error:.1%}",
            f"{result.mean_retained:.1%}",
        )
    return table
