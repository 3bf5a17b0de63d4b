"""The detector: transformers' Mask2Former with the pre- and post-processing of GenEval's mmdet 2.x, in float32.

It starts from the raw logits. transformers' image processor is not used, because it stretches images to multiples of
32; nor is its post-processing, because it paints overlapping objects over each other. The weights are transformers',
not mmdet's, so scores are never official GenEval scores. `rules.py` decides which detections count.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from ssd_cache.evaluation.geneval.prompts import CLASSES
from ssd_cache.evaluation.geneval.rules import Detection
from ssd_cache.evaluation.judge_models import load_judge

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
"""The closest to GenEval's own: the same architecture and training images, other weights."""

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SHORT_SIDE, LONG_SIDE, MULTIPLE = 800, 1333, 32
MAX_DETECTIONS = 100
CHUNK = 16  # masks resized to full size at once


@dataclass
class Detector:
    """Mask2Former with GenEval's pre- and post-processing.

    Attributes:
        model: in float32 and evaluation mode.
        name: the checkpoint, for results.
        short_side, long_side: limits of the input; an image is resized to the largest size within both, in proportion.
    """

    model: Mask2FormerForUniversalSegmentation
    name: str
    short_side: int = SHORT_SIDE
    long_side: int = LONG_SIDE

    @classmethod
    def from_pretrained(
        cls, source: str | Path = DETECTOR, *, device: str | torch.device = "auto", **sizes: int
    ) -> Detector:
        """Load a Mask2Former of COCO's 80 classes from a folder or the Hub; `sizes` are `short_side` and `long_side`.

        Raises:
            ImportError: scipy is missing; transformers' Mask2Former needs it.
            ValueError: another kind of model, or weights are missing.
            OSError: it cannot be found.
        """
        if find_spec("scipy") is None:
            raise ImportError(
                "GenEval's detector needs scipy, not installed here: pip install -e '.[eval]' in a clone of ssd-cache"
            )
        model = load_judge(
            Mask2FormerForUniversalSegmentation, source, kind="mask2former", dtype="float32", device=device
        )
        if model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"{source}: a detector of {model.config.num_labels} classes, GenEval needs COCO's {len(CLASSES)}; give "
                f"an instance segmentation checkpoint such as {DETECTOR}"
            )
        return cls(model, str(source), **sizes)

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Detection]:
        """The 100 best (query, class) pairs in an image, sorted by class probability; no threshold is applied."""
        pixels, resized = prepare(image, self.short_side, self.long_side)
        outputs = self.model(pixel_values=pixels.to(self.model.device))
        return read_detections(
            outputs.class_queries_logits[0].float(),
            outputs.masks_queries_logits[0].float(),
            padded=(pixels.shape[2], pixels.shape[3]),
            resized=resized,
            original=(image.height, image.width),
        )


def prepare(
    image: Image.Image, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pixels `[1, 3, padded height, padded width]` for the model, and (height, width) of the image in them.

    The image is resized bilinearly without antialiasing, as in OpenCV, and rounded to whole numbers; then normalised;
    then padded with zeros on the right and below to multiples of 32. An image 512 wide and 384 high becomes 1067 x 800
    in 1088 x 800.
    """
    rgb = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    scale = min(long_side / max(image.size), short_side / min(image.size))
    height, width = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
    rgb = F.interpolate(rgb, size=(height, width), mode="bilinear", align_corners=False).round()
    pixels = (rgb - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    return F.pad(pixels, (0, -width % MULTIPLE, 0, -height % MULTIPLE)), (height, width)


def read_detections(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
) -> list[Detection]:
    """At most 100 detections of one image, with masks `[height, width]` of its original size.

    A score is the probability of the class times the mean probability of the pixels in the mask. The logits are resized
    to the image's original size; the mask is where they are above 0. One query can give several classes. An empty mask
    has score 0.

    Args:
        class_logits: `[queries, classes + 1]`, the last of them "no object".
        mask_logits: `[queries, height / 4, width / 4]` of the padded image.
        padded: (height, width) of the model's input.
        resized: of the image inside it, before padding.
        original: of the image before it was resized.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    best = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    queries = best.indices // num_classes
    used, place = queries.unique(return_inverse=True)
    masks, certainty = [], []
    for chunk in used.split(CHUNK):
        logits = F.interpolate(mask_logits[chunk][None], size=padded, mode="bilinear", align_corners=False)
        logits = logits[..., : resized[0], : resized[1]]
        logits = F.interpolate(logits, size=original, mode="bilinear", align_corners=False)[0]
        inside = logits > 0
        certainty.append((logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6))
        masks.append(inside.cpu())
    scores = (best.values * torch.cat(certainty)[place]).tolist()
    bodies = list(torch.cat(masks).numpy())
    boxes = [_box_of(body) for body in bodies]
    return [
        Detection(label, score, boxes[index], bodies[index])
        for label, score, index in zip((best.indices % num_classes).tolist(), scores, place.tolist(), strict=True)
    ]


def _box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The bounding box of a mask `[height, width]`, ends exclusive; all zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
