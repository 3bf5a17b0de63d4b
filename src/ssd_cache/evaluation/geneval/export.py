"""GenEval's pictures as a set to draw: four of each prompt, in the order of the prompt file.

The order, and so the batches, are those of `SampleFolder`. The drawing is `evaluation.export`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ssd_cache.evaluation.geneval.folder import SampleFolder


class GenEvalPictures:
    """The pictures of a `SampleFolder`, numbered; a `PictureSet`."""

    unit = 1

    def __init__(self, folder: SampleFolder):
        self.folder, self.root, self._places = folder, folder.root, list(folder)
        self.texts: Sequence[str] = [str(folder.prompts[prompt]) for prompt, _ in self._places]

    @property
    def prompts(self) -> str:
        """The lines of the prompt file that they are of."""
        return "".join(prompt.to_json() + "\n" for prompt in self.folder.prompts)

    def missing(self, numbers: range) -> list[int]:
        return [number for number in numbers if not self.folder.picture(*self._places[number]).is_file()]

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        missing = set(self.missing(numbers))
        for number, image in zip(numbers, images, strict=True):
            if number in missing:
                self.folder.write(*self._places[number], image.convert("RGB"))
