"""GenEval's images as a set to generate: four of each prompt, in the order of the prompt file.

The order, and therefore the batches, are those of `SampleFolder`. `evaluation/export.py` generates the images.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ssd_cache.evaluation.geneval.folder import SampleFolder


class GenEvalPictures:
    """The images of a `SampleFolder`, numbered; a `PictureSet`."""

    unit = 1

    def __init__(self, folder: SampleFolder):
        self.folder, self.root, self._places = folder, folder.root, list(folder)
        self.texts: Sequence[str] = [str(folder.prompts[prompt]) for prompt, _ in self._places]

    @property
    def prompts(self) -> str:
        """The lines of the prompt file for these images."""
        return "".join(prompt.to_json() + "\n" for prompt in self.folder.prompts)

    def missing(self, numbers: range) -> list[int]:
        return [number for number in numbers if not self.folder.picture(*self._places[number]).is_file()]

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        missing = set(self.missing(numbers))
        for number, image in zip(numbers, images, strict=True):
            if number in missing:
                self.folder.write(*self._places[number], image.convert("RGB"))
