"""Tells the colour of an object: CLIP compares its pixels with ten colours in words.

One classifier a class, made when it is first needed. The object is cut out by its mask, on grey. The crop is resized by
PIL on every machine, as in GenEval's own; it runs in float32, where the official script has autocast. Which objects are
asked about is `rules.py`'s decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ssd_cache.evaluation.clip import CLIP, load_clip
from ssd_cache.evaluation.geneval.names import COLORS
from ssd_cache.evaluation.geneval.rules import Detection

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)


class ColorClassifier:
    """CLIP as a judge of colours.

    Attributes:
        name: the checkpoint, for results.
        model: in float32 and evaluation mode.
        processor: resizes the shortest side and cuts out the middle, so that long objects lose their ends.
    """

    def __init__(self, model, processor, name: str):
        self.model, self.processor, self.name = model.float().eval(), processor, name
        self._weights: dict[str, torch.Tensor] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path = CLIP, *, device: str | torch.device = "auto") -> ColorClassifier:
        """Load a CLIP from a folder or the Hub.

        Raises:
            ValueError: another kind of model, or one whose weights are not all there.
            OSError: it can not be found.
        """
        model, processor = load_clip(source, device=device)
        return cls(model, processor, str(source))

    @torch.inference_mode()
    def weights(self, class_name: str) -> torch.Tensor:
        """The ten colours of a class in words, `[colours, features]`, each of length 1."""
        if class_name not in self._weights:
            texts = [template.format(color=color, name=class_name) for color in COLORS for template in TEMPLATES]
            inputs = self.processor.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            features = F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
            means = features.view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._weights[class_name] = F.normalize(means, dim=-1)
        return self._weights[class_name]

    @torch.inference_mode()
    def logits(self, image: Image.Image, objects: Sequence[Detection], class_name: str) -> torch.Tensor:
        """How near each object of a class is to each colour, `[objects, colours]`."""
        crops = [cut_out(image, item) for item in objects]
        inputs = self.processor.image_processor(images=crops, return_tensors="pt")
        features = self.model.get_image_features(inputs["pixel_values"].to(self.model.device)).pooler_output
        return 100 * F.normalize(features, dim=-1) @ self.weights(class_name).T

    def classify(self, image: Image.Image, objects: Sequence[Detection], class_name: str) -> list[str]:
        """The colour of each object of a class in a picture."""
        if not objects:
            return []
        return [COLORS[index] for index in self.logits(image, objects, class_name).argmax(-1).tolist()]


def cut_out(image: Image.Image, item: Detection) -> Image.Image:
    """An object alone: its box, with all pixels outside its mask grey.

    Raises:
        ValueError: a mask of another size than the picture, or a box without a pixel.
    """
    image = image.convert("RGB")
    if item.mask is not None:
        if item.mask.shape != (image.height, image.width):
            raise ValueError(
                f"the mask is {item.mask.shape[1]} x {item.mask.shape[0]}, the picture {image.width} x {image.height}; "
                "give masks of the picture's size"
            )
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(item.mask))
    crop = image.crop(item.box)  # rounds to whole pixels
    if not all(crop.size):
        raise ValueError(
            f"the box {item.box} has no pixel in it; give boxes (left, top, right, bottom) of a pixel or more"
        )
    return crop
