"""What was measured of one compressed cache against the full one, and the sums people compare.

Numbers only; `lockstep.py` measures them, `figure.py` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ssd_cache.layout import Grid, row_lengths


@dataclass(frozen=True)
class Fidelity:
    """One cache against the full cache, on the same tokens.

    A step feeds one visual token: step `s` feeds token `s`, and the model says how likely each token is to be number
    `s + 1`. There are `cells - 1` steps, since the last token is never fed. All tensors are on the CPU.

    Attributes:
        grid: rows and columns of visual tokens.
        tokens: int64, `[pictures, cells]`, the visual tokens that both caches were fed.
        budget: share of the grid's cells that a head has slots for, mean over heads.
        is_spatial: bool, `[layers, kv_heads]`, by which rule each head kept its tokens.
        kl: float64, `[pictures, steps]`, KL(full || compressed) of the next token, in nats.
        agrees: bool, `[pictures, steps]`, whether both find the same token likeliest.
        attention_error: float32, `[steps, layers]`, L2 norm of the difference of the layer's attention output over that
            of the full cache's; mean over the rows of the batch.
        retained: float32, `[steps, layers, kv_heads]`, share of the full cache's attention that fell on the prompt and
            on what the compressed head held; mean over the rows of the batch and the query heads of a KV head.
        previews: the grids that were drawn before it, whose tokens and steps come first.
    """

    grid: Grid
    tokens: torch.Tensor
    budget: float
    is_spatial: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor
    attention_error: torch.Tensor
    retained: torch.Tensor
    previews: tuple[Grid, ...] = ()

    @property
    def mean_kl(self) -> float:
        """Mean over pictures and steps, in nats."""
        return self.kl.mean().item()

    @property
    def kl_standard_error(self) -> float | None:
        """Of `mean_kl`, from the spread over pictures; None with a single one."""
        pictures = len(self.kl)
        return None if pictures < 2 else self.kl.mean(1).std().item() / math.sqrt(pictures)

    @property
    def agreement(self) -> float:
        """Share of steps at which both caches find the same token likeliest."""
        return self.agrees.double().mean().item()

    @property
    def mean_attention_error(self) -> float:
        """Mean over steps and layers."""
        return self.attention_error.double().mean().item()

    @property
    def mean_retained(self) -> float:
        """Mean over steps, layers and heads."""
        return self.retained.double().mean().item()

    @property
    def retained_by_head(self) -> torch.Tensor:
        """Float64, `[layers, kv_heads]`, mean over steps."""
        return self.retained.double().mean(0)

    def retained_by_kind(self, kind: str) -> float | None:
        """Mean over the heads kept as "spatial", or as "semantic"; None without such heads."""
        wanted = self.is_spatial if kind == "spatial" else ~self.is_spatial
        return self.retained_by_head[wanted].mean().item() if wanted.any() else None

    def by_grid_row(self, values: torch.Tensor) -> torch.Tensor:
        """Means over the steps of each row, previews' first: `[steps, ...]` to float64 `[rows, ...]`.

        The last row lacks a step; where that was its only one, it has no mean.
        """
        *lengths, last = row_lengths(self.grid, self.previews)
        parts = values.split([*lengths, last - 1])
        return torch.stack([part.double().mean(0) for part in parts if len(part)])


def merge(parts: Sequence[Fidelity]) -> Fidelity:
    """The result over the images of all parts, which are of one cache; means over rows are weighted by images."""
    total = sum(len(part.tokens) for part in parts)

    def mean(name: str) -> torch.Tensor:
        return torch.stack([getattr(part, name) * (len(part.tokens) / total) for part in parts]).sum(0)

    return replace(
        parts[0],
        tokens=torch.cat([part.tokens for part in parts]),
        kl=torch.cat([part.kl for part in parts]),
        agrees=torch.cat([part.agrees for part in parts]),
        attention_error=mean("attention_error"),
        retained=mean("retained"),
    )
