"""Numbered PNG files, each with its metadata: an `ImageSet` for prompts that belong to no benchmark.

The name of a file is the number of its image, so prompts may hold any characters. Each file carries its metadata in a
PNG text chunk, as JSON, and `metadata.jsonl` lists the files that are there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ssd_cache.evaluation.image_folders import CAPTIONS_FILE
from ssd_cache.io.writing import write_files

CHUNK = "ssd-cache"
"""Keyword of the PNG text chunk with the metadata, an ASCII JSON object."""


def batch_seed(seed: int, batch: int) -> int:
    """torch's seed for a batch, the same as in every version of `ssd-cache generate`."""
    return seed + batch


@dataclass
class ImageFiles:
    """The images of some prompts under one policy, `num_images` of each; `facts` are metadata that all share."""

    root: Path
    texts: Sequence[str]
    num_images: int
    batch_size: int
    seed: int
    facts: Mapping[str, Any]
    unit: int = 1

    def path(self, number: int) -> Path:
        """The file of an image, counted from 0; a file that exists is complete."""
        return self.root / f"{number:05}.png"

    def missing(self, numbers: range) -> list[int]:
        """Numbers of the images that do not exist yet."""
        return [number for number in numbers if not self.path(number).exists()]

    def metadata(self, number: int) -> str:
        """The settings that an image was generated with, as JSON. The images of a batch share its seed."""
        batch = number // self.batch_size
        own = {
            "file_name": self.path(number).name,
            "prompt": self.texts[number],
            "index": number,
            "sample": number % self.num_images,
            "seed": self.seed,
            "batch": batch,
            "batch_seed": batch_seed(self.seed, batch),
        }
        return json.dumps({**own, **self.facts})

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write the images of a batch that do not exist yet, each completely or not at all."""
        for number in self.missing(numbers):
            text, content = PngImagePlugin.PngInfo(), io.BytesIO()
            text.add_text(CHUNK, self.metadata(number))
            images[number - numbers.start].save(content, format="PNG", pnginfo=text)
            write_files({self.path(number): content.getvalue()})

    def write_list(self) -> int:
        """Write `metadata.jsonl`, one line for each existing image; returns their number."""
        existing = [number for number in range(len(self.texts)) if self.path(number).exists()]
        lines = "".join(f"{self.metadata(number)}\n" for number in existing)
        write_files({self.root / CAPTIONS_FILE: lines.encode()})
        return len(existing)
