"""Checks of a head map's values, made once when a `HeadMap` is created, from a file or from memory.

Each check raises a `HeadMapError` that names the value received, the limit, and the remedy.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ssd_cache.budget import Budget, resolve_budget
from ssd_cache.head_map.learned_score import LearnedScore
from ssd_cache.io.showing import ReadableError, shown
from ssd_cache.io.untrusted import MAX_DEPTH, parse_json
from ssd_cache.layout import ImageLayout

MAX_LAYERS, MAX_KV_HEADS, MAX_SCORES = 1024, 4096, 64
MAX_TEXT, MAX_PROFILE_BYTES = 256, 64 << 10
SCORE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class HeadMapError(ReadableError):
    """A head map that cannot be made, read, written, found or trusted; names the value, the limit and the remedy."""


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse anything but [layers, kv_heads] within the limits."""
    limits = (MAX_LAYERS, MAX_KV_HEADS)
    if len(shape) != 2 or not all(type(n) is int and 1 <= n <= limit for n, limit in zip(shape, limits, strict=True)):
        raise HeadMapError(
            f"shape {shown(list(shape))}; labels are [layers, kv_heads], 1 to {MAX_LAYERS} by 1 to {MAX_KV_HEADS}: "
            "give one row a layer, one column a KV head"
        )


def checked_labels(is_spatial: torch.Tensor) -> torch.Tensor:
    """A copy of the labels `[layers, kv_heads]` on the CPU."""
    if not isinstance(is_spatial, torch.Tensor) or is_spatial.dtype != torch.bool:
        received = is_spatial.dtype if isinstance(is_spatial, torch.Tensor) else type(is_spatial).__name__
        raise HeadMapError(f"is_spatial is {received}; give a tensor of torch.bool, for example `scores > threshold`")
    check_shape(tuple(is_spatial.shape))
    return is_spatial.detach().to("cpu", copy=True).contiguous()


def checked_layout(grid: Any, previews: Any) -> ImageLayout:
    """The grids of an image, each (rows, columns) in visual tokens."""
    try:
        return ImageLayout(grid, previews)
    except ValueError as error:
        raise HeadMapError(error) from error


def checked_scores(
    scores: torch.Tensor | Mapping[str, torch.Tensor] | None, shape: torch.Size
) -> dict[str, torch.Tensor]:
    """Float32 copies by name, each of `shape`; a single tensor is named "score"."""
    named = {"score": scores} if isinstance(scores, torch.Tensor) else {} if scores is None else scores
    if not isinstance(named, Mapping) or len(named) > MAX_SCORES:
        raise HeadMapError(f"scores: give a tensor, or a dict from name to tensor of at most {MAX_SCORES}")
    for name in named:
        if not isinstance(name, str) or not SCORE_NAME.fullmatch(name):
            raise HeadMapError(f"the name {shown(name)} of a score; use 1 to 64 letters, digits, '_', '-' and '.'")
    return {name: _checked_tensor(f"score {name!r}", score, shape) for name, score in named.items()}


def checked_learned(learned: LearnedScore | None, shape: torch.Size, layout: ImageLayout) -> LearnedScore | None:
    """A float32 copy; the tensors' first dimensions must be `shape`, and their positions must be those of the grid."""
    if learned is None:
        return None
    if not isinstance(learned, LearnedScore):
        raise HeadMapError(f"learned is a {type(learned).__name__}; give a LearnedScore, as learn_score makes it")
    if layout.draft_grids:
        raise HeadMapError(
            "a learned score is for the positions of a single grid; leave it out for a map with draft grids"
        )
    if not isinstance(learned.ranks_all, bool):
        raise HeadMapError(f"ranks_all={shown(learned.ranks_all)} of the learned score is neither true nor false")
    rows, columns = layout.grid
    ends = {"row": (rows, rows), "column": (rows, columns)}
    tensors = {
        name: _checked_tensor(f"{name} of the learned score", tensor, (*shape, *ends.get(name, (None,))))
        for name, tensor in learned.tensors().items()
    }
    return LearnedScore.of(tensors, learned.ranks_all)


def _checked_tensor(name: str, tensor: Any, shape: tuple[int | None, ...]) -> torch.Tensor:
    """A finite float32 copy of a tensor of this shape; None stands for any size above 0, the head dimension."""
    received = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else shown(tensor)
    if (
        not isinstance(tensor, torch.Tensor)
        or not tensor.is_floating_point()
        or tensor.ndim != len(shape)
        or any(size != wanted and (wanted or not size) for size, wanted in zip(tensor.shape, shape, strict=True))
    ):
        asked = ", ".join("head_dim" if size is None else str(size) for size in shape)
        raise HeadMapError(f"{name} is {received}; for this map it must be a float tensor of shape [{asked}]")
    copy = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not copy.isfinite().all():
        layer, head = (~copy.isfinite()).nonzero()[0, :2].tolist()
        raise HeadMapError(f"{name} is NaN or infinite at layer {layer}, KV head {head}; profile or learn again")
    return copy


def checked_threshold(threshold: float | None) -> float | None:
    """The threshold as a finite float, or None."""
    if threshold is None:
        return None
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not abs(threshold) <= sys.float_info.max:
        raise HeadMapError(f"threshold={shown(threshold)}; give a finite number, or None")
    return float(threshold)


def checked_budget(budget: Budget | None, is_spatial: torch.Tensor, cells: int) -> Budget | None:
    """A copy of a budget that fits the map, as JSON values: a number, or a list with an entry for each layer."""
    if budget is None:
        return None
    try:
        most = max(map(max, resolve_budget(budget, is_spatial.tolist(), cells)))
    except (ValueError, TypeError) as error:
        raise HeadMapError(f"budget: {error}") from error
    if most > cells:
        raise HeadMapError(f"budget: {most} slots, but the grid has {cells} visual tokens; give at most {cells}")
    return checked_profile({"budget": budget})["budget"]


def checked_text(name: str, text: str | None) -> str | None:
    """The text, which must be one printable line; or None."""
    if text is not None and not (isinstance(text, str) and 1 <= len(text) <= MAX_TEXT and text.isprintable()):
        raise HeadMapError(f"{name}={shown(text)}; give 1 to {MAX_TEXT} printable characters, or None")
    return text


def checked_profile(profile: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of `profile` that JSON can write and read back unchanged."""
    try:
        if profile is not None and not isinstance(profile, Mapping):
            raise TypeError(f"{type(profile).__name__} is not a dict")
        text = json.dumps(dict(profile or {}))
        if len(text) > MAX_PROFILE_BYTES:
            raise ValueError(f"{len(text)} bytes of at most {MAX_PROFILE_BYTES}")
        copy: dict[str, Any] = parse_json(text, MAX_DEPTH - 1)
    except (TypeError, ValueError, RecursionError) as error:
        raise HeadMapError(f"profile: {error}; give a small dict of JSON values, finite numbers only") from error
    return copy
