"""Score cache policies on shapes-janus: six kinds of captions, drawn with the same seeds, judged exactly.

    python examples/score_policies.py --num-per-kind 100 --budgets 0.2,0.5 --output scores.json

Prints a Markdown table, one row a policy and budget, and writes the verdict on every picture as JSON, so that policies
can be compared picture by picture. It says nothing about models other than the one it is run on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer
from tqdm import tqdm

from ssd_cache import POLICIES, HeadMap, SSDCache
from ssd_cache.evaluation import score_shapes
from ssd_cache.models import find_generator
from ssd_cache.shapes import KINDS, make_prompts


def main(
    model: str = "shapes-janus",
    head_map: str = "",
    policies: str = ",".join(POLICIES),
    budgets: str = "0.2,0.5",
    num_per_kind: int = 100,
    batch_size: int = 50,
    buffer: int = 24,
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
    for policy, budget in runs:
        SSDCache.from_policy(policy, labels, budget, buffer=buffer)  # refuse bad settings before anything is drawn
    prompts = make_prompts(num_per_kind, prompt_seed)
    generator = checkpoint.load(device=device)
    rows, lines = [], []
    for policy, budget in runs:
        with tqdm(total=len(prompts) * labels.num_visual_tokens, desc=f"{policy} {budget:g}", mininterval=5) as bar:
            score = score_shapes(
                generator,
                prompts,
                lambda policy=policy, budget=budget: SSDCache.from_policy(policy, labels, budget, buffer=buffer),
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
            "buffer": buffer,
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
