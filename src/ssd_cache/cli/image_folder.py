"""`ssd-cache generate --output-dir`: write one file per image into a folder. A second call adds the missing images.

Holds the settings of a folder and the closing message. Claiming, resuming and sharing a folder is in
`ssd_cache.evaluation.export`. The files are written by `ssd_cache.evaluation.image_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cli.errors import Failure, WrongUse, refusing
from ssd_cache.cli.files import check_place
from ssd_cache.cli.loading import load_generator
from ssd_cache.decode.fast_decode import fast_decode
from ssd_cache.evaluation.conditions import drawing_conditions
from ssd_cache.evaluation.export import (
    SETTINGS_FILE,
    check_unclaimed,
    claim_folder,
    draw_pictures,
    recorded_batch_size,
)
from ssd_cache.evaluation.image_files import ImageFiles, batch_seed
from ssd_cache.evaluation.policies import mean_slots
from ssd_cache.evaluation.runner import digest_of
from ssd_cache.models import Checkpoint
from ssd_cache.runs.batching import default_batch_size, image_nbytes
from ssd_cache.runs.processes import Processes

CACHE_SETTINGS = ("buffer", "num_recent", "num_sinks", "score", "kv_dtype")


@dataclass(frozen=True)
class Run:
    """The checked options of a `generate` call that has not started.

    Attributes:
        checkpoint, dtype, device: the model.
        texts: the prompt of every image.
        num_images: images of each prompt.
        guidance_scale, temperature: None means the checkpoint's own.
        seed: seed of the first batch.
        fast: whether to compile the decode steps.
        processes: the processes that share the batches.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    texts: Sequence[str]
    num_images: int
    guidance_scale: float | None
    temperature: float | None
    seed: int
    fast: bool
    processes: Processes


def find_folders(output_dir: Path, policies: Sequence[str], compare: bool) -> dict[str, Path]:
    """The folder of each policy: `output_dir`, or with `compare` a subfolder for each policy.

    Raises:
        WrongUse: the folder cannot be written, or holds the images of a single policy although several are compared.
    """
    check_place("--output-dir", output_dir, is_folder=True)
    if compare and (output_dir / SETTINGS_FILE).exists():
        raise WrongUse(
            f"--output-dir {output_dir}: it holds the images of one policy; give another folder for --compare"
        )
    return {name: output_dir / name if compare else output_dir for name in policies}


def generate_into(
    folders: Mapping[str, Path], caches: Mapping[str, SSDCache], run: Run, batch_size: int | None
) -> None:
    """Generate the missing images of the folders, and print how many there are.

    Args:
        folders: the folder of each policy.
        caches: the cache of each policy.
        run: the other options.
        batch_size: None means the batch size recorded in the folders, else the default.

    Raises:
        WrongUse: a folder has other settings or other files.
        Failure: an interruption, a full disk, or a map that does not fit.
    """
    processes, first = run.processes, next(iter(folders.values()))
    with refusing():
        size = batch_size or processes.gather_all(recorded_batch_size(first))[0]
        if size is None:  # the default depends on the memory left beside the weights
            for root in folders.values():
                check_unclaimed(root)
            generator = load_generator(run.checkpoint, run.dtype, run.device)
            largest = max(caches.values(), key=lambda cache: image_nbytes(generator, 0, cache))
            size = default_batch_size(generator, run.texts, cache=largest, processes=processes)
            sets = _claim(folders, caches, run, size)
        else:
            sets = _claim(folders, caches, run, size)
            generator = load_generator(run.checkpoint, run.dtype, run.device)
    compiled: AbstractContextManager = fast_decode(generator.model) if run.fast else nullcontext()
    with compiled:
        for name, images in sets.items():
            try:
                made = draw_pictures(
                    generator,
                    images,
                    _fresh(caches[name]),
                    batch_size=size,
                    seed=run.seed,
                    guidance_scale=run.guidance_scale,
                    temperature=run.temperature,
                    processes=processes,
                    seed_of_batch=batch_seed,
                    title=name,
                )
            except KeyboardInterrupt as error:
                kept = images.write_list() if processes.is_main else 0
                raise Failure(
                    f"interrupted; {images.root} keeps {kept} of {len(run.texts)} images: run the same command again "
                    "to go on"
                ) from error
            except ValueError as error:  # a full disk, a map that does not fit: the message names the remedy
                raise Failure(str(error)) from error
            if processes.is_main:
                _finish(images, made, processes)


def _fresh(cache: SSDCache) -> Callable[[], SSDCache]:
    """Reset and reuse the checked cache for each batch, so its warnings are shown only once."""

    def make() -> SSDCache:
        cache.reset()
        return cache

    return make


def _claim(
    folders: Mapping[str, Path], caches: Mapping[str, SSDCache], run: Run, batch_size: int
) -> dict[str, ImageFiles]:
    """Write the settings into the folders, or compare them with the recorded settings."""
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in run.texts)
    tagged = [(str(number), json.dumps(text)) for number, text in enumerate(run.texts)]
    found = {}
    for name, root in folders.items():
        cache = caches[name]
        settings = {
            "format": "ssd-cache generate 1",
            **_policy_facts(name, cache),
            "slots_sha256": _slots_sha256(cache),
            "seed": run.seed,
            "num_prompts": len(run.texts) // run.num_images,
            "num_images": run.num_images,
            "fast": run.fast,
            **drawing_conditions(
                run.checkpoint,
                tagged,
                dtype=run.dtype,
                device=run.device,
                batch_size=batch_size,
                guidance_scale=run.guidance_scale,
                temperature=run.temperature,
                settings={name: getattr(cache, name) for name in CACHE_SETTINGS},
            ),
            "model": run.checkpoint.name,
            "seeds": "seed + number of the batch",
        }
        run.processes.check_agreement(settings)
        claim_folder(root, settings, prompts, write=run.processes.is_main)
        names = ("model", *_policy_facts(name, cache), "guidance_scale", "temperature", "batch_size", "dtype", "device")
        facts = {key: settings[key] for key in (*names, "settings", "ssd_cache", "torch", "transformers")}
        found[name] = ImageFiles(root, run.texts, run.num_images, batch_size, run.seed, facts)
    return found


def _policy_facts(name: str, cache: SSDCache) -> dict[str, Any]:
    return {
        "policy": name,
        "budget": cache.budget if isinstance(cache.budget, int | float) else "fitted",
        "num_slots": mean_slots(cache),
        "head_map": digest_of(cache.head_map),
    }


def _slots_sha256(cache: SSDCache) -> str:
    """Digest of the slots of every head. Only a fitted map makes them differ."""
    return hashlib.sha256(json.dumps([layer.plan.num_slots for layer in cache.layers]).encode()).hexdigest()


def _finish(images: ImageFiles, made: int, processes: Processes) -> None:
    """Write the list of the images, and print how many there are."""
    there, facts = images.write_list(), images.facts
    share = f"{made} generated now" if processes.count == 1 else f"{processes.count} processes"
    Console(highlight=False, markup=False).print(
        f"{images.root}: {there} of {len(images.texts)} images ({share}; {facts['model']}, policy {facts['policy']}, "
        f"{facts['num_slots']:g} slots a head, batch {min(images.batch_size, len(images.texts))}, guidance "
        f"{facts['guidance_scale']:g}, temperature {facts['temperature']:g}, seed {images.seed}, {facts['dtype']} on "
        f"{facts['device']})",
        soft_wrap=True,
    )
