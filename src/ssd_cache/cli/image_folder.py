"""`ssd-cache generate --output-dir`: write one file per image into a folder. A second call adds the missing images.

Holds the settings of a folder and the closing message. Claiming, resuming and sharing a folder is in
`ssd_cache.evaluation.export`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import typer

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cli.errors import refusing
from ssd_cache.cli.files import check_place
from ssd_cache.cli.plan import Job
from ssd_cache.cli.resuming import interruptible
from ssd_cache.evaluation.conditions import cache_facts, run_conditions
from ssd_cache.evaluation.export import check_unclaimed, claim_folder, generate_images, recorded_batch_size
from ssd_cache.evaluation.image_folders import NumberedImages


def generate_folder(job: Job, output_dir: Path) -> None:
    """Generate the missing images of the folder, or of a subfolder for each policy, and print how many there are."""
    check_place("--output-dir", output_dir, is_folder=True)
    folders = {name: output_dir / name if len(job.caches) > 1 else output_dir for name in job.caches}
    first, generator, processes = next(iter(folders.values())), None, job.processes
    with refusing():
        batch_size = job.batch_size or processes.gather_all(recorded_batch_size(first))[0]
        if batch_size is None:  # the default depends on the memory that the weights leave free
            for folder in folders.values():
                check_unclaimed(folder)
            generator = job.load()
            batch_size = job.default_batch_size(generator)
        sets = {name: _claim(job, name, folder, batch_size) for name, folder in folders.items()}
    generator = generator or job.load()
    with job.compiled(generator):
        for name, images in sets.items():
            with interruptible(partial(_kept, images, processes.is_main)):
                made = generate_images(
                    generator,
                    images,
                    partial(_reset, job.caches[name]),
                    batch_size=batch_size,
                    processes=processes,
                    seed_of_batch=images.batch_seed,
                    title=name,
                    **asdict(job.sampling),
                )
            if processes.is_main:
                share = f"{made} generated now" if processes.count == 1 else f"{processes.count} processes"
                words = f"{share}; policy {name}, {job.words(batch_size)}"
                typer.echo(f"{images.root}: {images.write_list()} of {len(images.texts)} images ({words})")


def _reset(cache: SSDCache) -> SSDCache:
    """Reset and reuse the checked cache for each batch, so its warnings are shown only once."""
    cache.reset()
    return cache


def _kept(images: NumberedImages, is_main: bool) -> str:
    return f"{images.root} keeps {images.write_list() if is_main else 0} of {len(images.texts)} images"


def _claim(job: Job, name: str, folder: Path, batch_size: int) -> NumberedImages:
    """Write the settings into the folder of a policy, or compare them with the recorded settings."""
    cache, texts = job.caches[name], job.texts
    conditions = run_conditions(
        job.checkpoint,
        [(str(number), json.dumps(text)) for number, text in enumerate(texts)],
        dtype=job.dtype,
        device=job.device,
        batch_size=batch_size,
        sampling=job.sampling,
        settings=cache_facts(cache),
    )
    conditions |= conditions.pop("settings")
    settings = {
        "format": "ssd-cache generate 1",
        "model": job.checkpoint.name,
        "policy": name,
        "budget": cache.budget if isinstance(cache.budget, int | float) else "fitted",
        "seed": job.sampling.seed,
        "num_prompts": len(texts) // job.num_images,
        "num_images": job.num_images,
        "fast": job.fast,
        **conditions,
        "seeds": "seed + number of the batch",
    }
    job.processes.check_agreement(settings)
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    claim_folder(folder, settings, prompts, write=job.processes.is_main)
    return NumberedImages(folder, texts, job.num_images, batch_size, settings)
