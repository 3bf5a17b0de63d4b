"""Score cache policies on shapes-janus: six kinds of captions, drawn with the same seeds, judged exactly.

    python examples/score_policies.py --num-per-kind 100 --budgets 0.2,0.5 --output scores.json

Prints a Markdown table, one row a policy and budget, and writes the verdict on every picture as JSON, so that policies
can be compared picture by picture. Beside the cache's own policies it knows `online` (no map: labels found while
drawing), `inverted` (every label turned round, a control), `fitted` (slots shared out by `allocate_budgets`), and a
folder with a head map. It says nothing about models other than the one it is run on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer
from tqdm import tqdm

from ssd_cache import POLICIES, HeadMap, SSDCache
from ssd_cache.allocation import allocate_budgets
from ssd_cache.evaluation import score_shapes
from ssd_cache.models import find_generator
from ssd_cache.shapes import KINDS, make_prompts


def make_cache(policy: str, head_map: HeadMap, budget: float, **settings) -> SSDCache:
    """A fresh cache by the name of a policy, of one of this script's own, or of a head map's folder."""
    if policy in POLICIES:
        return SSDCache.from_policy(policy, head_map, budget, **settings)
    if policy == "inverted":
        return SSDCache(~head_map, budget, **settings)
    if policy == "fitted":
        return SSDCache(head_map, allocate_budgets(head_map, budget), **settings)
    if policy == "online":
        shape = {"num_layers": head_map.num_layers, "num_kv_heads": head_map.num_kv_heads, "grid": head_map.grid}
        return SSDCache(HeadMap.online(**shape), budget, **settings)
    return SSDCache(HeadMap.from_pretrained(policy), budget, **settings)


def main(
    model: str = "shapes-janus",
    head_map: str = "",
    policies: str = ",".join(POLICIES),
    budgets: str = "0.2,0.5",
    num_per_kind: int = 100,
    batch_size: int = 50,
    buffer: int = 24,
    num_recent: float | None = None,
    prompt_seed: int = 1,
    seed: int = 0,
    device: str = "auto",
    output: Path = Path("scores.json"),
) -> None:
    """Draw NUM_PER_KIND captions of each kind with every policy and budget."""
    checkpoint = find_generator(model)
    labels = HeadMap.from_pretrained(head_map) if head_map else checkpoint.head_map()
    if labels is None:
        raise typer.BadParameter(f"{model} has no head map in its folder: give --head-map")
    runs = [
        (policy, budget)
        for policy in policies.split(",")
        for budget in ([1.0] if policy == "full" else map(float, budgets.split(",")))
    ]
    settings = {"buffer": buffer} | ({} if num_recent is None else {"num_recent": num_recent})
    for policy, budget in runs:
        make_cache(policy, labels, budget, **settings)  # refuse bad settings before anything is drawn
    prompts = make_prompts(num_per_kind, prompt_seed)
    generator = checkpoint.load(device=device)
    rows, lines = [], []
    for policy, budget in runs:
        with tqdm(total=len(prompts) * labels.num_visual_tokens, desc=f"{policy} {budget:g}", mininterval=5) as bar:
            score = score_shapes(
                generator,
                prompts,
                lambda policy=policy, budget=budget: make_cache(policy, labels, budget, **settings),
                batch_size=batch_size,
                seed=seed,
                on_tokens=bar.update,
            )
        rows.append({"policy": policy, "budget": budget, "correct": score.correct})
        kinds = " | ".join(f"{score.kind(kind):.2f}" for kind in KINDS)
        lines.append(f"| {policy} | {budget:.0%} | {kinds} | **{score.overall:.3f}** | {score.standard_error:.3f} |")
        conditions = {
            "model": model,
            "head_map": labels.digest,
            "num_per_kind": num_per_kind,
            "batch_size": batch_size,
            **settings,
            "prompt_seed": prompt_seed,
            "seed": seed,
            "guidance_scale": generator.guidance_scale,
            "temperature": generator.temperature,
        }
        part = output.with_name(output.name + ".part")
        part.write_text(json.dumps({**conditions, "runs": rows}))
        os.replace(part, output)
    typer.echo(f"| policy | budget | {' | '.join(KINDS)} | overall | s.e. |")
    typer.echo("|---" * (len(KINDS) + 4) + "|")
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
