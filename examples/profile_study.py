"""How far can a head map be trusted? Profiling of a model, and what its labels depend on, as Markdown tables.

    python examples/profile_study.py --num-prompts 128 --output study.md

One run with the model's own guidance answers all but one question; a second one nearly without guidance answers that.
It measures labels and the attention they retain. How well pictures come out is `score_policies.py`'s question.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
import typer
from tqdm import tqdm

from ssd_cache import HeadMap
from ssd_cache.allocation import allocate_budgets, retained_attention
from ssd_cache.labels import head_scores, label_agreement, label_heads, split_half_agreement, total
from ssd_cache.measuring import measure_heads
from ssd_cache.models import Generator, find_generator
from ssd_cache.shapes import KINDS, make_prompts
from ssd_cache.statistics import HeadStatistics


def table(title: str, columns: list[str], rows: list[list]) -> str:
    """A Markdown table under a line that says what it is."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [" | ".join(row) for row in (columns, ["---"] * len(columns), *cells)]
    return f"\n{title}\n\n" + "\n".join(f"| {line} |" for line in lines)


def seconds(generator: Generator, action) -> float:
    """Wall time of an action, all that the device was given included."""
    start = time.perf_counter()
    action()
    if generator.model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_side_by_side(generator: Generator, prompts: list[str], repeats: int, **settings) -> str:
    """Profiling and plain generation of the same prompts in turn, so that both see the same machine."""
    generator.generate(prompts)  # the first time pays for whatever is done once
    rows = []
    for turn in range(repeats):
        plain = seconds(generator, lambda: generator.generate(prompts))
        watched = seconds(
            generator,
            lambda: measure_heads(generator, prompts, batch_size=len(prompts), progress=False, **settings),
        )
        rows.append([turn + 1, round(plain, 1), round(watched, 1), watched / plain])
    return table(f"Seconds for {len(prompts)} pictures in one batch.", ["turn", "plain", "profiled", "ratio"], rows)


def compare(statistics: HeadStatistics, settings: list[tuple[str, dict]]) -> list[list]:
    """Every setting's labels against those of coverage."""
    usual = label_heads(statistics, method="coverage")[0]
    rows = []
    for name, setting in settings:
        labels, threshold = label_heads(statistics, **setting)
        tau = "-" if threshold is None else threshold
        rows.append(
            [name, tau, int(labels.sum()), label_agreement(labels, usual), retained_attention_of(statistics, labels)]
        )
    return rows


def retained_attention_of(statistics: HeadStatistics, labels: torch.Tensor, budget=None) -> float:
    """Mean over the heads at the intended budget, or at another that was measured."""
    return retained_attention(statistics, budget or statistics.levels[0].num_slots, labels)


def main(
    model: str = "shapes-janus",
    num_prompts: int = 128,
    part_size: int = 4,
    budget: float = 0.2,
    levels: str = "0.1,0.15,0.3,0.5",
    num_recent: float = 0.25,
    temperature: float = 1.0,
    guidance: float = 3.0,
    seed: int = 0,
    prompt_seed: int = 7,
    timed_prompts: int = 16,
    repeats: int = 3,
    device: str = "auto",
    output: Path = Path("profile-study.md"),
) -> None:
    """Profile NUM_PROMPTS captions in parts of PART_SIZE, at GUIDANCE and nearly without, and print tables."""
    generator = find_generator(model).load(device=device)
    prompts = [caption for _, caption in make_prompts(-(-num_prompts // len(KINDS)), prompt_seed)]
    random.Random(prompt_seed).shuffle(prompts)  # they come kind by kind
    prompts = prompts[:num_prompts]
    amounts = [float(level) for level in levels.split(",")]
    settings = {"budget": budget, "levels": amounts, "num_recent": num_recent}
    text = [f"{model} on {generator.model.device}, {generator.model.dtype}, budget {budget}, temperature {temperature}"]
    text.append(time_side_by_side(generator, prompts[:timed_prompts], repeats, budget=budget, num_recent=num_recent))

    def measure(guidance_scale: float) -> list[HeadStatistics]:
        return [
            measure_heads(
                generator,
                prompts[start : start + part_size],
                batch_size=part_size,
                guidance_scale=guidance_scale,
                temperature=temperature,
                seed=seed + start // part_size,
                progress=False,
                **settings,
            )
            for start in tqdm(range(0, len(prompts), part_size), desc=f"guidance {guidance_scale:g}")
        ]

    parts = measure(guidance)
    statistics, unguided = total(parts), total(measure(1.001))
    agreement = {method: split_half_agreement(parts, method=method) for method in ("coverage", "window")}
    rows = [[number, *agreement["coverage"][number], *agreement["window"][number]] for number in agreement["coverage"]]
    columns = ["prompts", "coverage", "lowest", "window", "lowest"]
    text.append(table("Agreement of labels between two halves of the prompts, over 50 draws.", columns, rows))

    slots = statistics.levels[0].num_slots
    windows = [2, *(int(generator.checkpoint.grid[1] * rows + 1) for rows in (1, 2, 3))]
    variants: list[tuple[str, dict]] = [("coverage", {"method": "coverage"})]
    variants += [
        (f"coverage at {level.num_slots} slots", {"method": "coverage", "num_slots": level.num_slots})
        for level in statistics.levels[1:]
    ]
    variants += [(f"window {window}", {"method": "window", "window": window}) for window in windows]
    variants += [(f"threshold {tau}", {"method": "window", "threshold": tau}) for tau in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
    variants += [(f"{rows} rows", {"method": "coverage", "rows": rows}) for rows in ("conditional", "unconditional")]
    columns = ["labels by", "threshold", "spatial heads", "agrees with coverage", f"retained at {slots}"]
    text.append(table("Sensitivity of the labels.", columns, compare(statistics, variants)))

    rows = []
    for method in ("coverage", "window"):
        usual, *others = (
            label_heads(of, method=method, rows=rows_of)[0]
            for of, rows_of in (
                (statistics, "all"),
                (unguided, "all"),
                (statistics, "conditional"),
                (statistics, "unconditional"),
            )
        )
        rows.append([method, label_agreement(*others[1:]), label_agreement(usual, others[0])])
    columns = ["method", "conditional and unconditional rows", f"guidance {guidance:g} and 1.001"]
    text.append(table("Agreement of labels.", columns, rows))

    labels = label_heads(statistics, method="coverage")[0]
    maps = {"coverage": labels, "window": label_heads(statistics, method="window")[0], "inverted coverage": ~labels}
    maps |= {"all spatial": torch.ones_like(labels), "all semantic": torch.zeros_like(labels)}
    sizes = sorted(level.num_slots for level in statistics.levels)
    rows = [[name, *(retained_attention_of(statistics, of, size) for size in sizes)] for name, of in maps.items()]
    scores = head_scores(statistics)
    fitted = HeadMap(labels, statistics.grid, scores=scores)
    budgets = {size: allocate_budgets(fitted, size) for size in sizes}
    rows.append(["coverage, budgets fitted", *(retained_attention(fitted, budgets[size]) for size in sizes)])
    text.append(table("Retained attention, mean over the heads.", ["map", *(f"{size} slots" for size in sizes)], rows))
    text.append(f"\nBudgets fitted to {slots} slots: {budgets[slots]}")

    names = ["window_mass", "margin", "margin_chance", "prompt", "entropy", "top_share"]
    names += [f"retained_spatial-{slots}", f"retained_semantic-{slots}"]
    rows = [
        [
            f"{layer}.{head}",
            "spatial" if is_spatial else "semantic",
            *(scores[name][layer, head].item() for name in names),
        ]
        for layer, heads in enumerate(labels.tolist())
        for head, is_spatial in enumerate(heads)
    ]
    text.append(table("Every head.", ["layer.head", "label", *names], rows))
    output.write_text("\n".join(text) + "\n")
    typer.echo("\n".join(text))


if __name__ == "__main__":
    typer.run(main)
