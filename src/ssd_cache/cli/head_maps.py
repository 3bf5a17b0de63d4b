"""`ssd-cache profile`, `fit` and `learn`: label heads, choose their slots, train their scores, and save the head map.

Each command checks its options, loads the model, calls one function of the library that saves its state, and saves the
map. Recording, measuring and training are in `ssd_cache.profiling`, `.evaluation.fidelity` and `.training`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ssd_cache.cli import options
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import check_place, read_prompts
from ssd_cache.cli.loading import find_labels, find_model, load_generator
from ssd_cache.cli.options import option
from ssd_cache.cli.plan import parse_budget
from ssd_cache.cli.resuming import Resume, StateFile
from ssd_cache.evaluation.fidelity import measure_divergence
from ssd_cache.evaluation.fidelity.divergence import check_fitting
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import BUNDLED, Checkpoint
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.profiling.profiling import check_profiling, profile_heads
from ssd_cache.runs.processes import Processes
from ssd_cache.training.learning import check_learning, learn_score


def profile(
    prompts: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    output: options.MapFolder = Path("head-map"),
    model: options.ModelName = BUNDLED,
    grid: options.Grid = None,
    method: Annotated[
        str, option("coverage: the kind that retains more attention. window: attention on the newest tokens.", "NAME")
    ] = "coverage",
    budget: options.MapBudget = "0.2",
    levels: Annotated[str | None, option("Further budgets to measure, for choosing slots: 0.1,0.3,0.5.", "X,X")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Choose each head's slots and label by --levels.")] = False,
    buffer: options.Buffer = None,
    num_recent: Annotated[str, option("Newest tokens of a semantic head: tokens, or a fraction.", "X")] = "0.25",
    num_sinks: Annotated[int, option("First tokens that every head keeps.", "N")] = 0,
    window: Annotated[
        int | None, option("Tokens that count as near.", "N", default="a row of the grid and one")
    ] = None,
    threshold: Annotated[
        float | None, option("With window: lowest share of a spatial head.", "X", default="chosen from the data")
    ] = None,
    resume: Resume = None,
    batch_size: Annotated[
        int | None, option("Images at once.", "N", default="4, or fewer if memory is short", least=1)
    ] = None,
    guidance: options.Guidance = None,
    temperature: options.Temperature = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Label the heads of a model as spatial or semantic, and save the head map.

    Generates an image of each prompt with a full cache, and labels each head by
    where it attends. Several processes share the images under
    `accelerate launch --multi_gpu -m ssd_cache.cli profile ...`.
    You can stop it at any point: the same command resumes it, also with more
    prompts.
    """
    texts, state = _begin(prompts, prompts_file, output, resume)
    if fit and not levels:
        raise WrongUse("--fit chooses slots from the measurements of --levels: give --levels too (0.1,0.3,0.5)")
    settings: dict[str, Any] = {
        "method": method,
        "budget": parse_budget(budget),
        "levels": _parse_levels(levels),
        "buffer": buffer,
        "num_recent": parse_budget(num_recent, "--num-recent", least=0),
        "num_sinks": num_sinks,
        "window": window,
        "threshold": threshold,
        "batch_size": batch_size,
    }
    with refusing():
        checkpoint = find_model(model, grid)
        sampling = asdict(checkpoint.sampling(guidance, temperature, seed))
        check_profiling(checkpoint.layout, fit=fit, **settings)
        processes = Processes()
        generator = load_generator(checkpoint, dtype, processes.choose_device(device))
    profiled = state.run(lambda path: profile_heads(generator, texts, state_file=path, **settings, **sampling))
    if processes.is_main:
        _save(fit_heads(profiled, settings["budget"]) if fit else profiled, output)


def fit(
    prompts: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    head_map: options.HeadMapName = None,
    output: options.MapFolder = Path("fitted-map"),
    budget: options.MapBudget = "0.2",
    levels: Annotated[
        str | None, option("Levels of the map, as slots, to measure every head at: 32,86,173.", "N,N", default="all")
    ] = None,
    resume: Resume = None,
    batch_size: Annotated[int, option("Images at once.", "N", least=1)] = 4,
    model: options.ModelName = BUNDLED,
    grid: options.Grid = None,
    guidance: options.Guidance = None,
    temperature: options.OfDistribution = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Choose the slots of each head by how much the head matters to the model.

    Generates an image of each prompt with a full cache. Then it compresses one
    head at a time, to every level, and measures with the same tokens how far the
    model's output moves. This takes one pass over the images for each head and
    level, so use a few prompts. You can stop it at any point: the same command
    resumes it.
    """
    texts, state = _begin(prompts, prompts_file, output, resume)
    amount, chosen = parse_budget(budget), _parse_levels(levels)
    with refusing():
        checkpoint, labels, sampling = _find(model, grid, head_map, guidance, temperature, seed)
        check_fitting(labels, amount, chosen)
        generator = load_generator(checkpoint, dtype, device)
    settings = {"levels": chosen, "batch_size": batch_size, **sampling}
    measured = state.run(lambda path: measure_divergence(generator, texts, labels, state_file=path, **settings))
    _save(fit_heads(measured, amount), output)


def learn(
    prompts: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    head_map: options.HeadMapName = None,
    output: options.MapFolder = Path("learned-map"),
    budget: options.Budget = None,
    buffer: options.Buffer = None,
    steps: Annotated[
        int,
        option(
            "Total number of steps. A larger number extends a finished run. The further steps follow the schedule of "
            "the new total, so the score differs from an uninterrupted run of that total.",
            "N",
        ),
    ] = 400,
    rate: Annotated[float, option("Learning rate at the first step.", "X")] = 0.02,
    slots: Annotated[
        bool, typer.Option("--slots", help="Also move slots between heads, all of which then rank their tokens.")
    ] = False,
    resume: Resume = None,
    batch_size: Annotated[
        int, option("Images a step. Up to four times as many are generated at once.", "N", least=1)
    ] = 4,
    model: options.ModelName = BUNDLED,
    grid: options.Grid = None,
    guidance: options.Guidance = None,
    temperature: options.OfDistribution = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Train the score by which semantic heads keep tokens, and save it in the map.

    Generates an image of each prompt with a full cache. Gradient descent on a
    few parameters a head then minimises how far eviction moves the model's
    output on these tokens. Give a few hundred different prompts. Several
    processes share the images under
    `accelerate launch --multi_gpu -m ssd_cache.cli learn ...`.
    You can stop it at any point: the same command resumes it.
    """
    texts, state = _begin(prompts, prompts_file, output, resume)
    settings: dict[str, Any] = {
        "budget": None if budget is None else parse_budget(budget),
        "buffer": buffer,
        "num_steps": steps,
        "learning_rate": rate,
        "learn_slots": slots,
        "batch_size": batch_size,
    }
    with refusing():
        checkpoint, labels, sampling = _find(model, grid, head_map, guidance, temperature, seed)
        check_learning(labels, **settings)
        processes = Processes()
        generator = load_generator(checkpoint, dtype, processes.choose_device(device))
    settings |= sampling
    learned = state.run(lambda path: learn_score(generator, texts, labels, state_file=path, **settings))
    found = learned.profile["learning"]["held_out"]
    if not processes.is_main:
        return
    _save(
        learned,
        output,
        f"divergence on {found['num_images']} held-out images, nats a token: {found['before']:.4f} before, "
        f"{found['after']:.4f} after, change {found['after'] - found['before']:+.4f} +- "
        f"{found['standard_error']:.4f} (standard error)",
    )


def _begin(
    prompts: list[str] | None, prompts_file: Path | None, output: Path, resume: Path | None
) -> tuple[list[str], StateFile]:
    """The prompts and the state file of a run."""
    texts = read_prompts(prompts, prompts_file)
    check_place("--output", output, is_folder=True)
    return texts, StateFile(resume, output)


def _parse_levels(text: str | None) -> Any:
    """The numbers of `--levels`, or None; raises WrongUse."""
    return [parse_budget(level, "--levels") for level in text.split(",")] if text else None


def _find(
    model: str, grid: str | None, head_map: str | None, guidance: float | None, temperature: float | None, seed: int
) -> tuple[Checkpoint, HeadMap, dict[str, Any]]:
    """The checkpoint, its head map and the settings of sampling, for commands that compare distributions."""
    checkpoint = find_model(model, grid)
    sampling = checkpoint.sampling(guidance, temperature, seed)
    sampling.check_random()
    return checkpoint, find_labels(checkpoint, head_map), asdict(sampling)


def _save(head_map: HeadMap, output: Path, *notes: str) -> None:
    """Save a head map in a folder, and print the map, the notes and the folder."""
    folder = head_map.save_pretrained(output)
    typer.echo("\n".join([repr(head_map), *notes, f"wrote {folder}"]))
