"""`LearnedScore`: how much a visual token will still be worth to a head, told from where it stands and what it holds.

A head map may carry one; semantic heads then rank their tokens by it (`score="learned"`), and ask for no query. It is
tensors and the formula over them; `learning.py` finds their numbers, and what is evicted is `retention.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, eq=False)
class LearnedScore:
    """Weights of the score of every head of a model, or of some heads of one layer (then without the first dimension).

    The score of a visual token, when the next one to come stands in row `r` of a grid of `rows` x `columns`:

        key . K + value . V + row[r, row of the token] + column[r - row of the token, column of the token]

    K and V are those that the cache holds, K after RoPE. Only differences between tokens of one head matter.

    Attributes:
        key: `[layers, kv_heads, head_dim]`, float32.
        value: `[layers, kv_heads, value_dim]`.
        row: `[layers, kv_heads, rows, rows]`.
        column: `[layers, kv_heads, rows, columns]`.
    """

    NAMES: ClassVar[frozenset[str]] = frozenset({"key", "value", "row", "column"})

    key: torch.Tensor
    value: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        return {name: getattr(self, name) for name in sorted(self.NAMES)}

    def at(self, index) -> LearnedScore:
        """The same for some layers or heads: each tensor at `index`, as a tensor takes it."""
        return LearnedScore(**{name: tensor[index] for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> LearnedScore:
        """The same on a device."""
        return LearnedScore(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def of_places(self, positions: torch.Tensor, num_seen: int) -> torch.Tensor:
        """What tokens are worth by where they stand; of heads of one layer.

        Args:
            positions: `[batch, heads, tokens]`, which visual tokens they are, counted from 0, all below `num_seen`.
            num_seen: visual tokens seen; past the grid's end, its last row counts.

        Returns:
            `[batch, heads, tokens]`, float32.
        """
        rows, columns = self.column.shape[-2:]
        now = min(num_seen // columns, rows - 1)
        row = (positions // columns).clamp(max=now)
        above = (now - torch.arange(rows, device=positions.device)).clamp(min=0)
        table = self.row[:, now, :, None] + self.column[:, above]
        return table.flatten(1).expand(len(positions), -1, -1).gather(2, (row * columns + positions % columns).long())

    def of_states(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """What tokens are worth by what they hold: K and V `[batch, heads, tokens, head_dim]` to `[..., tokens]`."""
        return (keys.float() @ self.key[:, :, None] + values.float() @ self.value[:, :, None]).squeeze(-1)
