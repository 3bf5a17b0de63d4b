"""FID between a folder of images and a folder of references, and CLIPScore of images and their captions.

FID is torchmetrics' own class. A missing package, missing weights or an unreadable image are an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ssd_cache.evaluation.image_folders import FolderImage
from ssd_cache.evaluation.judge_models import CLIP, decode_image, load_clip
from ssd_cache.io.showing import ReadableError, first_line
from ssd_cache.models.settings import resolve_device

USUAL_FID = 10_000
"""With fewer images, an FID is far too high: FID grows as the sets get smaller."""


class MetricsError(ReadableError):
    """Images that cannot be measured, or a missing package or weights; the message gives a remedy."""


@dataclass(frozen=True)
class MetricResult:
    """The value of a metric, with the images that it covers.

    Attributes:
        name: the metric, and the model of its features.
        value: the number.
        num_images: number of images; for FID those of the first folder.
        num_references: for FID, number of reference images.
        num_cut: for CLIPScore, prompts longer than the model's limit, which were truncated.
    """

    name: str
    value: float
    num_images: int
    num_references: int = 0
    num_cut: int = 0


def fid(
    images: Sequence[FolderImage],
    references: Sequence[FolderImage],
    extractor: torch.nn.Module | None = None,
    *,
    name: str = "Inception-V3",
    device: str | torch.device = "auto",
    progress: bool = True,
) -> MetricResult:
    """The Fréchet distance between the features of two sets of images (Heusel et al., arXiv 1706.08500).

    Args:
        images: images, as from `find_images`; they are passed in their original size, and the extractor resizes them.
        references: likewise; crop them to squares first if the reference must be square.
        extractor: from uint8 `[1, 3, height, width]` to features `[1, n]`; see `load_inception`.
            Default: torch-fidelity's Inception-V3 with the weights of the original FID.
        name: name of the feature model, for the result.
        device: device of the extractor.
        progress: show a progress bar over images.

    Raises:
        MetricsError: fewer than two images in a set, an unreadable image, a missing package, or weights that are not
            available.
    """
    if min(len(images), len(references)) < 2:
        raise MetricsError(f"{len(images)} images and {len(references)} references: FID needs two or more of each")
    where = resolve_device(device)
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(
            **{"feature": 2048, "antialias": False} if extractor is None else {"feature": extractor.eval()}
        ).to(where)
    except (ImportError, OSError, RuntimeError) as error:  # no package, no download, torchvision for another torch
        raise MetricsError(
            f"FID needs torchmetrics and an Inception-V3 ({first_line(error)}): pip install -e '.[eval]' "
            "torch-fidelity in a clone of ssd-cache, or give a TorchScript Inception (--inception, load_inception)"
        ) from error
    with torch.inference_mode():
        for is_real, given in ((True, references), (False, images)):
            for _, image in _opened(given, "FID" if progress else None):
                metric.update(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(where), real=is_real)
        value = metric.compute().item()
    return MetricResult(f"FID ({name})", value, len(images), len(references))


def load_inception(path: str | Path, *, device: str | torch.device = "auto") -> torch.nn.Module:
    """Load an extractor for `fid` from a TorchScript file such as StyleGAN's `inception-2015-12-05.pt`.

    It does not need torchvision. Its `forward(images, return_features=True)` takes uint8 images and returns the
    features before the classifier.

    Raises:
        MetricsError: the file cannot be read as TorchScript.
    """
    return _Features(load_torchscript(path, device, "StyleGAN's inception-2015-12-05.pt")).eval()


def load_torchscript(path: str | Path, device: str | torch.device, example: str) -> torch.nn.Module:
    """Load a TorchScript file; raises MetricsError, with an `example` of a file, if it is not one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated; the files use it
            return torch.jit.load(str(path), map_location=resolve_device(device)).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise MetricsError(f"{path} is not a TorchScript file ({first_line(error)}); give {example}") from error


class _Features(torch.nn.Module):
    """Returns the features of an Inception in StyleGAN's format."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images, return_features=True)


def clip_score(
    captioned: Sequence[FolderImage],
    source: str | Path = CLIP,
    *,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> MetricResult:
    """Mean of 100 times the cosine between an image and its caption (Hessel et al., arXiv 2104.08718), at least 0.

    Args:
        captioned: images with their captions, as from `find_captioned`.
        source: a CLIP model in a folder or on the Hub; it sees the middle square of an image.
        device: device of the model.
        progress: show a progress bar over images.

    Raises:
        MetricsError: an unreadable image.
        ValueError: the model is not a CLIP, or its weights are incomplete.
        OSError: the model cannot be found.
    """
    model, processor = load_clip(source, device=device)
    longest = model.config.text_config.max_position_embeddings
    cosines, num_cut = [], 0
    with torch.inference_mode():
        for one, image in _opened(captioned, "CLIPScore" if progress else None):
            num_cut += len(processor.tokenizer(one.caption)["input_ids"]) > longest
            inputs = processor(text=one.caption, images=image, truncation=True, max_length=longest, return_tensors="pt")
            outputs = model(**inputs.to(model.device))
            cosines.append(torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds).item())
    value = max(0.0, 100 * sum(cosines) / len(cosines))
    return MetricResult(f"CLIPScore ({source})", value, len(cosines), num_cut=num_cut)


def _opened(images: Sequence[FolderImage], title: str | None) -> Iterator[tuple[FolderImage, Image.Image]]:
    """Yield each image with its pixels, RGB; shows a bar if it has a title."""
    for one in tqdm(images, desc=title, unit=" images", disable=title is None):
        yield one, decode_image(one.path.read_bytes(), one.path)
