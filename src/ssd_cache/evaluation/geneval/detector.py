"""The detector: transformers' Mask2Former, fed and read as GenEval's mmdet 2.x does it, from raw logits and in float32.

Neither transformers' image processor (it stretches to multiples of 32) nor its post-processing (it paints overlapping
objects over each other) is used. The weights are transformers' own, not mmdet's, so scores are never official
GenEval's. Which detections count is `rules.py`'s decision.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

from ssd_cache.evaluation.geneval.names import CLASSES
from ssd_cache.evaluation.geneval.rules import Detection
from ssd_cache.models.settings import resolve_device

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
"""The nearest to GenEval's own: the same architecture, trained on the same pictures, other weights."""

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SHORT_SIDE, LONG_SIDE, MULTIPLE = 800, 1333, 32
MAX_DETECTIONS = 100

_CHUNK = 16
"""Masks brought to full size at once."""


class Detector:
    """Mask2Former with what GenEval does before and after it.

    Attributes:
        name: the checkpoint, for results.
        model: in float32 and evaluation mode.
        short_side, long_side: what a picture is brought to, keeping its shape: the largest size within both.
    """

    def __init__(self, model, name: str, *, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE):
        if model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"{name}: a detector of {model.config.num_labels} classes, GenEval needs COCO's {len(CLASSES)} in "
                f"COCO's order; give an instance segmentation checkpoint such as {DETECTOR}"
            )
        self.model, self.name = model.float().eval(), name
        self.short_side, self.long_side = short_side, long_side

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = DETECTOR,
        *,
        device: str | torch.device = "auto",
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
    ) -> Detector:
        """Load a Mask2Former of COCO's 80 classes from a folder or the Hub.

        Raises:
            ImportError: scipy is missing; transformers' Mask2Former can not be built without it.
            ValueError: another kind of model, or one whose weights are not all there.
            OSError: it can not be found.
        """
        if find_spec("scipy") is None:
            raise ImportError("GenEval's detector needs scipy, not installed here: pip install 'ssd-cache[eval]'")
        kind = AutoConfig.from_pretrained(source).model_type
        if kind != "mask2former":
            raise ValueError(f"{source}: a {kind!r} model, not 'mask2former'; give one such as {DETECTOR}")
        model, loading = Mask2FormerForUniversalSegmentation.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True
        )
        if missing := sorted(set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()}):
            raise ValueError(f"{source}: {len(missing)} weights are missing, such as {missing[0]}; fetch it anew")
        return cls(model.to(resolve_device(device)), str(source), short_side=short_side, long_side=long_side)

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> list[Detection]:
        """The 100 best pairs of query and class in a picture, the likeliest class first; nothing is cut off."""
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
    """The model's input of a picture, and (height, width) of the picture in it.

    Bilinear without smoothing, as OpenCV does it, to whole numbers; then normalised; then zeros to the right and below
    up to multiples of 32. A square becomes 800 x 800; 512 wide and 384 high becomes 1067 x 800 in 1088 x 800.

    Returns:
        Pixels `[1, 3, padded height, padded width]`, and the size before padding.
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
    """Detections of one picture from the model's raw outputs.

    A score is the probability of the class times the mean probability of the pixels in the mask, which are those whose
    logit is above 0 in the picture's own size. A query can stand for several classes. An empty mask has score 0.

    Args:
        class_logits: `[queries, classes + 1]`, the last of them "no object".
        mask_logits: `[queries, height / 4, width / 4]` of the padded picture.
        padded, resized, original: (height, width) of the model's input, of the picture in it, and of the picture.

    Returns:
        At most 100, masks `[height, width]` of the original.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    best = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    queries = best.indices // num_classes
    used, place = queries.unique(return_inverse=True)
    masks, certainty = [], []
    for chunk in used.split(_CHUNK):
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
    """The box around a mask `[height, width]`, ends excluded; zeros around nothing."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
