"""How reliable is a head map, and what does it cost? Tables and JSON about profiling one model.

    python examples/profile_study.py --num-prompts 128 --output study

One run with the model's own guidance answers most questions, and a second run uses another guidance scale. The study
measures labels, the attention that they retain, seconds and bytes. `ssd-cache eval shapes` measures image quality. An
interrupted study resumes from the sums in the folder.
"""

from __future__ import annotations

import functools
import json
import operator
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm import tqdm

from ssd_cache import HeadMap
from ssd_cache.models import Generator, find_generator
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.profiling.labels import METHODS, Method, label_heads, map_scores
from ssd_cache.profiling.measuring import measure_heads
from ssd_cache.profiling.statistics import HeadStatistics, widest_window
from ssd_cache.shapes import KINDS, make_prompts

PEAK = """
import sys
from ssd_cache.profiling.measuring import measure_heads
from ssd_cache.models import find_generator

def peak():  # not ru_maxrss, which starts from what the parent held
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])

kind, model, *prompts = sys.argv[1:]
generator = find_generator(model).load(device="cpu")
generator.generate(prompts[:1])
before = peak()
if kind == "plain":
    generator.generate(prompts)
else:
    measure_heads(generator, prompts, batch_size=len(prompts), progress=False)
print(peak() - before)
"""
"""Code whose process measures its own peak memory during generation; the peak of a process never falls."""


def table(title: str, columns: list[str], rows: list[list]) -> str:
    """A Markdown table with a title line above it."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [" | ".join(row) for row in (columns, ["---"] * len(columns), *cells)]
    return f"\n{title}\n\n" + "\n".join(f"| {line} |" for line in lines)


def seconds(generator: Generator, action: Callable[[], object]) -> float:
    """Wall time of an action, including all work that it queued on the device."""
    start = time.perf_counter()
    action()
    if generator.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_side_by_side(generator: Generator, prompts: list[str], rounds: int, **settings) -> list[dict[str, float]]:
    """Time profiling and plain generation of the same prompts alternately, under the same machine load."""
    generator.generate(prompts)  # warm up: the first run includes one-time costs
    found = []
    for _ in tqdm(range(rounds), desc="plain and recorded"):
        plain = seconds(generator, lambda: generator.generate(prompts))
        recorded = seconds(
            generator,
            lambda: measure_heads(generator, prompts, batch_size=len(prompts), progress=False, **settings),
        )
        found.append({"plain": plain, "recorded": recorded, "ratio": recorded / plain})
    return found


def peak_memory(model: str, prompts: list[str]) -> dict[str, int]:
    """Peak growth of a process in bytes while it generates the prompts in one batch, plain and profiled (on Linux)."""
    found = {}
    for kind in ("plain", "recorded"):
        done = subprocess.run([sys.executable, "-c", PEAK, kind, model, *prompts], capture_output=True, text=True)
        if done.returncode:
            raise typer.BadParameter(f"the process that measures peak memory failed: {done.stderr[-400:]}")
        found[kind] = int(done.stdout)
    return found


def measure_parts(
    generator: Generator, prompts: list[str], part_size: int, folder: Path, guidance: float, seed: int, **settings
) -> list[HeadStatistics]:
    """Head statistics of every `part_size` prompts; their sums are kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        measure_heads(
            generator,
            prompts[start : start + part_size],
            batch_size=part_size,
            guidance_scale=guidance,
            seed=seed + start // part_size,
            progress=False,
            state_file=folder / f"sums-guidance-{guidance:g}-{start}.safetensors",
            **settings,
        )
        for start in tqdm(range(0, len(prompts), part_size), desc=f"guidance {guidance:g}")
    ]


def vary_labels(statistics: HeadStatistics) -> list[dict[str, Any]]:
    """Label heads with one setting of `label_heads` changed at a time, and compare with the default labels.

    The window takes two tokens, and half a grid row to four rows plus a token; the slots take every measured level.
    """
    columns, widest = statistics.layout.grid[1], widest_window(statistics.layout)
    windows = sorted({2, columns // 2 + 1, *(rows * columns + 1 for rows in range(1, 5))})
    slots = sorted(level.num_slots for level in statistics.levels)
    changes: list[tuple[str, tuple[Method, ...], list]] = [
        ("window", ("window",), [window for window in windows if window <= widest]),
        ("threshold", ("window",), [step / 10 for step in range(1, 10)]),
        ("num_slots", METHODS, slots),
        ("rows", METHODS, ["conditional", "unconditional"]),
    ]
    found = []
    for setting, methods, values in changes:
        for method in methods:
            usual, _ = label_heads(statistics, method=method)
            for value in values:
                labels, threshold = label_heads(statistics, method=method, **{setting: value})
                found.append(
                    {
                        "setting": setting,
                        "value": value,
                        "method": method,
                        "threshold": threshold,
                        "num_spatial": int(labels.sum()),
                        "agreement": label_agreement(labels, usual),
                        "retained": retained_attention(statistics, labels, statistics.levels[0].num_slots),
                    }
                )
    return found


def label_agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    """Share of the heads that have the same label."""
    return (first == second).double().mean().item()


def split_half_agreement(
    parts: list[HeadStatistics], *, num_draws: int = 50, seed: int = 0, **labelling
) -> dict[int, tuple[float, float]]:
    """Mean and lowest agreement of labels between two disjoint halves of the prompts, by number of prompts.

    For each number of parts 2, 4, 8, ... two halves are sampled `num_draws` times and labelled separately by
    `label_heads(..., **labelling)`. The parts have equally many prompts.
    """
    chance, results, size = random.Random(seed), {}, 2
    while size <= len(parts):
        found = []
        for _ in range(num_draws):
            sampled = chance.sample(parts, size)
            halves = total(sampled[: size // 2]), total(sampled[size // 2 :])
            found.append(label_agreement(*(label_heads(half, **labelling)[0] for half in halves)))
        results[sum(part.num_images for part in parts[:size])] = (mean(found), min(found))
        size *= 2
    return results


def total(parts: list[HeadStatistics]) -> HeadStatistics:
    """The sums of all parts, in order."""
    return functools.reduce(operator.add, parts)


def retained_attention(statistics: HeadStatistics, is_spatial: torch.Tensor, slots: int | torch.Tensor) -> float:
    """Mean over the heads of the attention that they retain over a whole image, at measured levels.

    A head's term is `(n * r + (T - n) * 1) / T`: `T` queries, `n = T - slots` of which evict and retain `r` on average.
    """
    slots = torch.full(is_spatial.shape, slots) if isinstance(slots, int) else slots
    kept = torch.zeros(is_spatial.shape, dtype=torch.float64)
    for level in {*slots.flatten().tolist()}:
        retained = torch.where(is_spatial, *(statistics.retained(kind, level) for kind in ("spatial", "semantic")))
        num_queries = statistics.num_visual_tokens - 1
        share = max(0, num_queries - level) / num_queries
        kept = torch.where(slots == level, 1 - share * (1 - retained), kept)
    return kept.mean().item()


def mean(values: list[float]) -> float:
    """Mean of at least one number."""
    return sum(values) / len(values)


def main(
    model: str = "shapes-janus",
    num_prompts: int = 128,
    part_size: int = 4,
    budget: float = 0.2,
    levels: str = "0.1,0.15,0.3,0.5",
    num_recent: float = 0.25,
    other_guidance: float = 3.0,
    seed: int = 0,
    prompt_seed: int = 7,
    timed_prompts: int = 16,
    rounds: int = 3,
    memory: bool = True,
    device: str = "auto",
    output: Path = Path("profile-study"),
) -> None:
    """Profile NUM_PROMPTS captions in parts of PART_SIZE, and write study.md and study.json."""
    checkpoint = find_generator(model)
    generator = checkpoint.load(device=device)
    sampling = generator.sampling()
    own = sampling.guidance_scale
    prompts = [caption for _, caption in make_prompts(-(-num_prompts // len(KINDS)), prompt_seed)]
    random.Random(prompt_seed).shuffle(prompts)  # the captions are sorted by kind
    prompts = prompts[:num_prompts]
    settings: dict[str, Any] = {"budget": budget, "levels": [float(x) for x in levels.split(",")]}
    settings["num_recent"] = num_recent
    numbers: dict[str, Any] = {"model": model, "device": str(generator.model.device), "num_prompts": len(prompts)}
    numbers |= {
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "guidance": own,
        "budget": budget,
    }
    numbers |= {"temperature": sampling.temperature, "threads": torch.get_num_threads(), "torch": torch.__version__}
    text = [", ".join(f"{name} {value}" for name, value in numbers.items())]

    # cost of profiling
    timed = prompts[:timed_prompts]
    numbers["seconds"] = time_side_by_side(generator, timed, rounds, budget=budget, num_recent=num_recent)
    rows: list[list] = [[turn, *row.values()] for turn, row in enumerate(numbers["seconds"], 1)]
    rows.append(["mean", *(mean([row[name] for row in numbers["seconds"]]) for name in ("plain", "recorded", "ratio"))])
    text.append(table(f"Seconds for {len(timed)} images in one batch.", ["round", "plain", "recorded", "ratio"], rows))
    if memory and sys.platform == "linux":
        numbers["peak"] = peak_memory(model, timed)
        rows = [[f"peak of a process, {name}", f"{value / 1e6:.1f} MB"] for name, value in numbers["peak"].items()]
        text.append(table(f"Memory for {len(timed)} images in one batch.", ["bytes", ""], rows))

    # dependence of the labels on the settings
    started = time.perf_counter()
    parts = measure_parts(generator, prompts, part_size, output, own, seed, **settings)
    numbers["profiling_seconds"] = time.perf_counter() - started
    text.append(f"\nThe {len(prompts)} images took {numbers['profiling_seconds']:.0f} s, stored parts excluded.")
    unlike = total(measure_parts(generator, prompts, part_size, output, other_guidance, seed, **settings))
    statistics = total(parts)
    agreement = {method: split_half_agreement(parts, method=method) for method in METHODS}
    numbers["halves"] = agreement
    rows = [[number, *agreement["coverage"][number], *agreement["window"][number]] for number in agreement["coverage"]]
    columns = ["prompts", "coverage", "lowest", "window", "lowest"]
    text.append(table("Heads labelled alike by two halves of the prompts, over 50 random splits.", columns, rows))
    numbers["sensitivity"] = vary_labels(statistics)
    columns = ["setting", "value", "method", "threshold", "spatial heads", "agrees with the usual labels", "retained"]
    rows = [["-" if value is None else value for value in variant.values()] for variant in numbers["sensitivity"]]
    text.append(table("Labels with one setting changed.", columns, rows))
    usual = {method: label_heads(statistics, method=method)[0] for method in METHODS}
    numbers["agreement"] = {
        method: {
            "conditional and unconditional rows": label_agreement(
                label_heads(statistics, method=method, rows="conditional")[0],
                label_heads(statistics, method=method, rows="unconditional")[0],
            ),
            f"guidance {own:g} and {other_guidance:g}": label_agreement(
                usual[method], label_heads(unlike, method=method)[0]
            ),
            "coverage and window": label_agreement(*usual.values()),
        }
        for method in METHODS
    }
    columns = ["method", *numbers["agreement"]["coverage"]]
    rows = [[method, *values.values()] for method, values in numbers["agreement"].items()]
    text.append(table("Heads labelled alike.", columns, rows))

    # attention retained by each map, and labels found during generation
    labels, scores = usual["coverage"], map_scores(statistics)
    fitted = HeadMap(labels, statistics.layout.grid, scores=scores)
    sizes = {f"{share:.0%}": round(share * statistics.num_visual_tokens) for share in (budget, 0.5)}
    maps = {"window": usual["window"], "coverage": labels, "inverted coverage": ~labels}
    maps |= {"all spatial": torch.ones_like(labels), "all semantic": torch.zeros_like(labels)}
    retained = {
        name: {size: retained_attention(statistics, of, slots) for size, slots in sizes.items()}
        for name, of in maps.items()
    }
    by_head = {size: fit_heads(fitted, slots) for size, slots in sizes.items()}
    retained["fitted head by head"] = {
        size: retained_attention(statistics, of.is_spatial, torch.tensor(of.slots)) for size, of in by_head.items()
    }
    numbers["retained"] = retained
    rows = [[name, *values.values()] for name, values in retained.items()]
    text.append(table("Retained attention, mean over the heads.", ["map", *sizes], rows))
    names = ["window_mass", "margin", "prompt", "coverage"]
    rows = [
        [f"{layer}.{head}", "spatial" if label else "semantic", *(scores[name][layer, head].item() for name in names)]
        for layer, heads in enumerate(labels.tolist())
        for head, label in enumerate(heads)
    ]
    text.append(table("Every head.", ["layer.head", "label", *names], rows))

    files = {"study.md": ("\n".join(text) + "\n").encode(), "study.json": json.dumps(numbers, indent=1).encode()}
    for name, content in files.items():
        part = output / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, output / name)
    typer.echo("\n".join(text))


if __name__ == "__main__":
    typer.run(main)
