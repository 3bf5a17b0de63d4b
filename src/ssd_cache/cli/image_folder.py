"""`ssd-cache generate --output-dir`: write one file per image into a folder. A second call adds the missing images.

Holds the settings of a folder and the closing message. Claiming, resuming and sharing a folder is in
`ssd_cache.evaluation.export`. The files are written by `ssd_cache.evaluation.image_files`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import typer

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.files import check_place
from ssd_cache.cli.plan import Job
from ssd_cache.cli.resuming import interruptible
from ssd_cache.evaluation.conditions import digest_of, run_conditions
from ssd_cache.evaluation.export import (
    SETTINGS_FILE,
    check_unclaimed,
    claim_folder,
    generate_images,
    recorded_batch_size,
)
from ssd_cache.evaluation.image_files import ImageFiles, batch_seed

CACHE_SETTINGS = ("buffer", "num_recent", "num_sinks", "score", "kv_dtype")

IMAGE_FACTS = (
    *("model", "policy", "budget", "num_slots", "head_map", "guidance_scale", "temperature", "batch_size"),
    *("dtype", "device", "settings", "ssd_cache", "torch", "transformers"),
)
"""Settings of the folder that each image carries as metadata."""


def generate_folder(job: Job, output_dir: Path) -> None:
    """Generate the missing images of the folder, or of a subfolder for each policy, and print how many there are."""
    check_place("--output-dir", output_dir, is_folder=True)
    compare = len(job.caches) > 1
    if compare and (output_dir / SETTINGS_FILE).exists():
        raise WrongUse(
            f"--output-dir {output_dir}: it holds the images of one policy; give another folder for --compare"
        )
    folders = {name: output_dir / name if compare else output_dir for name in job.caches}
    first, generator, processes = next(iter(folders.values())), None, job.processes
    with refusing():
        batch_size = job.batch_size or processes.gather_all(recorded_batch_size(first))[0]
        if batch_size is None:  # the default depends on the memory left beside the weights
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
                    seed_of_batch=batch_seed,
                    title=name,
                    **asdict(job.sampling),
                )
            if processes.is_main:
                share = f"{made} generated now" if processes.count == 1 else f"{processes.count} processes"
                typer.echo(_summary(images, share))


def _reset(cache: SSDCache) -> SSDCache:
    """Reset and reuse the checked cache for each batch, so its warnings are shown only once."""
    cache.reset()
    return cache


def _kept(images: ImageFiles, is_main: bool) -> str:
    return f"{images.root} keeps {images.write_list() if is_main else 0} of {len(images.texts)} images"


def _claim(job: Job, name: str, folder: Path, batch_size: int) -> ImageFiles:
    """Write the settings into the folder of a policy, or compare them with the recorded settings."""
    cache, texts = job.caches[name], job.texts
    conditions = run_conditions(
        job.checkpoint,
        [(str(number), json.dumps(text)) for number, text in enumerate(texts)],
        dtype=job.dtype,
        device=job.device,
        batch_size=batch_size,
        sampling=job.sampling,
        settings={setting: getattr(cache, setting) for setting in CACHE_SETTINGS},
    )
    slots = json.dumps([layer.plan.num_slots for layer in cache.layers])  # equal unless the map is fitted
    settings = {
        "format": "ssd-cache generate 1",
        "policy": name,
        "budget": cache.budget if isinstance(cache.budget, int | float) else "fitted",
        "num_slots": cache.mean_slots,
        "head_map": digest_of(cache.head_map),
        "slots_sha256": hashlib.sha256(slots.encode()).hexdigest(),
        "seed": job.sampling.seed,
        "num_prompts": len(texts) // job.num_images,
        "num_images": job.num_images,
        "fast": job.fast,
        **conditions,
        "model": job.checkpoint.name,
        "seeds": "seed + number of the batch",
    }
    job.processes.check_agreement(settings)
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    claim_folder(folder, settings, prompts, write=job.processes.is_main)
    facts = {name: settings[name] for name in IMAGE_FACTS}
    return ImageFiles(folder, texts, job.num_images, batch_size, job.sampling.seed, facts)


def _summary(images: ImageFiles, share: str) -> str:
    """Write the list of the images; returns how many there are, with their settings."""
    facts = images.facts
    return (
        f"{images.root}: {images.write_list()} of {len(images.texts)} images ({share}; {facts['model']}, policy "
        f"{facts['policy']}, {facts['num_slots']:g} slots a head, batch {min(images.batch_size, len(images.texts))}, "
        f"guidance {facts['guidance_scale']:g}, temperature {facts['temperature']:g}, seed {images.seed}, "
        f"{facts['dtype']} on {facts['device']})"
    )
