"""Loads the models and images that the judges of benchmarks need, and refuses what they cannot judge with.

transformers only warns when weights are missing, and then initialises them randomly.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from ssd_cache.io.showing import ReadableError
from ssd_cache.models.settings import resolve_device, resolve_dtype


def load_judge(
    model_class: Any, source: str | Path, *, kind: str = "", dtype: str | torch.dtype, device: str | torch.device
) -> Any:
    """Load a model from a folder or the Hub, in evaluation mode.

    Args:
        model_class: a class of transformers.
        source: folder or Hub id.
        kind: the only `model_type` that is accepted, if given.
        dtype: as `resolve_dtype` takes it.
        device: as `resolve_device` takes it.

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


def decode_image(content: bytes) -> Image.Image:
    """The RGB image in the bytes of a file; raises ValueError with the reason if it is not a complete image."""
    try:
        with Image.open(io.BytesIO(content)) as file:
            return file.convert("RGB")
    except Exception as error:  # PIL's formats raise OSError, SyntaxError, ValueError, struct.error and more
        kind = "not an image file" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ReadableError(f"the image cannot be read ({kind}); generate it again") from error


def encode_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file of an image, as RGB."""
    content = io.BytesIO()
    image.convert("RGB").save(content, format="PNG")
    return content.getvalue()
