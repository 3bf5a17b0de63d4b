"""`prepare`: profile, fit, learn and check in one resumable run that ends with a head map, its card and a report.

This module runs the stages and keeps their results. `stages.py` defines them, `plan.py` estimates them, `report.py`
writes the page.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

import ssd_cache
from ssd_cache.analysis.plotting import check_packages
from ssd_cache.budget import Amount
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint, Generator, generator_of
from ssd_cache.preparing.limits import SHORTER
from ssd_cache.preparing.plan import make_plan
from ssd_cache.preparing.report import write_outputs
from ssd_cache.preparing.stages import STAGES, Settings, Stage, check_stages, make_stages
from ssd_cache.preparing.state import StateFolder
from ssd_cache.profiling.measuring import DEFAULT_BATCH_SIZE, model_facts, prompts_sha256
from ssd_cache.prompts import default_prompts
from ssd_cache.runs.batching import default_batch_size
from ssd_cache.runs.limits import refuse_long_run
from ssd_cache.runs.metering import metered
from ssd_cache.runs.plan import Plan, duration, memory
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.progress import on_one_line
from ssd_cache.training.recording import check_trainable


def prepare(
    model: PreTrainedModel | Generator,
    output: str | os.PathLike[str],
    prompts: Sequence[str] | None = None,
    *,
    budget: Amount = 0.2,
    stages: Sequence[str] = STAGES,
    num_steps: int = 600,
    batch_size: int | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    processor: ProcessorMixin | None = None,
    max_hours: float | None = None,
    on_plan: Callable[[Plan], object] | None = None,
    progress: bool = True,
) -> HeadMap:
    """Make a head map for a model: label the heads, fit their slots, train a score, and measure the result.

    The stages are `profile` (`profile_heads` on 48 prompts), `fit` (`fit_heads`), `learn` (`learn_score` on all prompts
    but the last 8) and `check` (`measure_fidelity` on the last 8, at several budgets). Before them, the first batch of
    each kind of work is measured, and the plan is shown.

    Everything is kept in the folder `OUTPUT.state`. The same call goes on after an interruption at any point, and
    skips finished stages. Further stages may be added in a later call: `stages=QUICK` first, then all.

    Under `accelerate launch`, the processes share the work of each stage.

    Args:
        model: a loaded image model of a supported family, or a `Generator`.
        output: folder for the head map, its model card and the report; made if missing.
        prompts: at least 24 different ones; when not given, those of the checkpoint, or the 600 captions that come with
            the package.
        budget: budget of the cache that the map is for: a fraction of the grid, or tokens per head.
        stages: the stages to run; `profile` and `fit` also run if a later stage needs them.
        num_steps: training steps of `learn`.
        batch_size: images at once in `profile` and `check`; 4 when not given, or fewer if memory is short.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`, above 0.
        seed: seed of the first batch of each stage.
        processor: the model's processor; loaded from the model's source when not given.
        max_hours: refuse a run that is estimated to take longer, after its first batches.
        on_plan: called with the plan before the stages run.
        progress: show the plan, and a progress bar for each stage.

    Returns:
        The map of the last stage; `profile["fidelity"]` has the curve that `check` measured.

    Raises:
        GeneratorError: an unsupported model, a prompt that is empty or too long, or a generation setting out of range.
        ImportError: matplotlib or jinja2, which the report needs, is not installed.
        ProfilingError: a state of another run or version, a file that cannot be written, numbers that are not finite,
            or a run longer than `max_hours`.
        ValueError: prompts that are too few or all alike, or a setting out of range.
    """
    check_packages()
    generator = model if isinstance(model, Generator) else generator_of(model, processor)
    place, processes = Path(output).expanduser(), Processes()
    folder = StateFolder(state_path(place))
    texts = list(default_prompts(generator.checkpoint) if prompts is None else prompts)
    if batch_size is None:
        kept = processes.gather_all(folder.settings.get("batch_size"))[0]
        batch_size = kept or default_batch_size(generator, texts, DEFAULT_BATCH_SIZE, processes=processes)
    settings = Settings(texts, budget, num_steps, batch_size, generator.sampling(guidance_scale, temperature, seed))
    check_stages(stages, generator.checkpoint, settings)
    generator.check_prompts(texts)
    if "learn" in stages:
        check_trainable(generator)
    facts = {
        **model_facts(generator),
        **_facts_before_loading(generator.checkpoint, settings),
        "batch_size": batch_size,
        **asdict(settings.sampling),
    }
    processes.check_agreement(facts)
    if processes.is_main:
        folder.begin(facts)
    folder.costs, folder.finished = processes.gather_all((folder.costs, folder.finished))[0]
    todo = make_stages(stages, generator, settings, folder, processes, progress)
    shows = progress and processes.is_main
    with on_one_line("measuring the first batches"):
        plan = make_plan(generator, settings, todo, folder, processes, shows)
    if max_hours is not None:
        refuse_long_run(generator.checkpoint, generator.model.device, plan.seconds, max_hours, SHORTER)
    if processes.is_main and on_plan is not None:
        on_plan(plan)
    elif shows:
        tqdm.write(plan.text(), file=sys.stderr)
    head_map = _run(todo, plan, folder, generator, processes, shows)
    if processes.is_main:
        write_outputs(place, head_map, plan, folder)
        head_map = HeadMap.from_pretrained(place)
    return processes.gather_all(head_map)[0]


def check_state(output: Path, checkpoint: Checkpoint, settings: Settings) -> None:
    """Refuse the state folder of a run of another model, version or settings; needs no weights.

    The batch size and the sampling may have defaults that depend on the loaded model, so `prepare` compares them.

    Raises:
        ProfilingError: settings differ, each of them named; or the folder cannot be read or written.
    """
    StateFolder(state_path(output)).check(_facts_before_loading(checkpoint, settings))


def state_path(output: Path) -> Path:
    """The state folder of a preparation with this output."""
    return Path(f"{output.expanduser().absolute()}.state")


def _facts_before_loading(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """The settings that the results depend on and that are known from the configuration."""
    return {
        "model": checkpoint.name,
        "ssd_cache": ssd_cache.__version__,
        "budget": settings.budget,
        "num_steps": settings.num_steps,
        "num_prompts": len(settings.prompts),
        "prompts_sha256": prompts_sha256(settings.prompts),
        "seed": settings.sampling.seed,
    }


def _run(
    stages: Sequence[Stage], plan: Plan, folder: StateFolder, generator: Generator, processes: Processes, shows: bool
) -> HeadMap:
    """Run the stages that are not finished, each on the map of the stage before it; returns the last map."""
    head_map: HeadMap | None = None
    for number, stage in enumerate(stages, 1):
        kept = folder.result(stage.name, head_map) if processes.is_main else None
        found = processes.gather_all(kept)[0]
        if found is None:
            title = f"{stage.name} ({number} of {len(stages)})"
            rest = sum(estimate.cost.seconds for estimate in plan.estimates[number:])
            try:
                with (
                    on_one_line(f"{title}, then about {duration(rest)} more" if rest else title),
                    metered(generator.model.device) as cost,
                ):
                    found = stage.run(head_map)
            finally:
                if processes.is_main:
                    folder.add_cost(stage.name, cost)
            if processes.is_main:
                found = folder.finish(stage.name, head_map, found)
            found = processes.gather_all(found)[0]
            if shows:
                took = f"took {duration(cost.seconds)}, with at most {memory(cost.peak_bytes)}"
                tqdm.write(f"{title}: {took}", file=sys.stderr)
        head_map = found
    assert head_map is not None
    return head_map
