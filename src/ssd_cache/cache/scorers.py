"""Scorers: the ranks by which semantic heads keep their visual tokens. The lowest ranks are evicted first.

A scorer adds up the attention that tokens receive, or computes their worth (a part of the rank that never changes), or
needs neither; it ranks the tokens from that. A new score is one class and one entry of `SCORES`. `eviction.py` decides
from the ranks which tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch

from ssd_cache.head_map.learned_score import LearnedScore

States = tuple[torch.Tensor, torch.Tensor]

RIDGE, TINY = 0.1, 1e-12
"""Ridge of the leverage, in mean variances of a key's components; and the smallest such mean, for keys all alike."""


@dataclass(frozen=True)
class Scorer:
    """The score "sum": the attention that a token has received from all queries since it arrived.

    Attributes:
        words: the score in words.
        needs_queries: whether `observe` is called.
        has_worth: whether `worth` is called, once for each token.
    """

    words: ClassVar[str] = "attention sum"
    needs_queries: ClassVar[bool] = True
    has_worth: ClassVar[bool] = False

    def at(self, heads: list[int] | slice) -> Scorer:
        """The scorer of some of the layer's heads."""
        return self

    def to(self, device: torch.device) -> Scorer:
        """The scorer with its tensors on a device."""
        return self

    @property
    def weights(self) -> LearnedScore | None:
        """The weights of `worth` and `rank`, if a kernel can do the work of both."""
        return None

    def begin_window(self, received: torch.Tensor) -> None:
        """Prepare `received` for the queries of a new query window."""

    def observe(self, received: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the attention of one query window.

        Args:
            received: `[batch, semantic_heads, stored]`, float32, changed in place.
            weights: `[batch, semantic_heads, groups, steps, stored]`, softmax weights on the stored tokens.
        """
        self.begin_window(received)
        received += weights.sum((2, 3))

    def worth(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The part of a token's rank that never changes, from K and V `[batch, semantic_heads, tokens, head_dim]`."""
        raise NotImplementedError

    def rank(
        self, received: torch.Tensor, positions: torch.Tensor, num_seen: int, states: Callable[[], States]
    ) -> torch.Tensor:
        """Rank the tokens of semantic heads, `[batch, semantic_heads, slots]`, float32.

        Args:
            received: as for `observe`, or what `worth` returned; without heads if the scorer has neither.
            positions: `[batch, semantic_heads, slots]`, number of the visual token in each slot, counted from 0.
            num_seen: visual tokens seen before the eviction.
            states: returns K and V of these tokens, `[batch, semantic_heads, slots, head_dim]`.
        """
        return received


class MeanScorer(Scorer):
    """The score "mean": the attention received, divided by the number of queries; age alone gives no advantage."""

    words: ClassVar[str] = "attention mean"

    def rank(self, received, positions, num_seen, states):
        return received / (num_seen - positions)


class LastScorer(Scorer):
    """The score "last": the attention received from the last query window only (LineAR, arXiv 2512.04857)."""

    words: ClassVar[str] = "attention of the last queries"

    def begin_window(self, received):
        received.zero_()


@dataclass(frozen=True)
class MarginScorer(Scorer):
    """The score "margin": 1 in the first and the last column of a grid of `columns`, 0 elsewhere; needs no queries."""

    words: ClassVar[str] = "margin columns"
    needs_queries: ClassVar[bool] = False

    columns: int

    def rank(self, received, positions, num_seen, states):
        column = positions % self.columns
        return ((column == 0) | (column == self.columns - 1)).float()


class LeverageScorer(Scorer):
    """The score "leverage": how far a token's key stands out from the keys that the head holds.

    It is the statistical leverage of the key, with a ridge: its squared distance from the mean key, in units of the
    variance of the keys in that direction. Tokens whose keys are alike can replace each other. Compactor (Chari and Van
    Durme, arXiv 2507.08143) ranks tokens by approximate leverage and attention; here the leverage is exact, and keys
    are as stored, after RoPE.
    """

    words: ClassVar[str] = "leverage of the key"
    needs_queries: ClassVar[bool] = False

    def rank(self, received, positions, num_seen, states):
        keys = states()[0].float()
        keys = keys - keys.mean(2, keepdim=True)
        covariance = keys.mT @ keys / keys.shape[2]
        variances = covariance.diagonal(dim1=-2, dim2=-1)
        variances += RIDGE * variances.mean(-1, keepdim=True).clamp(min=TINY)
        # cholesky_ex does not check its result, so a GPU does not wait; the ridge makes the matrix positive definite
        factor = torch.linalg.cholesky_ex(covariance)[0]
        # x C^-1 x = |x L^-T|^2. On a GPU this is one batched call; torch's inverse is a call for each matrix there.
        return torch.linalg.solve_triangular(factor.mT, keys, upper=True, left=False).square_().sum(-1)


@dataclass(frozen=True)
class LearnedScorer(Scorer):
    """The score "learned": the head map's learned score of the layer's heads; needs no queries."""

    words: ClassVar[str] = "learned score"
    needs_queries: ClassVar[bool] = False
    has_worth: ClassVar[bool] = True

    learned: LearnedScore

    def at(self, heads):
        return LearnedScorer(self.learned.at(heads))

    def to(self, device):
        return LearnedScorer(self.learned.to(device))

    @property
    def weights(self):
        return self.learned

    def worth(self, keys, values):
        return self.learned.of_states(keys, values)

    def rank(self, received, positions, num_seen, states):
        return self.learned.of_places(positions, num_seen) + received


SCORES: Mapping[str, type[Scorer]] = MappingProxyType(
    {
        "sum": Scorer,
        "mean": MeanScorer,
        "last": LastScorer,
        "margin": MarginScorer,
        "leverage": LeverageScorer,
        "learned": LearnedScorer,
    }
)
"""The scores by name."""


def make_scorer(score: str, columns: int, learned: LearnedScore | None) -> Scorer:
    """The scorer of one layer; `columns` of the grid are for "margin", `learned` is the layer's score for "learned"."""
    arguments = {"margin": (columns,), "learned": (learned,)}
    return SCORES[score](*arguments.get(score, ()))


def attention_weights(
    query_states: torch.Tensor,
    key_states: torch.Tensor,
    scaling: float,
    num_prompt: int,
    num_first: int,
    prompt_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax weights of consecutive one-token steps, all computed at once; nothing may have been evicted in between.

    Args:
        query_states: `[batch, kv_heads, groups, steps, head_dim]`, `groups` query heads to a KV head.
        key_states: `[batch, kv_heads, num_prompt + stored, head_dim]`.
        scaling: factor on the dot products of queries and keys, as in the model's attention.
        num_prompt: prompt tokens at the front of `key_states`; all queries see them.
        num_first: visual tokens that the first query sees, including the new one; each later query sees one more.
        prompt_mask: `[batch, num_prompt]`, False on padding.

    Returns:
        `[batch, kv_heads, groups, steps, num_prompt + stored]`, float32.
    """
    batch, heads, groups, steps, head_dim = query_states.shape
    length = key_states.shape[2]
    # scale before the matrix product, as sdpa does: in fp16, unscaled logits can overflow
    queries = query_states.reshape(batch, heads, groups * steps, head_dim) * scaling
    logits = (queries @ key_states.transpose(2, 3)).view(batch, heads, groups, steps, length).float()
    step = torch.arange(steps, device=logits.device)[:, None]
    column = torch.arange(length, device=logits.device)
    logits = logits.masked_fill(column >= num_prompt + num_first + step, float("-inf"))
    if prompt_mask is not None:
        logits[..., :num_prompt].masked_fill_(~prompt_mask[:, None, None, None], float("-inf"))
    return logits.softmax(-1)
