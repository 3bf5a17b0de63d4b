"""Make a head map of a model from a file of prompts, print it, and publish it on the Hub.

    python examples/publish_head_map.py prompts.txt --model deepseek-community/Janus-Pro-1B --repo user/my-map

Without --repo nothing is uploaded. A stopped run resumes. docs/profiling.md explains how heads are labelled.
"""

from __future__ import annotations

from pathlib import Path

import typer

from ssd_cache import HeadMap, profile_heads
from ssd_cache.models import find_generator


def main(
    prompts_file: Path,
    model: str = "shapes-janus",
    budget: float = 0.2,
    batch_size: int = 4,
    seed: int = 0,
    device: str = "auto",
    output: Path = Path("head-map"),
    repo: str | None = None,
) -> None:
    """Generate from each line of PROMPTS_FILE with the full cache, label the heads, and save the map in OUTPUT."""
    prompts = [line.strip() for line in prompts_file.read_text("utf-8").splitlines() if line.strip()]
    generator = find_generator(model).load(device=device)
    head_map = profile_heads(
        generator,
        prompts,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        state_file=f"{output}.sums.safetensors",  # delete it when you are satisfied with the map
    )
    head_map.save_pretrained(output)
    spatial = int(head_map.is_spatial.sum())
    print(f"{output}: {spatial} of {head_map.is_spatial.numel()} heads are spatial, from {len(prompts)} prompts")
    if repo is None:
        return
    commit = head_map.push_to_hub(repo)  # uses the token of `hf auth login`
    published = HeadMap.from_pretrained(repo, revision=commit.oid)
    print(f"{commit.commit_url}: {published}")


if __name__ == "__main__":
    typer.run(main)
