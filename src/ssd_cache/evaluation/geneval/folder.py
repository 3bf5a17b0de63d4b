"""GenEval's image folder, as the official scorer reads it: `00000/metadata.jsonl`, `00000/samples/00000.png`, ...

It writes images, lists missing ones, and refuses an incomplete folder: the official scorer silently takes the mean
over the images it finds. Generating and scoring are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.evaluation.geneval.prompts import GenEvalPrompt, parse_prompt
from ssd_cache.evaluation.judge_models import encode_png
from ssd_cache.io.showing import ReadableError, first_names, shown
from ssd_cache.io.writing import write_files

NUM_SAMPLES = 4
"""Images per prompt, by convention: 553 x 4 = 2212 in all."""


class SampleFolder:
    """The images of some prompts in one folder; the constructor reads and writes no files.

    Images are numbered: image `n` is sample `n % num_samples` of prompt `n // num_samples`.

    Attributes:
        root: the folder.
        prompts: those of the prompt file in its order; a prompt's number is its index, from 0.
        num_samples: images per prompt.
        texts: the text to generate each image from.
        unit: number of images that are written together.
    """

    unit = 1

    def __init__(self, root: str | Path, prompts: Sequence[GenEvalPrompt], num_samples: int = NUM_SAMPLES):
        if not prompts:
            raise ValueError("prompts is empty: give the prompts of GenEval's file (see read_prompts)")
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples!r}: give a whole number from 1 up; {NUM_SAMPLES} is usual")
        self.root, self.prompts, self.num_samples = Path(root), tuple(prompts), num_samples
        self.texts: Sequence[str] = [self.prompt_of(number).prompt for number in range(len(self))]

    def __len__(self) -> int:
        """Number of images in the complete folder."""
        return len(self.prompts) * self.num_samples

    def prompt_lines(self) -> str:
        """The prompts as JSON lines that `read_prompts` can read."""
        return "".join(prompt.to_json() + "\n" for prompt in self.prompts)

    def prompt_of(self, number: int) -> GenEvalPrompt:
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

    def missing(self, numbers: range | None = None) -> list[int]:
        """Numbers of the images that are still to be generated, of all images or of some."""
        numbers = range(len(self)) if numbers is None else numbers
        return [number for number in numbers if not self.path(number).is_file()]

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        """Write those of some images that are missing, each completely or not at all, after their metadata.jsonl.

        Raises:
            ValueError: the folder holds images of another prompt.
            OSError: an image cannot be written.
        """
        for number in self.missing(numbers):
            prompt, path = number // self.num_samples, self.path(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._metadata(prompt).exists():
                self._check_metadata(prompt)
            else:
                write_files({self._metadata(prompt): f"{self.prompts[prompt].to_json()}\n".encode()})
            write_files({path: encode_png(images[numbers.index(number)])})

    def check_complete(self) -> None:
        """Refuse a folder for which the official scorer would compute a wrong mean.

        Raises:
            ValueError: an image or metadata.jsonl is missing or of another prompt, or there are unexpected images.
        """
        wanted = f"{len(self)} images ({len(self.prompts)} prompts x {self.num_samples})"
        if missing := self.missing():
            names = first_names(list(map(self.name, missing)))
            raise ReadableError(f"{self.root}: {len(self) - len(missing)} of {wanted}; missing: {names}; generate them")
        expected = set(map(self.name, range(len(self))))
        found = [path for path in self.root.glob("*/samples/*.png") if path.parts[-3].isdigit() and path.stem.isdigit()]
        if extra := sorted({path.relative_to(self.root).as_posix() for path in found} - expected):
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
        path, wanted = self._metadata(prompt), self.prompts[prompt]
        found = parse_prompt(path.read_text("utf-8"), str(path)) if path.is_file() else None
        if found != wanted:
            known = "unknown" if found is None else f"{shown(found.prompt)} ({found.tag})"
            raise ReadableError(
                f"{path}: the prompt of the images is {known}, but prompt {prompt} is {shown(wanted.prompt)} "
                f"({wanted.tag}); give the prompt file they were generated from, or another folder"
            )
