"""The measurements of one compressed cache against the full cache, and the means over them.

`lockstep.py` measures them, `report.py` writes and plots them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ssd_cache.cache.cache import SSDCache
from ssd_cache.layout import ImageLayout
from ssd_cache.models import Checkpoint

MEASURED = ("kl", "agrees", "attention_error", "retained")
"""Names of the measured tensors of a `Fidelity`."""


@dataclass(frozen=True)
class Fidelity:
    """One cache against the full cache, on the same tokens.

    A step feeds one visual token: step `s` feeds token `s`, and the model predicts token `s + 1`. There are
    `cells - 1` steps, because the last token is never fed. The tensors of finished results are on the CPU.

    Attributes:
        layout: the grids of an image; tokens and steps of draft grids come first.
        tokens: int64, `[images, cells]`, the visual tokens fed to both caches.
        budget: slots per head as a share of the grid's cells, mean over heads.
        is_spatial: bool, `[layers, kv_heads]`, the kind of retention rule that each head used.
        kl: float64, `[images, steps]`, KL(full || compressed) of the next token, in nats.
        agrees: bool, `[images, steps]`, whether the most likely token is the same with both caches.
        attention_error: float32, `[steps, layers]`, L2 norm of the difference of the layer's attention output divided
            by the norm of the full cache's output; mean over the rows of the batch.
        retained: float32, `[steps, layers, kv_heads]`, share of the full cache's attention on the prompt and on the
            tokens that the compressed head holds; mean over the rows of the batch and the query heads of a KV head.
    """

    layout: ImageLayout
    tokens: torch.Tensor
    budget: float
    is_spatial: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor
    attention_error: torch.Tensor
    retained: torch.Tensor

    @classmethod
    def empty(cls, checkpoint: Checkpoint, cache: SSDCache, tokens: torch.Tensor) -> Fidelity:
        """A `Fidelity` to be filled in: its measurements are zero, for `tokens`, `[images, cells]`, on their device."""
        (images, cells), shape = tokens.shape, (checkpoint.num_layers, checkpoint.num_kv_heads)
        return cls(
            layout=checkpoint.layout,
            tokens=tokens,
            budget=cache.mean_slots / cells,
            is_spatial=cache.head_map.window_heads(cache.score),
            kl=tokens.new_zeros(images, cells - 1, dtype=torch.float64),
            agrees=tokens.new_zeros(images, cells - 1, dtype=torch.bool),
            attention_error=tokens.new_zeros(cells - 1, shape[0], dtype=torch.float32),
            retained=tokens.new_zeros(cells - 1, *shape, dtype=torch.float32),
        )

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence over images and steps, in nats."""
        return self.kl.mean().item()

    @property
    def kl_standard_error(self) -> float | None:
        """Standard error of `mean_kl`, from the spread over images; None with a single image."""
        images = len(self.kl)
        return None if images < 2 else self.kl.mean(1).std().item() / math.sqrt(images)

    @property
    def agreement(self) -> float:
        """Share of steps at which the most likely token is the same with both caches."""
        return self.agrees.double().mean().item()

    @property
    def mean_attention_error(self) -> float:
        """Mean attention error over steps and layers."""
        return self.attention_error.double().mean().item()

    @property
    def mean_retained(self) -> float:
        """Mean share of the full cache's attention that is retained, over steps, layers and heads."""
        return self.retained.double().mean().item()

    @property
    def retained_by_head(self) -> torch.Tensor:
        """Share of the attention that each head retains, mean over steps: float64, `[layers, kv_heads]`."""
        return self.retained.double().mean(0)

    def retained_by_kind(self, kind: str) -> float | None:
        """Mean retained share of the heads with rule "spatial" or "semantic"; None if there are none."""
        wanted = self.is_spatial if kind == "spatial" else ~self.is_spatial
        return self.retained_by_head[wanted].mean().item() if wanted.any() else None

    def by_grid_row(self, values: torch.Tensor) -> torch.Tensor:
        """Means over the steps of each row, draft grids first: `[steps, ...]` to float64 `[rows, ...]`.

        The last row has one step less; if that was its only step, the row is omitted.
        """
        *lengths, last = self.layout.row_lengths
        parts = values.split([*lengths, last - 1])
        return torch.stack([part.double().mean(0) for part in parts if len(part)])

    def put(self, start: int, part: Fidelity) -> None:
        """Write the measurement of the images from number `start` on into this one; it holds those before `start`."""
        end = start + len(part.tokens)
        self.kl[start:end], self.agrees[start:end] = part.kl, part.agrees
        for mean, new in ((self.attention_error, part.attention_error), (self.retained, part.retained)):
            mean.lerp_(new, (end - start) / end)
