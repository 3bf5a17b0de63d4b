"""Generate many images on several GPUs: each process holds the whole model and generates its share of the batches.

    accelerate launch examples/several_gpus.py prompts.txt --model deepseek-community/Janus-Pro-1B --output images

The images are the same with any number of processes. A restarted run generates only the missing images. To split a
model that is too large for one GPU, see docs/devices.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from ssd_cache import SSDCache
from ssd_cache.evaluation.export import ImageSet, claim_folder, generate_images
from ssd_cache.models import find_generator, resolve_device, resolve_dtype
from ssd_cache.profiling.measuring import prompts_sha256
from ssd_cache.runs.processes import Processes


@dataclass(frozen=True)
class Images(ImageSet):
    """One PNG file per prompt."""

    root: Path
    texts: Sequence[str]

    def path(self, number: int) -> Path:
        """The file of an image; a file that exists is complete."""
        return self.root / f"{number:05}.png"


def main(
    prompts_file: Path,
    model: str = "shapes-janus",
    head_map: str | None = None,
    budget: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    output: Path = Path("images"),
) -> None:
    """Generate an image for each line of PROMPTS_FILE into OUTPUT/00000.png, 00001.png, ..."""
    prompts = [line.strip() for line in prompts_file.read_text("utf-8").splitlines() if line.strip()]
    processes = Processes()  # those of accelerate launch or torchrun, otherwise only this one
    where = resolve_device(processes.choose_device(device))
    kind = resolve_dtype(dtype, where)
    checkpoint = find_generator(model)
    labels = checkpoint.head_map(head_map)
    if labels is None:
        raise typer.BadParameter(f"{model} has no head map in its folder: give --head-map", param_hint="--head-map")
    checkpoint.check_head_map(labels)
    settings = {"format": "ssd-cache several-gpus 1", "model": model, "head_map": labels.digest, "budget": budget}
    settings |= {"slots": SSDCache(labels, budget).num_slots}  # checked before the model is loaded
    settings |= {"batch_size": batch_size, "seed": seed, "dtype": str(kind)}
    processes.check_agreement(settings | {"prompts": prompts_sha256(prompts)})
    claim_folder(output, settings, "\n".join(prompts) + "\n", write=processes.is_main)

    files = Images(output, prompts)
    count = generate_images(
        checkpoint.load(kind, where),
        files,
        lambda: SSDCache(labels, budget),
        batch_size=batch_size,
        seed=seed,
        processes=processes,
    )
    # one write per line, to keep the lines of several processes separate
    print(f"process {processes.index} of {processes.count} on {where}: {count} images\n", end="")
    processes.close()


if __name__ == "__main__":
    typer.run(main)
