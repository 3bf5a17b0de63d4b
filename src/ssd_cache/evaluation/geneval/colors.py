"""Classifies the colour of an object: CLIP compares its pixels with the names of ten colours.

There is one classifier per class, made at first use. The object is cut out by its mask, on a grey background. PIL
resizes the crop on every machine, as in GenEval. CLIP runs in float32, where the official script uses autocast.
`rules.py` decides which objects are classified.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from ssd_cache.evaluation.geneval.prompts import COLORS
from ssd_cache.evaluation.geneval.rules import Detection
from ssd_cache.evaluation.judge_models import CLIP, load_clip

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)


class ColorClassifier:
    """A colour classifier based on CLIP.

    Attributes:
        name: the checkpoint, for results.
        model: in float32 and evaluation mode.
        processor: resizes the shortest side and crops the centre, so the ends of long objects are cut off.
    """

    def __init__(self, model, processor, name: str):
        self.model, self.processor, self.name = model.float().eval(), processor, name
        self._weights: dict[str, torch.Tensor] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path = CLIP, *, device: str | torch.device = "auto") -> ColorClassifier:
        """Load a CLIP from a folder or the Hub.

        Raises:
            ValueError: another kind of model, or weights are missing.
            OSError: it cannot be found.
        """
        model, processor = load_clip(source, device=device)
        return cls(model, processor, str(source))

    @torch.inference_mode()
    def weights(self, class_name: str) -> torch.Tensor:
        """Text features of the ten colours for a class, `[colours, features]`, each of length 1."""
        if class_name not in self._weights:
            texts = [template.format(color=color, name=class_name) for color in COLORS for template in TEMPLATES]
            inputs = self.processor.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
            features = F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)
            means = features.view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._weights[class_name] = F.normalize(means, dim=-1)
        return self._weights[class_name]

    @torch.inference_mode()
    def logits(self, image: Image.Image, objects: Sequence[Detection], class_name: str) -> torch.Tensor:
        """Similarity of each object of a class to each colour, `[objects, colours]`."""
        crops = [cut_out(image, item) for item in objects]
        inputs = self.processor.image_processor(images=crops, return_tensors="pt")
        features = self.model.get_image_features(inputs["pixel_values"].to(self.model.device)).pooler_output
        return 100 * F.normalize(features, dim=-1) @ self.weights(class_name).T

    def classify(self, image: Image.Image, objects: Sequence[Detection], class_name: str) -> list[str]:
        """The colour of each object of a class in an image."""
        if not objects:
            return []
        return [COLORS[index] for index in self.logits(image, objects, class_name).argmax(-1).tolist()]


def cut_out(image: Image.Image, item: Detection) -> Image.Image:
    """Crop an RGB image to an object's box, with all pixels outside its mask grey."""
    if item.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, BACKGROUND), Image.fromarray(item.mask))
    return image.crop(item.box)  # rounds to whole pixels
