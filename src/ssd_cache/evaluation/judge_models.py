"""Loads the models and images that the judges of benchmarks need, and refuses what they cannot judge with.

transformers only warns when weights are missing, and then initialises them randomly.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from ssd_cache.io.showing import ReadableError
from ssd_cache.models.settings import resolve_device, resolve_dtype

CLIP = "openai/clip-vit-large-patch14"
"""The weights that GenEval and torchmetrics' CLIPScore use, with their own activation (quick_gelu)."""


def load_judge(
    model_class: Any, source: str | Path, *, kind: str = "", dtype: str | torch.dtype, device: str | torch.device
) -> Any:
    """Load a model of transformers from a folder or the Hub, in evaluation mode.

    `kind` is the only `model_type` that is accepted, if given.

    Raises:
        ValueError: another kind of model, or weights are missing.
        OSError: it cannot be found.
    """
    found = AutoConfig.from_pretrained(source).model_type
    if kind and found != kind:
        raise ReadableError(f"{source}: a {found!r} model, not {kind!r}; give another one")
    device = resolve_device(device)
    model, loading = model_class.from_pretrained(source, dtype=resolve_dtype(dtype, device), output_loading_info=True)
    if missing := sorted(set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        raise ReadableError(f"{source}: {len(missing)} weights are missing, such as {missing[0]}; give another model")
    return model.to(device).eval()


def load_clip(source: str | Path = CLIP, *, device: str | torch.device = "auto") -> tuple[CLIPModel, CLIPProcessor]:
    """Load a CLIP in float32, with a processor that resizes with PIL on every machine; raises as `load_judge`."""
    model = load_judge(CLIPModel, source, kind="clip", dtype="float32", device=device)
    return model, CLIPProcessor(CLIPImageProcessorPil.from_pretrained(source), AutoTokenizer.from_pretrained(source))


def decode_image(content: bytes, path: Path) -> Image.Image:
    """The RGB image in the bytes of a file; raises ValueError if it is not a complete image."""
    try:
        with Image.open(io.BytesIO(content)) as file:
            return file.convert("RGB")
    except Exception as error:  # PIL's formats raise OSError, SyntaxError, ValueError, struct.error and more
        kind = "not an image file" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ReadableError(
            f"{path}: the image cannot be read ({kind}); delete it, generate it again, and run the same command again"
        ) from error


def encode_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file of an image, as RGB."""
    content = io.BytesIO()
    image.convert("RGB").save(content, format="PNG")
    return content.getvalue()
