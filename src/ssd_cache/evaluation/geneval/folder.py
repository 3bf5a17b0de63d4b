"""GenEval's image folder, as the official scorer reads it: `00000/metadata.jsonl`, `00000/samples/00000.png`, ...

An incomplete folder is refused: the official scorer silently takes the mean over the images that it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from PIL import Image

from ssd_cache.evaluation.export import ImageSet
from ssd_cache.io.showing import ReadableError, first_names, shown
from ssd_cache.io.untrusted import parse_json, read_bytes
from ssd_cache.io.writing import write_files

NUM_SAMPLES = 4
"""Images per prompt, by convention: 553 x 4 = 2212 in all."""


class Prompt(Protocol):
    """A line of a prompt file: the text to generate from, and the whole line as JSON."""

    @property
    def prompt(self) -> str: ...

    def to_json(self) -> str: ...


P = TypeVar("P", bound=Prompt)


class SampleFolder(ImageSet, Generic[P]):
    """The images of some prompts in one folder: image `n` is sample `n % num_samples` of prompt `n // num_samples`.

    The constructor reads and writes no files. `prompts` are those of the prompt file in its order.
    """

    def __init__(self, root: str | Path, prompts: Sequence[P], num_samples: int = NUM_SAMPLES):
        if not prompts:
            raise ValueError("prompts is empty: give the prompts of a file (see read_prompts)")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples!r}: give a whole number from 1 up; {NUM_SAMPLES} is usual")
        self.root, self.prompts, self.num_samples = Path(root), tuple(prompts), num_samples
        self.texts: Sequence[str] = [prompt.prompt for prompt in prompts for _ in range(num_samples)]

    def prompt_of(self, number: int) -> P:
        """The prompt of an image."""
        return self.prompts[number // self.num_samples]

    def path(self, number: int) -> Path:
        """The path of an existing image, in either official spelling, or else the path that it is written to."""
        prompt, sample = divmod(number, self.num_samples)
        samples = self.root / f"{prompt:05d}" / "samples"
        short = samples / f"{sample:04d}.png"  # spelling of GenEval's README; its sample script writes five digits
        return short if short.is_file() else samples / f"{sample:05d}.png"

    def name(self, number: int) -> str:
        """The path of an image below the root, with slashes."""
        return self.path(number).relative_to(self.root).as_posix()

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write those of some images that are missing, after the metadata.jsonl of their prompts.

        Raises:
            ValueError: the folder holds images of another prompt.
            OSError: an image cannot be written.
        """
        for prompt in dict.fromkeys(number // self.num_samples for number in self.missing(numbers)):
            if self._metadata(prompt).exists():
                self._check_metadata(prompt)
            else:
                write_files({self._metadata(prompt): f"{self.prompts[prompt].to_json()}\n".encode()})
        super().write(numbers, images)

    def check_complete(self) -> None:
        """Refuse a folder for which the official scorer would compute a wrong mean.

        Raises:
            ValueError: an image or metadata.jsonl is missing or of another prompt, or there are unexpected images.
        """
        numbers = range(len(self.texts))
        wanted = f"{len(numbers)} images ({len(self.prompts)} prompts x {self.num_samples})"
        if missing := [self.name(number) for number in self.missing(numbers)]:
            raise ReadableError(
                f"{self.root}: {len(numbers) - len(missing)} of {wanted}; missing: {first_names(missing)}; generate "
                "them"
            )
        expected = set(map(self.path, numbers))
        found = [path for path in self.root.glob("*/samples/*.png") if path.parts[-3].isdigit() and path.stem.isdigit()]
        if extra := sorted(path.relative_to(self.root).as_posix() for path in set(found) - expected):
            raise ReadableError(
                f"{self.root}: not only the expected {wanted}, but also {first_names(extra)}; remove them, or give the "
                "prompts and num_samples that they were generated with"
            )
        for prompt in range(len(self.prompts)):
            self._check_metadata(prompt)

    def _metadata(self, prompt: int) -> Path:
        return self.root / f"{prompt:05d}" / "metadata.jsonl"

    def _check_metadata(self, prompt: int) -> None:
        """Check that the folder of a prompt holds images of this prompt."""
        path, wanted = self._metadata(prompt), parse_json(self.prompts[prompt].to_json())
        found = parse_json(read_bytes(path)) if path.is_file() else None
        if found != wanted:
            raise ReadableError(
                f"{path}: the images are of {shown(found)}, but prompt {prompt} is {shown(wanted)}; give the prompt "
                "file they were generated from, or another folder"
            )
