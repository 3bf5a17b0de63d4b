"""The plan of a preparation: for each stage its images, estimated time and peak memory, from measured first batches.

The first batches of `profile` are part of that stage, and `fit` is measured on their head map. Only to measure them, a
batch of images and one or two training steps are run for `learn`, and a batch of images with one cache for `check`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ssd_cache.cache.cache import SSDCache
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Generator
from ssd_cache.preparing.check import curve_budgets
from ssd_cache.preparing.stages import LEARNED_AT_ONCE, Settings, Stage, run_profile
from ssd_cache.preparing.state import StateFolder
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.runs.batching import image_nbytes
from ssd_cache.runs.metering import Cost, highest_peak, metered
from ssd_cache.runs.plan import Estimate, Plan, memory
from ssd_cache.runs.processes import Processes
from ssd_cache.training.learning import check_learning
from ssd_cache.training.learning_state import HELD_OUT, LearningState
from ssd_cache.training.memory import images_at_once, step_nbytes
from ssd_cache.training.recording import generated_together, replay_images, without_idle_rows
from ssd_cache.training.trainer import Trainer, mean_attention

WARM_SECONDS = 20.0
"""A first batch or training step shorter than this is followed by a second one, because of its one-time work."""

FIRST = "first-batch"
"""Folder of the map that is fitted to the first batch; a training step is measured with it."""

FORMULA = "step by formula"
"""The cost that holds `step_nbytes` of the images that a training step takes at once."""

PASS = "pass of check"
"""The cost of a batch of `check` with one compressed cache."""

PASSES_OF_HELD_OUT = 2
"""Training steps that take about as long as the held-out images before and after training."""


def make_plan(
    generator: Generator,
    settings: Settings,
    stages: Sequence[Stage],
    folder: StateFolder,
    processes: Processes,
    progress: bool,
) -> Plan:
    """Measure the first batches that no earlier call has measured, and estimate every stage.

    Every process must call this function; all get the plan of the main process.
    """
    if not {"first batch", "first fit"} <= folder.costs.keys():
        _measure_images(generator, settings, folder, processes, progress)
    names = {stage.name for stage in stages}
    if "learn" in names and not {"images", "inputs", "step", FORMULA} <= folder.costs.keys():
        _measure_learning(generator, settings, folder, processes)
    if "check" in names and PASS not in folder.costs:
        _measure_pass(generator, settings, folder, processes)
    estimates, before = [], None
    is_finished = True
    for stage in stages:
        found = folder.result(stage.name, before) if is_finished and processes.is_main else None
        is_finished = found is not None
        before = found
        cost = _estimate(stage.name, generator, settings, folder, processes.count)
        formula = folder.costs[FORMULA].peak_bytes if stage.name == "learn" else None
        note = "" if formula is None else f"a step by formula: {memory(formula)}"
        estimates.append(Estimate(stage.name, stage.num_images, cost, is_finished, note=note))
    plan = Plan(generator.checkpoint.name, str(generator.model.device), estimates)
    return processes.gather_all(plan)[0]


def _estimate(name: str, generator: Generator, settings: Settings, folder: StateFolder, num_processes: int) -> Cost:
    """The estimated cost of a stage."""
    batch = folder.costs["first batch"]
    if name == "fit":
        return folder.costs["first fit"]
    if name == "learn":
        return _estimate_learning(generator, settings, folder.costs, num_processes)
    prompts = settings.profiled if name == "profile" else settings.checked
    num_batches = math.ceil(math.ceil(len(prompts) / settings.batch_size) / num_processes)
    if name == "profile":
        return Cost(num_batches * batch.seconds, batch.peak_bytes)
    # beside the full cache, which records attention, every cache runs the decoder once and holds its own K and V
    checkpoint, num_prompt = generator.checkpoint, generator.prepare(prompts)["attention_mask"].shape[1]
    equal = HeadMap.uniform("semantic", num_layers=checkpoint.num_layers, num_kv_heads=checkpoint.num_kv_heads)
    equal = equal.with_layout(checkpoint.layout)
    budgets = curve_budgets(equal, settings.budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # windows shorter than a row are intended
        of_image = sum(image_nbytes(generator, num_prompt, SSDCache(equal, budget)) for budget in budgets)
    peak = None if batch.peak_bytes is None else batch.peak_bytes + min(settings.batch_size, len(prompts)) * of_image
    return Cost(num_batches * (batch.seconds + len(budgets) * folder.costs[PASS].seconds), peak)


def _estimate_learning(generator: Generator, settings: Settings, costs: Mapping[str, Cost], num_processes: int) -> Cost:
    """The estimated cost of `learn`: the first batch of images and the first step, and the inputs of all images."""
    images, step, inputs = (costs[part] for part in ("images", "step", "inputs"))
    size, number = generated_together(generator, settings.learned, LEARNED_AT_ONCE), len(settings.learned)
    num_batches = math.ceil(number / size) + HELD_OUT / size
    seconds = num_batches * images.seconds / num_processes + (settings.num_steps + PASSES_OF_HELD_OUT) * step.seconds
    peak = highest_peak(images, step)
    if peak is not None and generator.model.device.type != "cuda":  # they are not in the memory of a GPU
        measured = min(size, number)
        peak += round((number + HELD_OUT - measured) / measured * (inputs.peak_bytes or 0))
    return Cost(seconds, peak)


def _measure_images(
    generator: Generator, settings: Settings, folder: StateFolder, processes: Processes, progress: bool
) -> None:
    """Run the first batches of `profile`, whose sums the stage keeps; their fitted map serves to measure learning.

    The time is that of the last one, because the first batch includes one-time work. The peak is the higher one: the
    allocator keeps memory of the first batch, as it does between the batches of the stage. Where an earlier call has
    already run some batches, they are run again.
    """
    state_file = None if folder.file("profile").exists() else folder.file("profile")
    size, sampling = settings.batch_size, asdict(settings.sampling)
    costs = []
    for number in (1, 2):
        with metered(generator.model.device, release=number == 1) as cost:
            head_map = run_profile(
                generator, settings, settings.profiled[: number * size], state_file, **sampling, progress=progress
            )
        if state_file is None:
            cost.seconds /= number
        elif processes.is_main:
            folder.add_cost("profile", cost)
        costs.append(cost)
        if 2 * size > len(settings.profiled) or processes.gather_all(cost.seconds)[0] > WARM_SECONDS:
            break
    if processes.is_main:
        with metered(generator.model.device) as fitting:
            fitted = fit_heads(head_map, settings.budget)
        fitted.save_pretrained(folder.path / FIRST)
        folder.costs |= {"first batch": Cost(cost.seconds, highest_peak(*costs)), "first fit": fitting}
        folder.save()
    folder.costs = processes.gather_all(folder.costs)[0]


def _measure_learning(generator: Generator, settings: Settings, folder: StateFolder, processes: Processes) -> None:
    """Generate the images of a few training steps, take one or two of these, and record the costs."""
    device, size = generator.model.device, generated_together(generator, settings.learned, LEARNED_AT_ONCE)
    prompts = settings.learned[:size]
    sampling: dict[str, Any] = asdict(settings.sampling)
    seed = sampling.pop("seed")
    with metered(device) as images:
        tokens = generator.generate(prompts, seed=seed, **sampling).cpu()
        recording = replay_images(generator, prompts, tokens, seed=seed, **sampling)
        recording = without_idle_rows(recording, sampling["guidance_scale"])
    images.seconds *= size / len(prompts)
    learning = settings.learning
    labels = processes.gather_all(HeadMap.from_pretrained(folder.path / FIRST) if processes.is_main else None)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the stage emits the same ones
        plans = check_learning(labels, **learning)
    part = recording.split(LEARNED_AT_ONCE)[0]
    schedule: dict[str, Any] = {name: learning[name] for name in ("learning_rate", "num_steps")}
    num_at_once = images_at_once(generator, [part], math.ceil(LEARNED_AT_ONCE / processes.count), plans[0].buffer)
    trainer = Trainer(generator, plans, **sampling, **schedule, num_at_once=num_at_once, processes=processes)
    first, slots = mean_attention(generator, part, labels, num_at_once), [plan.num_slots for plan in plans]
    state = LearningState.beginning(first, slots)
    steps = []
    for number in (1, 2):
        with metered(device, release=number == 1) as step:
            trainer.step(state, part)
        steps.append(step)
        if processes.gather_all(step.seconds)[0] > WARM_SECONDS:
            break
    if processes.is_main:
        inputs = Cost(0.0, sum(tensor.nbytes for tensor in recording.inputs.values()))
        rows, num_prompt = len(part.parts(num_at_once)[0]), part.seen.shape[1]
        bound = step_nbytes(generator.checkpoint, generator.model.dtype, rows, num_prompt, plans[0].buffer)
        folder.costs |= {"images": images, "inputs": inputs, "step": Cost(step.seconds, highest_peak(*steps))}
        folder.costs[FORMULA] = Cost(0.0, bound)
        folder.save()
    folder.costs = processes.gather_all(folder.costs)[0]


def _measure_pass(generator: Generator, settings: Settings, folder: StateFolder, processes: Processes) -> None:
    """Generate a batch of `check` with a cache of the map that is fitted to the first batch, in the main process."""
    if processes.is_main:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caches of the stage do not warn either
            cache = SSDCache(HeadMap.from_pretrained(folder.path / FIRST), settings.budget)
            with metered(generator.model.device) as cost, ssd_attention(generator.language_model):
                generator.generate(settings.checked[: settings.batch_size], cache, **asdict(settings.sampling))
        folder.costs[PASS] = cost
        folder.save()
    folder.costs = processes.gather_all(folder.costs)[0]
