"""`LearnedScore`: predicts a visual token's future use to a head from the token's position, K and V.

A head map may hold one. With `score="learned"`, heads rank their tokens by it, without queries. This module holds the
tensors and the formula. `training/learning.py` trains them, and `cache/eviction.py` decides what is evicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, eq=False)
class LearnedScore:
    """Score weights for every head of a model, or for some heads of one layer (then without the first dimension).

    The score of a visual token, when the next token is in row `r` of a grid of `rows` x `columns`:

        key . K + value . V + row[r, row of the token] + column[r - row of the token, column of the token]

    K and V are the tensors in the cache, K after RoPE. Only differences between tokens of one head matter.

    Attributes:
        key: `[layers, kv_heads, head_dim]`, float32.
        value: `[layers, kv_heads, value_dim]`.
        row: `[layers, kv_heads, rows, rows]`.
        column: `[layers, kv_heads, rows, columns]`.
        ranks_all: whether the heads that the map labels spatial rank their tokens by the score too. If not, they keep
            their newest tokens.
    """

    NAMES: ClassVar[frozenset[str]] = frozenset({"key", "value", "row", "column"})

    key: torch.Tensor
    value: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    ranks_all: bool = False

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], ranks_all: bool = False) -> LearnedScore:
        """The score with the tensors of these names; further names are ignored."""
        return cls(tensors["key"], tensors["value"], tensors["row"], tensors["column"], ranks_all)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in sorted(self.NAMES)}

    def at(self, index) -> LearnedScore:
        """The score of some layers or heads: every tensor indexed by `index`."""
        return self.of({name: tensor[index] for name, tensor in self.tensors().items()}, self.ranks_all)

    def to(self, device: torch.device) -> LearnedScore:
        """The score on a device, in contiguous tensors, as kernels read them."""
        return self.of(
            {name: tensor.to(device).contiguous() for name, tensor in self.tensors().items()}, self.ranks_all
        )

    def of_places(self, positions: torch.Tensor, num_seen: int) -> torch.Tensor:
        """The part of the score that depends on positions, for heads of one layer: float32 like `positions`.

        `positions` are indices of visual tokens, `[batch, heads, tokens]`, below `num_seen`. Past the end of the grid,
        the last row is used.
        """
        rows, columns = self.column.shape[-2:]
        now = min(num_seen // columns, rows - 1)
        # the score of each cell in the rows seen; `column[:, 0]` is for the current row, the last of them
        cells = self.row[:, now, : now + 1, None] + self.column[:, : now + 1].flip(1)
        if num_seen > rows * columns:
            positions = (positions // columns).clamp(max=now) * columns + positions % columns
        return cells.flatten(1).expand(len(positions), -1, -1).gather(2, positions.long())

    def of_states(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The part of the score that depends on K and V: `[batch, heads, tokens, head_dim]` to `[..., tokens]`."""
        # a few numbers for each token: elementwise operations are faster here than matrix products
        return (keys * self.key[:, None]).sum(-1) + (values * self.value[:, None]).sum(-1)
