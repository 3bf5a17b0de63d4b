"""GenEval's image folder, as the official scorer reads it: `00000/metadata.jsonl`, `00000/samples/00000.png`, ...

It writes images, lists missing ones, and refuses an incomplete folder: the official scorer silently takes the mean
over the images it finds. Generating and scoring are done elsewhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.evaluation.geneval.prompts import GenEvalPrompt, parse_prompt
from ssd_cache.io.showing import shown
from ssd_cache.io.writing import write_files

NUM_SAMPLES = 4
"""Images per prompt, by convention: 553 x 4 = 2212 in all."""

_PICTURE = re.compile(r"(\d+)\.png")
_SHOWN = 5


class SampleFolder:
    """The images of some prompts in one folder; the constructor reads and writes no files.

    Attributes:
        root: the folder.
        prompts: those of the prompt file in its order; a prompt's number is its index, from 0.
        num_samples: images per prompt.
    """

    def __init__(self, root: str | Path, prompts: Sequence[GenEvalPrompt], num_samples: int = NUM_SAMPLES):
        if not prompts:
            raise ValueError("prompts is empty: give the prompts of GenEval's file (see read_prompts)")
        if type(num_samples) is not int or num_samples < 1:
            raise ValueError(f"num_samples={num_samples!r}: give a whole number from 1 up; {NUM_SAMPLES} is usual")
        self.root, self.prompts, self.num_samples = Path(root), tuple(prompts), num_samples

    def __len__(self) -> int:
        """Number of images in the complete folder."""
        return len(self.prompts) * self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(prompt, sample) of every image, in order, including missing ones."""
        return ((prompt, sample) for prompt in range(len(self.prompts)) for sample in range(self.num_samples))

    def prompt_folder(self, prompt: int) -> Path:
        """The folder of one prompt."""
        return self.root / f"{prompt:05d}"

    def picture(self, prompt: int, sample: int) -> Path:
        """The path of an existing image, in either official spelling, or else the path that it is written to."""
        samples = self.prompt_folder(prompt) / "samples"
        short = samples / f"{sample:04d}.png"  # spelling of GenEval's README; its sample script writes five digits
        return short if short.is_file() else samples / f"{sample:05d}.png"

    def name(self, prompt: int, sample: int) -> str:
        """The path of an image below the root, with slashes."""
        return self.picture(prompt, sample).relative_to(self.root).as_posix()

    def write(self, prompt: int, sample: int, image: Image.Image) -> None:
        """Write one image, after its prompt's metadata.jsonl; each file is written completely or not at all.

        Raises:
            ValueError: the image is not RGB, a number is out of range, or the folder holds another prompt.
            OSError: it cannot be written.
        """
        if not 0 <= prompt < len(self.prompts) or not 0 <= sample < self.num_samples:
            raise ValueError(
                f"prompt {prompt}, sample {sample} is out of range: this folder has prompts 0 to "
                f"{len(self.prompts) - 1} and samples 0 to {self.num_samples - 1}"
            )
        if image.mode != "RGB":
            raise ValueError(f"the picture is of mode {image.mode!r}; GenEval reads RGB: give image.convert('RGB')")
        folder = self.prompt_folder(prompt)
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        metadata = folder / "metadata.jsonl"
        if metadata.exists():
            self._check_metadata(prompt)
        else:
            write_files({metadata: (self.prompts[prompt].to_json() + "\n").encode()})
        content = io.BytesIO()
        image.save(content, format="PNG")
        write_files({self.picture(prompt, sample): content.getvalue()})

    def missing(self) -> list[tuple[int, int]]:
        """(prompt, sample) of the images that are still to be generated, in order."""
        return [place for place in self if not self.picture(*place).is_file()]

    def check_complete(self) -> None:
        """Refuse a folder for which the official scorer would compute a wrong mean.

        Raises:
            ValueError: an image or metadata.jsonl is missing or of another prompt, or there are unexpected images.
        """
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder; draw the pictures first")
        if missing := self.missing():
            raise ValueError(
                f"{self.root}: {len(self) - len(missing)} of {len(self)} pictures ({len(self.prompts)} prompts x "
                f"{self.num_samples}); missing: {_some([self.name(*place) for place in missing])}; draw them"
            )
        if extra := self._extra():
            raise ValueError(
                f"{self.root}: besides the {len(self)} pictures asked for ({len(self.prompts)} prompts x "
                f"{self.num_samples}) there are {_some(extra)}; remove them, or give the prompts and num_samples they "
                "were drawn with"
            )
        for prompt in range(len(self.prompts)):
            self._check_metadata(prompt)

    def _extra(self) -> list[str]:
        """Images that the official scorer would read and `check_complete` does not expect."""
        wanted = {self.name(*place) for place in self}
        extra = []
        for folder in sorted(path for path in self.root.iterdir() if path.name.isdigit() and path.is_dir()):
            found = [f"{folder.name}/samples/{path.name}" for path in sorted((folder / "samples").glob("*.png"))]
            extra += [name for name in found if name not in wanted and _PICTURE.fullmatch(name.rpartition("/")[2])]
        return extra

    def _check_metadata(self, prompt: int) -> None:
        path = self.prompt_folder(prompt) / "metadata.jsonl"
        try:
            found = parse_prompt(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: the prompt of these pictures can not be read ({error}); draw them anew"
            ) from error
        if found != self.prompts[prompt]:
            raise ValueError(
                f"{path}: the pictures are of {shown(found.prompt)} ({found.tag}), but prompt {prompt} is "
                f"{shown(self.prompts[prompt].prompt)} ({self.prompts[prompt].tag}); give the prompt file they were "
                "drawn from, or another folder"
            )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
