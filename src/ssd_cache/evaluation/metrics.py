"""FID between a folder of images and a folder of references, with torchmetrics' own class.

It generates nothing. A missing package or missing weights are reported, not replaced. `clip_score.py` shares the
batched reading and the result class.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssd_cache.budget import check_count
from ssd_cache.evaluation.picture_folders import Picture
from ssd_cache.io.showing import ReadableError
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
        num_pictures: number of images; for FID those of the first folder.
        num_references: for FID, number of reference images.
        num_cut: for CLIPScore, prompts longer than the model's limit, which were truncated.
        unreadable: images that could not be read, and why; they are left out.
    """

    name: str
    value: float
    num_pictures: int
    num_references: int = 0
    num_cut: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


def fid(
    pictures: Sequence[Picture],
    references: Sequence[Picture],
    extractor: torch.nn.Module | None = None,
    *,
    name: str = "Inception-V3",
    batch_size: int = 16,
    device: str | torch.device = "auto",
    on_picture: Callable[[str], object] | None = None,
) -> MetricResult:
    """The Fréchet distance between the features of two sets of images (Heusel et al., arXiv 1706.08500).

    Args:
        pictures: images, as from `find_pictures`; each is passed at its own size, and the extractor resizes it.
        references: likewise; crop them to squares first if the reference must be square.
        extractor: from uint8 `[batch, 3, height, width]` to features `[batch, n]`; see `load_inception`.
            Default: torch-fidelity's Inception-V3 with the weights of the original FID.
        name: name of the feature model, for the result.
        batch_size: images per forward pass, if they have one size.
        device: device of the extractor.
        on_picture: called with the name of every image after it is processed.

    Raises:
        MetricsError: fewer than two images in a set, a missing package, or weights that are not available.
    """
    check_count("batch_size", batch_size, 1)
    where, network = resolve_device(device), torchmetrics_module("image.fid").FrechetInceptionDistance
    for what, given in (("pictures", pictures), ("references", references)):
        if len(given) < 2:
            raise MetricsError(f"{len(given)} {what}: FID compares covariances; give a folder with two or more")
    metric = _with_own_inception(network) if extractor is None else network(feature=extractor.eval())
    metric = metric.to(where)
    unreadable: dict[str, str] = {}
    counts = []
    with torch.inference_mode():
        for is_real, given in ((True, references), (False, pictures)):
            count = 0
            for _, batch in read_batches(given, batch_size, unreadable, on_picture):
                metric.update(torch.stack(batch).to(where), real=is_real)
                count += len(batch)
            if count < 2:
                raise MetricsError(
                    f"{count} pictures of {len(given)} can be read ({first_reason(unreadable)}); FID needs two"
                )
            counts.append(count)
        value = metric.compute().item()
    return MetricResult(f"FID ({name})", value, counts[1], counts[0], unreadable=unreadable)


def load_inception(path: str | Path, *, device: str | torch.device = "auto") -> torch.nn.Module:
    """Load an extractor for `fid` from a TorchScript file such as StyleGAN's `inception-2015-12-05.pt`.

    It does not need torchvision. Its `forward(pictures, return_features=True)` takes uint8 images and returns the
    features before the classifier.

    Raises:
        MetricsError: the file cannot be read as TorchScript.
    """
    where = resolve_device(device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated; the file uses it
            return _Features(torch.jit.load(str(path), map_location=where)).to(where).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MetricsError(
            f"{path} is no TorchScript file ({reason}); give StyleGAN's inception-2015-12-05.pt"
        ) from error


class _Features(torch.nn.Module):
    """Returns the features of an Inception in StyleGAN's format."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.network(pictures, return_features=True)


def torchmetrics_module(module: str) -> Any:
    """Import a module of torchmetrics; raises MetricsError if it is not installed."""
    try:
        return importlib.import_module(f"torchmetrics.{module}")
    except ImportError as error:
        raise MetricsError(
            f"FID and CLIPScore need torchmetrics, not installed here ({error}): pip install 'ssd-cache[eval]'"
        ) from error


def _with_own_inception(network: Any) -> Any:
    """torchmetrics' FID with torch-fidelity's Inception, which resizes as the original does.

    Raises MetricsError with what is missing.
    """
    other = "or give a TorchScript Inception (--inception, load_inception), which needs neither"
    try:
        importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise MetricsError(
            f"FID's Inception-V3 comes with torch-fidelity, which can not be imported here ({error}): pip install "
            f"torch-fidelity, with a torchvision that fits this torch; {other}"
        ) from error
    try:
        return network(feature=2048, antialias=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        raise MetricsError(
            f"FID's Inception-V3 weights can not be had ({error}): they are downloaded from GitHub once; {other}"
        ) from error


def read_batches(
    pictures: Iterable[Picture],
    batch_size: int,
    unreadable: dict[str, str],
    on_picture: Callable[[str], object] | None,
) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
    """Yield names and uint8 images `[3, height, width]`, neighbours of equal size together; note unreadable images."""
    names: list[str] = []
    batch: list[torch.Tensor] = []
    for picture in pictures:
        try:
            image = torch.from_numpy(np.array(picture.open())).permute(2, 0, 1)
        except Exception as error:  # PIL's formats raise OSError, SyntaxError, ValueError, struct.error and more
            unreadable[picture.name] = str(error)
        else:
            if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
                yield names, batch
                names, batch = [], []
            names.append(picture.name)
            batch.append(image)
        if on_picture is not None:
            on_picture(picture.name)
    if batch:
        yield names, batch


def first_reason(unreadable: dict[str, str]) -> str:
    """The first of the unreadable images, and why it is unreadable."""
    return next((f"{name}: {why}" for name, why in unreadable.items()), "there are none")
