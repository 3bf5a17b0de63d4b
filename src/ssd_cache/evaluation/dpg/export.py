"""DPG-Bench's images as a set to generate: four of each prompt, written as one sheet.

`evaluation/export.py` generates them; `sheet.py` defines the sheet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ssd_cache.evaluation.dpg.sheet import PICTURES, write_sheet


class DPGPictures:
    """The numbered images of a set of prompts; a `PictureSet`.

    Args:
        root: the folder of the sheets, `<item_id>.png`.
        prompts: prompts by item id, as `read_prompts` returns them.
    """

    unit = PICTURES

    def __init__(self, root: str | Path, prompts: Mapping[str, str]):
        self.root, self._items = Path(root), list(prompts.items())
        self.texts: Sequence[str] = [text for text in prompts.values() for _ in range(PICTURES)]

    @property
    def prompts(self) -> str:
        """The prompts as JSON lines that `read_prompts` can read."""
        return "".join(
            json.dumps({"item_id": item_id, "prompt": text}, ensure_ascii=False) + "\n" for item_id, text in self._items
        )

    def missing(self, numbers: range) -> list[int]:
        return [number for number in numbers if not self._sheet(number).is_file()]

    def write(self, numbers: range, images: Sequence[Image.Image]) -> None:
        missing = set(self.missing(numbers))
        for offset in range(0, len(numbers), PICTURES):
            if numbers[offset] in missing:
                item_id, _ = self._items[numbers[offset] // PICTURES]
                write_sheet(self.root, item_id, images[offset : offset + PICTURES])

    def _sheet(self, number: int) -> Path:
        return self.root / f"{self._items[number // PICTURES][0]}.png"
