"""PSNR and LPIPS between images of a compressed cache and those of the full cache, image by image.

The two folders may differ in nothing but the cache; `read_settings` reads what they were generated with. The metrics
are those of torchmetrics, or an LPIPS from a TorchScript file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ssd_cache.evaluation import bootstrap
from ssd_cache.evaluation.export import read_settings
from ssd_cache.evaluation.image_folders import FolderImage, find_captioned
from ssd_cache.evaluation.judge_models import decode_image
from ssd_cache.evaluation.metrics import MetricsError, load_torchscript
from ssd_cache.io.showing import differences, first_line, first_names
from ssd_cache.models.settings import resolve_device

CACHE_SETTINGS = frozenset({"policy", "budget", "num_slots", "slots", "slots_sha256", "head_map", "settings"})
"""Settings of a folder that may differ from those of the full cache's images."""

ALEXNET = "alexnet-owt-7be5be79.pth"
"""The file of torchvision's AlexNet, which torchmetrics' LPIPS reads from torch's folder of downloads."""

Lpips = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From two uint8 images `[1, 3, height, width]` to their distance."""


@dataclass(frozen=True)
class Similarity:
    """One metric: its mean over prompts, the standard error of the mean, and the number of images.

    `num_equal` images equal their reference. Their PSNR is infinite, and its mean is over the others.
    """

    name: str
    mean: float
    standard_error: float
    num_images: int
    num_equal: int


def measure_similarity(
    folder: str | Path,
    reference: str | Path,
    lpips: Lpips | None = None,
    *,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[Similarity]:
    """PSNR in dB, and LPIPS if it is given, of every image and the full cache's image of the same name.

    All samples of a prompt are averaged first, since they are not independent; see `bootstrap.standard_error`.

    Args:
        folder: images that `eval geneval export`, `eval geneval2 export` or `generate --output-dir` wrote.
        reference: the same images, generated with the policy full.
        lpips: see `load_lpips`.
        device: device that LPIPS is computed on.
        progress: show a progress bar over images.

    Raises:
        ValueError: settings other than the cache's differ, images are missing or cannot be read, or torchmetrics is
            not installed.
    """
    pairs = matching_images(Path(folder), Path(reference))
    try:
        from torchmetrics.functional.image import peak_signal_noise_ratio
    except ImportError as error:
        raise MetricsError(
            f"PSNR needs torchmetrics ({error}): pip install -e '.[eval]' in a clone of ssd-cache"
        ) from error
    where = resolve_device(device)
    psnr: dict[str, list[float]] = {}
    distances: dict[str, list[float]] = {}
    with torch.inference_mode():
        for pair in tqdm(pairs, desc="similarity", unit=" images", disable=not progress):
            image, wanted = (_pixels(one).to(where) for one in pair)
            if image.shape != wanted.shape:
                raise MetricsError(
                    f"{pair[0].path}: {list(image.shape[2:])} pixels, its reference has {list(wanted.shape[2:])}"
                )
            decibels = peak_signal_noise_ratio(image.double(), wanted.double(), data_range=255.0).item()
            psnr.setdefault(pair[0].caption, []).append(decibels)
            if lpips is not None:
                distances.setdefault(pair[0].caption, []).append(lpips(image, wanted).item())
    num_equal = sum(np.isinf(values).sum() for values in psnr.values())
    found = {"PSNR, dB": psnr, **({} if lpips is None else {"LPIPS": distances})}
    return [_summary(name, values, int(num_equal)) for name, values in found.items()]


def _summary(name: str, by_prompt: dict[str, list[float]], num_equal: int) -> Similarity:
    finite = {prompt: [value for value in values if np.isfinite(value)] for prompt, values in by_prompt.items()}
    means = {"prompts": {prompt: float(np.mean(values)) for prompt, values in finite.items() if values}}
    num_images = sum(map(len, by_prompt.values()))
    return Similarity(name, bootstrap.mean(means), bootstrap.standard_error(means), num_images, num_equal)


def matching_images(folder: Path, reference: Path) -> list[tuple[FolderImage, FolderImage]]:
    """Images of two folders by name, if only the cache that they were generated with differs.

    Raises:
        ValueError: another program wrote a folder, the reference has another policy than full, other settings differ,
            or an image is in one folder only.
    """
    settings, wanted = (read_settings(path) for path in (folder, reference))
    for path, found in ((folder, settings), (reference, wanted)):
        if not found:
            raise MetricsError(f"{path} has no settings; give a folder that ssd-cache generated images into")
    if wanted.get("policy") != "full":
        raise MetricsError(
            f"{reference}: its images have the policy {wanted.get('policy')}; give the folder of the full cache "
            "(--policy full)"
        )
    first, second = (
        {name: value for name, value in one.items() if name not in CACHE_SETTINGS} for one in (wanted, settings)
    )
    if differing := differences(first, second, ("in the reference", "here")):
        raise MetricsError(f"{folder} and {reference}: not only the cache differs ({differing}); generate them alike")
    images, references = ({one.name: one for one in find_captioned(path)} for path in (folder, reference))
    if single := sorted(images.keys() ^ references.keys()):
        raise MetricsError(f"{folder} and {reference}: only one has {first_names(single)}; generate what is missing")
    return [(images[name], references[name]) for name in images]


def _pixels(one: FolderImage) -> torch.Tensor:
    """A file as uint8 `[1, 3, height, width]`."""
    return torch.from_numpy(np.array(decode_image(one.path.read_bytes(), one.path))).permute(2, 0, 1)[None]


def load_lpips(source: str | Path = "alex", *, device: str | torch.device = "auto") -> Lpips:
    """Load an LPIPS (Zhang et al., arXiv 1801.03924).

    Args:
        source: "alex" for torchmetrics' LPIPS with AlexNet, which needs torchvision and its weights; or a TorchScript
            file such as StyleGAN's `vgg16.pt`, which needs neither. Its `forward(images, resize_images=False,
            return_lpips=True)` takes pixels from 0 to 255 and returns features `[1, n]`, whose squared distance is
            LPIPS.
        device: device of the network.

    Raises:
        MetricsError: a missing package or file; the message says where to put it.
    """
    if source != "alex":
        network = load_torchscript(source, device, "StyleGAN's vgg16.pt, alex or none")

        def distance(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            first, second = (network(one.float(), resize_images=False, return_lpips=True) for one in (image, other))
            return (first - second).square().sum()

        return distance
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True).to(resolve_device(device))
    except (ImportError, OSError, RuntimeError) as error:  # no package, no download, torchvision for another torch
        raise MetricsError(
            f"LPIPS with AlexNet needs torchmetrics, torchvision and {ALEXNET} in {torch.hub.get_dir()}/checkpoints "
            f"({first_line(error)}); or give --lpips vgg16.pt (StyleGAN's), or --lpips none"
        ) from error
    return lambda image, other: metric(image.float() / 255, other.float() / 255)
