"""`ssd-cache generate --output`: all images in one file, and a table of the memory and speed of each policy.

The file is an image, a contact sheet, or the visual tokens. It is written at the end, so nothing is resumed here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import typer
from PIL import Image
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from tqdm import tqdm

from ssd_cache.cache.cache import MemoryStats, SSDCache
from ssd_cache.cli.files import TOKENS, save_image
from ssd_cache.cli.plan import Job, described
from ssd_cache.cli.sheet import Row, contact_sheet
from ssd_cache.io.writing import write_files
from ssd_cache.models import Generator

MAX_COLUMNS = 8
"""Maximum number of images side by side on a contact sheet."""


@dataclass(frozen=True)
class Result:
    """What one policy generated: visual tokens `[images, cells]`, the wall time, and the memory of the largest batch.

    The time includes prompts and sampling, and excludes image decoding.
    """

    tokens: torch.Tensor
    seconds: float
    memory: MemoryStats
    peak_device_bytes: int | None

    @property
    def speed(self) -> str:
        """Visual tokens of all images in a second."""
        return f"{self.tokens.numel() / self.seconds:.0f}"

    @property
    def ratio(self) -> str:
        """How many times larger a full cache is."""
        return f"{self.memory.full_cache / self.memory.key_value:.1f}x"


def generate_file(job: Job, place: Path) -> None:
    """Generate all images, write the file, and print the table."""
    generator = job.load()
    batch_size = job.batch_size or job.default_batch_size(generator)
    with job.compiled(generator):
        results = {name: _generate(job, generator, name, cache, batch_size) for name, cache in job.caches.items()}
    measures = _save(job, generator, results, place)
    Console(highlight=False, markup=False).print(_table(results, _conditions(job, generator, batch_size)))
    typer.echo(f"wrote {place} ({measures})")


def _generate(job: Job, generator: Generator, name: str, cache: SSDCache, batch_size: int) -> Result:
    """Generate one image a prompt. Batch number i has the seed `seed + i`."""
    device, parts, memory, seconds = generator.model.device, [], MemoryStats(0, 0, 0), 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tqdm(
        total=job.checkpoint.num_visual_tokens * len(job.texts),
        desc=name,
        unit=" visual tokens",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # print fewer lines into a log file
    ) as progress:
        for number, start in enumerate(range(0, len(job.texts), batch_size)):
            texts = job.texts[start : start + batch_size]
            sampling = replace(job.sampling, seed=job.sampling.seed + number)
            cache.reset()
            started = time.perf_counter()
            tokens = generator.generate(texts, cache, on_tokens=progress.update, **asdict(sampling))
            parts.append(tokens.cpu())  # waits for the device
            seconds += time.perf_counter() - started
            memory = max(memory, cache.memory_stats(), key=lambda stats: stats.key_value)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    cache.reset()
    return Result(torch.cat(parts), seconds, memory, peak)


def _save(job: Job, generator: Generator, results: Mapping[str, Result], place: Path) -> str:
    """Write tokens or images, depending on the suffix of `place`; returns the size as text."""
    if place.suffix.lower() == TOKENS:
        write_files({place: safetensors.torch.save({name: result.tokens for name, result in results.items()})})
        return f"{len(job.texts)} x {job.checkpoint.num_visual_tokens} tokens"
    image = _sheet(job, results, {name: generator.to_images(result.tokens) for name, result in results.items()})
    save_image(image, place)
    return f"{image.width} x {image.height}"


def _sheet(job: Job, results: Mapping[str, Result], images: Mapping[str, list[Image.Image]]) -> Image.Image:
    """The image itself if there is only one, else a contact sheet with one row a policy."""
    if len(results) == 1:
        [only] = images.values()
        columns = job.num_images if job.num_images > 1 else max(2, round(len(only) ** 0.5))
        return only[0] if len(only) == 1 else contact_sheet([Row(only)], job.texts, min(columns, MAX_COLUMNS))
    rows = []
    for name, result in results.items():
        smaller = "every token" if name == "full" else f"{result.ratio} less"
        notes = f"{decimal(result.memory.key_value)} of K and V", smaller, f"{result.speed} tokens/s"
        rows.append(Row(images[name], name, notes))
    whole_prompts = MAX_COLUMNS // job.num_images * job.num_images
    return contact_sheet(rows, job.texts, whole_prompts or MAX_COLUMNS)


def _table(results: Mapping[str, Result], conditions: str) -> Table:
    """Table with one row a policy. `conditions` is the caption: the settings of the measurement."""
    table = Table(box=box.SIMPLE_HEAD, caption=conditions, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    peaks = [decimal(result.peak_device_bytes) for result in results.values() if result.peak_device_bytes is not None]
    titles = ["visual\ntokens", "K and V\nnow", "full\ncache", "ratio", "beside\nK and V", "tokens/s", "seconds"]
    for title in [*titles, *(["GPU\npeak"] if peaks else [])]:
        table.add_column(title, justify="right", no_wrap=True)
    for index, (name, result) in enumerate(results.items()):
        memory = result.memory
        sizes = decimal(memory.key_value), decimal(memory.full_cache), result.ratio, decimal(memory.bookkeeping)
        speed = result.speed, f"{result.seconds:.1f}"
        table.add_row(name, str(result.tokens.numel()), *sizes, *speed, *peaks[index : index + 1])
    return table


def _conditions(job: Job, generator: Generator, batch_size: int) -> str:
    sampling = job.sampling
    return (
        f"{job.checkpoint.name} on {job.device}, {str(job.dtype).removeprefix('torch.')}, {len(job.texts)} image(s) a "
        f"policy, batch {min(batch_size, len(job.texts))}, guidance {sampling.guidance_scale:g}, "
        f"temperature {sampling.temperature:g}, seed {sampling.seed}{described(job.caches)}"
    )
