"""Generate the same images with several caches in turn and time every step.

Rounds are interleaved, so that a slowdown of the machine affects all caches alike. The first round warms up and
compiles; it is not counted. In every round, a case first generates a few tokens that are not timed: memory for packed
weights is taken and CUDA graphs are recorded then. A `Report` is yielded after every batch size, so an interrupted run
leaves results.
"""

from __future__ import annotations

import itertools
import platform
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import Cache, DynamicCache, StaticCache

import ssd_cache
from ssd_cache.bench.cases import Case
from ssd_cache.bench.results import Report, Row, size
from ssd_cache.bench.roofline import Machine, StepWork, measure_machine, step_work, synchronize
from ssd_cache.bench.serving import served_by
from ssd_cache.bench.subject import GUIDANCE_SCALE, Subject
from ssd_cache.cache.cache import SSDCache
from ssd_cache.io.showing import first_line

NUM_WINDOWS = 4

UNTIMED = 8
"""Tokens that a case generates before every timed image; `fast_decode` records the fourth as a CUDA graph."""


def choose_windows(num_cells: int, num_tokens: int | None) -> list[range]:
    """The visual tokens to generate: the whole image, or a window around the middle of each quarter.

    Steps of a full cache become slower along the image, so early steps alone would favour it.

    Args:
        num_cells: visual tokens of the image.
        num_tokens: steps in all windows together; None for the whole image. A multiple of 4 grid rows has evictions in
            their true proportion.

    Raises:
        ValueError: fewer than 8 tokens, or as many as the image has.
    """
    if num_tokens is None:
        return [range(num_cells)]
    if not 2 * NUM_WINDOWS <= num_tokens < num_cells:
        raise ValueError(
            f"{num_tokens} tokens to generate: give {2 * NUM_WINDOWS} to {num_cells - 1}, or none for the whole image"
        )
    length = num_tokens // NUM_WINDOWS
    middles = [(2 * quarter + 1) * num_cells // (2 * NUM_WINDOWS) for quarter in range(NUM_WINDOWS)]
    starts = [max(1, middle - length // 2) for middle in middles]
    return [range(start, start + length) for start in starts]


def timed_positions(windows: Sequence[range]) -> list[int]:
    """The visual tokens that the timed steps feed. The first step is not timed: it contains the start of the call.

    The first step of a whole image feeds the prompt, so the first timed step feeds visual token 0.
    """
    return [position for window in windows for position in (window[1:] if window.start else window[:-1])]


@dataclass
class Measurement:
    """Measured times and bytes of a case; `Row` describes the fields.

    Attributes:
        steps: seconds of each step in each counted round, one for each of `timed_positions`.
    """

    case: Case
    batch_size: int
    seconds: list[float] = field(default_factory=list)
    steps: list[list[float]] = field(default_factory=list)
    key_value: int = 0
    bookkeeping: int = 0
    peak: int | None = None
    failure: str | None = None
    served_by: str = ""
    fell_back: bool = False


def run(
    subject: Subject,
    cases: Sequence[Case],
    *,
    batch_sizes: Sequence[int],
    windows: Sequence[range],
    rounds: int,
    command: str = "",
    progress: bool = False,
) -> Iterator[Report]:
    """Measure. Yields a report of all results after every batch size.

    Args:
        subject: the model.
        cases: caches and policies.
        batch_sizes: images generated at once; the report has separate tables for each size.
        windows: the visual tokens of an image that are generated, as from `choose_windows`.
        rounds: counted rounds.
        command: the command that repeats the run.
        progress: show a progress bar.
    """
    machine = measure_machine(subject.model.dtype, subject.model.device)
    facts = _conditions(subject, machine) | {
        "generated": f"{sum(map(len, windows))} tokens of each image",
        "rounds": f"{rounds}, interleaved, after one to warm up",
    }
    rows: list[Row] = []
    for batch_size in batch_sizes:
        for result in measure(subject, cases, windows, batch_size=batch_size, rounds=rounds, progress=progress):
            work = step_work(subject, result.case, batch_size, timed_positions(windows))
            rows.append(summarize(result, windows, subject.head_map.num_visual_tokens, machine, work))
        yield Report(command, facts, machine, list(rows))


def measure(
    subject: Subject,
    cases: Sequence[Case],
    windows: Sequence[range],
    *,
    batch_size: int,
    rounds: int,
    progress: bool = False,
) -> list[Measurement]:
    """Generate the windows with every case once per round, after one uncounted round; arguments as for `run`.

    A case that runs out of GPU memory, or cannot be compiled, is skipped in later rounds; `failure` states the reason.
    """
    results = [Measurement(case, batch_size) for case in cases]
    static: dict[str, StaticCache] = {}
    torch.compiler.reset()  # compile for this batch size alone; else torch compiles for dynamic sizes
    with tqdm(total=(rounds + 1) * len(cases), disable=not progress) as bar:
        for number in range(rounds + 1):
            for result in results:
                bar.set_description(f"batch {batch_size}, {result.case.name}")
                if result.failure is None:
                    try:
                        _measure_once(subject, result, windows, static, is_counted=number > 0)
                    except torch.OutOfMemoryError:
                        static.clear()
                        result.failure = "out of memory"
                    except Exception as error:  # the compiler's errors have no common class
                        if not result.case.steps:
                            raise
                        result.failure = f"cannot be compiled here: {first_line(error)}"
                bar.update()
    return results


def _measure_once(
    subject: Subject, result: Measurement, windows: Sequence[range], static: dict[str, StaticCache], *, is_counted: bool
) -> None:
    """One case in one round. A StaticCache is reused from `static`, because compiled steps are tied to one."""
    case, device = result.case, subject.model.device
    cache: Cache = static.get(case.cache) or case.make_cache(subject)
    if isinstance(cache, StaticCache):
        static[case.cache] = cache
        cache.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with case.running(subject):
        generate_windows(subject, cache, result.batch_size, [windows[0][:UNTIMED]])
        if isinstance(cache, DynamicCache):  # its `reset` keeps the length
            cache = case.make_cache(subject)
        else:
            cache.reset()
        seconds, steps = generate_windows(subject, cache, result.batch_size, windows)
        result.served_by, result.fell_back = served_by(subject, case, cache)
        if device.type == "cuda":
            others = sum(sum(held_bytes(other)) for other in static.values() if other is not cache)
            result.peak = max(result.peak or 0, torch.cuda.max_memory_allocated(device) - others)
        if not is_counted:
            subject.fill(cache, result.batch_size, subject.length - 1)  # the last generated token is never fed
            result.key_value, result.bookkeeping = held_bytes(cache)
            return
    result.seconds.append(seconds)
    result.steps.append(steps)


def generate_windows(
    subject: Subject, cache: Cache, batch_size: int, windows: Sequence[range]
) -> tuple[float, list[float]]:
    """Generate the windows with one cache, filled up to the start of each; returns total seconds and step seconds.

    For a whole image, the total is wall time, including the prompt and the start of the call. For windows, it is the
    mean step time multiplied by the number of steps. On a GPU, steps are timed by events, without waiting for it.
    """
    device, steps, wall = subject.model.device, [], 0.0
    on_gpu, marks = device.type == "cuda", list[Any]()

    def tick() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()

    for window in windows:
        if window.start:
            subject.fill(cache, batch_size, subject.num_prompt + window.start)
        marks.clear()
        torch.manual_seed(0)
        synchronize(device)
        begin = time.perf_counter()
        subject.generate(cache, batch_size, len(window), tick)
        synchronize(device)
        wall += time.perf_counter() - begin
        steps += [one.elapsed_time(two) / 1000 if on_gpu else two - one for one, two in itertools.pairwise(marks)]
    if len(windows) > 1:
        wall = statistics.mean(steps) * sum(map(len, windows))
    return wall, steps


def held_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes that a cache holds now: K and V, and the other tensors."""
    if isinstance(cache, SSDCache):
        stats = cache.memory_stats()
        return stats.key_value, stats.bookkeeping
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), 0


def summarize(measured: Measurement, windows: Sequence[range], num_cells: int, machine: Machine, work: StepWork) -> Row:
    """Compute the row of one measurement of `windows` in an image of `num_cells`."""
    name, batch_size, is_rival = measured.case.name, measured.batch_size, measured.case.is_rival
    if measured.failure is not None:
        return Row(name, batch_size, is_rival, measured.failure)
    generated = batch_size * sum(map(len, windows))
    medians = [1000 * statistics.median(step) for step in zip(*measured.steps, strict=True)]
    curve = list(zip(timed_positions(windows), medians, strict=True))
    quarters = ([ms for position, ms in curve if 4 * position // num_cells == quarter] for quarter in range(4))
    return Row(
        cache=name,
        batch_size=batch_size,
        is_rival=is_rival,
        served_by=measured.served_by,
        fell_back=measured.fell_back,
        seconds=measured.seconds,
        tokens_per_second=generated / statistics.median(measured.seconds),
        slowest=generated / max(measured.seconds),
        fastest=generated / min(measured.seconds),
        step_ms=statistics.mean(medians),
        quarters_ms=list(map(statistics.median, quarters)),
        key_value=measured.key_value,
        bookkeeping=measured.bookkeeping,
        peak=measured.peak,
        work=work,
        max_ms=1000 * max(work.seconds(machine)),
        sum_ms=1000 * sum(work.seconds(machine)),
    )


def _conditions(subject: Subject, machine: Machine) -> dict[str, str]:
    """The model, the machine and the versions."""
    config, device, head_map = subject.config, subject.model.device, subject.head_map
    heads = f"{config.num_attention_heads} query and {config.num_key_value_heads} KV heads of {subject.head_dim}"
    is_guided, speeds = subject.rows_per_image == 2, f"{size(machine.copy_speed)}/s copied"
    return {
        "model": subject.name,
        "decoder": f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {heads}",
        "weights": size(sum(weight.nbytes for weight in subject.model.parameters())),
        "grid": f"{head_map.layout.text()} = {head_map.num_visual_tokens} visual tokens",
        "prompt": f"{subject.num_prompt} tokens",
        "guidance": f"{GUIDANCE_SCALE:g}, two rows an image" if is_guided else "none, one row an image",
        "head map": head_map.method or "the model's own",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "device": _device_name(device),
        "threads": str(torch.get_num_threads()),
        "roofline": f"{speeds}, {machine.matrix_speed / 1e12:.3g} TFLOP/s in matrix products",
        "versions": f"ssd_cache {ssd_cache.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
    }


def _device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor as the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
