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
from ssd_cache.cli.plan import Job
from ssd_cache.cli.sheet import contact_sheet
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

    def cells(self) -> tuple[str, str, str]:
        """Bytes of K and V, how many times larger a full cache is, and visual tokens of all images in a second."""
        ratio = self.memory.full_cache / self.memory.key_value
        return decimal(self.memory.key_value), f"{ratio:.1f}x", f"{self.tokens.numel() / self.seconds:.0f}"


def generate_file(job: Job, place: Path) -> None:
    """Generate all images, write the file, and print the table."""
    generator = job.load()
    batch_size = job.batch_size or job.default_batch_size(generator)
    with job.compiled(generator):
        results = {name: _generate(job, generator, name, cache, batch_size) for name, cache in job.caches.items()}
    if place.suffix.lower() == TOKENS:
        write_files({place: safetensors.torch.save({name: result.tokens for name, result in results.items()})})
        size = f"{len(job.texts)} x {job.checkpoint.num_visual_tokens} tokens"
    else:
        image = _image(job, generator, results)
        save_image(image, place)
        size = f"{image.width} x {image.height}"
    table = Table(box=box.SIMPLE_HEAD, caption=job.words(batch_size), caption_justify="left", padding=(0, 1, 0, 0))
    for title in ("policy", "K and V", "smaller", "tokens/s"):
        table.add_column(title, justify="left" if title == "policy" else "right", no_wrap=True)
    for name, result in results.items():
        table.add_row(name, *result.cells())
    Console(highlight=False, markup=False).print(table)
    typer.echo(f"wrote {place} ({size})")


def _generate(job: Job, generator: Generator, name: str, cache: SSDCache, batch_size: int) -> Result:
    """Generate one image a prompt. Batch number i has the seed `seed + i`."""
    parts, memory, seconds = [], MemoryStats(0, 0, 0), 0.0
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
    cache.reset()
    return Result(torch.cat(parts), seconds, memory)


def _image(job: Job, generator: Generator, results: Mapping[str, Result]) -> Image.Image:
    """The image itself if there is only one, else a contact sheet with one row a policy."""
    images = {name: generator.to_images(result.tokens) for name, result in results.items()}
    [first, *others] = images.values()
    if others:
        label = "{}\n{} of K and V\n{} smaller\n{} tokens/s"
        rows = {label.format(name, *results[name].cells()): images[name] for name in images}
        return contact_sheet(rows, job.texts, MAX_COLUMNS // job.num_images * job.num_images or MAX_COLUMNS)
    columns = job.num_images if job.num_images > 1 else max(2, round(len(first) ** 0.5))
    return first[0] if len(first) == 1 else contact_sheet({"": first}, job.texts, min(columns, MAX_COLUMNS))
