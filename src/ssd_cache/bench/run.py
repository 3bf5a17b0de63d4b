"""A whole run: the model, the machine's roofline, every case at every batch size, and the number of images that fit.

`bench/cases.py` and `bench/stretches.py` have checked the settings before. A `Report` is yielded after every batch
size, so that an interrupted run leaves results.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import ssd_cache
from ssd_cache.bench.capacity import Capacity, find_capacity, try_capacity
from ssd_cache.bench.cases import Case
from ssd_cache.bench.peak import ProcessPeak, can_tell_peak, peak_of
from ssd_cache.bench.results import Report, Row, summarize
from ssd_cache.bench.roofline import Machine, measure_machine, step_work
from ssd_cache.bench.running import Measurement, measure
from ssd_cache.bench.sizes import weight_bytes
from ssd_cache.bench.split import TimeSplit, split_time
from ssd_cache.bench.stretches import NUM_STRETCHES, Stretch, choose_stretches
from ssd_cache.bench.subject import GUIDANCE_SCALE, Subject


@dataclass(frozen=True)
class Plan:
    """Settings of a run.

    Attributes:
        cases: caches and policies.
        batch_sizes: numbers of images at once; each has its own tables.
        stretches: the steps of an image that are generated.
        rounds: counted rounds.
        memory: bytes for the number of images that fit, or None.
        with_peak: measure peak memory on a CPU, which needs a process for each case.
        command: the command that repeats the run.
        left_out: lines on cases that could not be measured here.
    """

    cases: Sequence[Case]
    batch_sizes: Sequence[int]
    stretches: Sequence[Stretch]
    rounds: int
    memory: int | None
    with_peak: bool
    command: str
    left_out: Sequence[str] = ()


def run(subject: Subject, plan: Plan, *, progress: bool = False) -> Iterator[Report]:
    """Measure. Yields a report of all results after every batch size, and at the end one with the images that fit."""
    model = subject.model
    machine = measure_machine(model.dtype, model.device)
    rows: list[Row] = []
    capacities: list[Capacity] = []

    def report() -> Report:
        return Report(
            plan.command, conditions(subject, plan), machine, list(rows), list(capacities), list(plan.left_out)
        )

    for batch_size in plan.batch_sizes:
        measured = measure(
            subject, plan.cases, plan.stretches, batch_size=batch_size, rounds=plan.rounds, progress=progress
        )
        for result in tqdm(measured, desc="where the time goes, and memory", unit="cache", disable=not progress):
            rows.append(_complete(subject, plan, machine, result))
        yield report()
    if plan.memory is not None:
        for case in tqdm(plan.cases, desc="pictures that fit", unit="cache", disable=not progress):
            found = None if case.is_compiled else find_capacity(subject, case, plan.memory)
            if found is not None and model.device.type == "cuda":
                tried = try_capacity(subject, case, plan.memory, found.by_formula)
                found = Capacity(found.cache, found.picture_bytes, found.by_formula, tried)
            capacities += [] if found is None else [found]
        yield report()


def _complete(subject: Subject, plan: Plan, machine: Machine, result: Measurement) -> Row:
    """The row of a measurement, with the peak memory and time split, which need separate passes."""
    cells = subject.head_map.num_visual_tokens
    if result.failure is not None:
        return summarize(result, plan.stretches, cells, machine=machine)
    case, batch_size = result.case, result.batch_size
    positions = [position for stretch in plan.stretches for position in stretch.positions]
    few = NUM_STRETCHES * subject.head_map.grid[1]
    is_short = sum(stretch.num_tokens for stretch in plan.stretches) <= few or few >= cells
    peak: ProcessPeak | None = None
    # the compiler's memory would hide the peak of a compiled case
    if plan.with_peak and not case.is_compiled and subject.model.device.type == "cpu" and can_tell_peak():
        peak = peak_of(subject.name, subject.model.dtype, case, batch_size, subject.head_map.grid)
    split: TimeSplit | None = None
    # a compiled StaticCache evicts nothing, and a second one would trigger another compilation
    if not (case.is_full and case.is_compiled):
        split = split_time(subject, case, batch_size, plan.stretches if is_short else choose_stretches(cells, few))
    return summarize(
        result,
        plan.stretches,
        cells,
        machine=machine,
        work=None if case.cache == "QuantizedCache" else step_work(subject, case, batch_size, positions),
        split=split,
        process=peak,
    )


def conditions(subject: Subject, plan: Plan) -> dict[str, Any]:
    """All conditions that affect the numbers, as JSON values."""
    config, device = subject.config, subject.model.device
    layout = subject.head_map.layout
    columns, is_guided = layout.grid[1], subject.rows_per_picture == 2
    tokens = sum(stretch.num_tokens for stretch in plan.stretches)
    drawn = "whole pictures" if len(plan.stretches) == 1 else f"{tokens} tokens around the middles of the quarters"
    if len(plan.stretches) > 1 and tokens % (NUM_STRETCHES * columns):
        drawn += f" (evictions by chance: {NUM_STRETCHES * columns} or a multiple has them in proportion)"
    return {
        "model": subject.name,
        "class": type(subject.model).__name__,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} KV, of {subject.head_dim}",
        "weights": weight_bytes(subject),
        "grid": f"{layout.text()} = {layout.num_tokens} visual tokens",
        "prompt": f"{subject.num_prompt} tokens",
        "drawn": drawn,
        "guidance": f"{GUIDANCE_SCALE:g}, two rows a picture" if is_guided else "none, one row a picture",
        "head map": subject.head_map.method or "the model's own",
        "rounds": f"{plan.rounds}, interleaved, after one to warm up",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "ssd_cache": ssd_cache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "memory": None if plan.memory is None else f"{plan.memory / 1e9:g} GB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor as the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
