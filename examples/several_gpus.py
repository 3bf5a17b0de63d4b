"""Draw many pictures on several GPUs: each process has the whole model and draws its share of the batches.

    accelerate launch examples/several_gpus.py prompts.txt --model deepseek-community/Janus-Pro-1B --output pictures

Pictures are the same with any number of processes. Stopped and started again, it draws what is missing. A model that is
too large for one GPU is split over several instead: docs/devices.md.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from PIL import Image

from ssd_cache import SSDCache
from ssd_cache.evaluation.export import claim_folder, draw_pictures
from ssd_cache.io.writing import write_files
from ssd_cache.models import find_generator, resolve_device, resolve_dtype
from ssd_cache.profiling.measuring import prompts_sha256
from ssd_cache.runs.processes import Processes


@dataclass(frozen=True)
class Pictures:
    """One file a prompt, as `draw_pictures` asks for them."""

    root: Path
    texts: Sequence[str]
    unit: int = 1

    def path(self, number: int) -> Path:
        """Of one picture; a file that is there is whole."""
        return self.root / f"{number:05}.png"

    def missing(self, numbers: range) -> list[int]:
        """Those of some pictures that are not there yet."""
        return [number for number in numbers if not self.path(number).exists()]

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write those of a batch's pictures that are not there yet."""
        for number in self.missing(numbers):
            content = io.BytesIO()
            images[number - numbers.start].save(content, format="PNG")
            write_files({self.path(number): content.getvalue()})


def main(
    prompts_file: Path,
    model: str = "shapes-janus",
    head_map: str | None = None,
    budget: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    output: Path = Path("pictures"),
) -> None:
    """Draw a picture for each line of PROMPTS_FILE into OUTPUT/00000.png, 00001.png, ..."""
    prompts = [line.strip() for line in prompts_file.read_text("utf-8").splitlines() if line.strip()]
    processes = Processes()  # of accelerate launch or torchrun; this one alone without them
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

    pictures = Pictures(output, prompts)
    drawn = draw_pictures(
        checkpoint.load(kind, where),
        pictures,
        lambda: SSDCache(labels, budget),
        batch_size=batch_size,
        seed=seed,
        processes=processes,
    )
    # in one piece, so that the lines of several processes stay apart
    print(f"process {processes.index} of {processes.count} on {where}: {drawn} pictures\n", end="")
    processes.close()


if __name__ == "__main__":
    typer.run(main)
