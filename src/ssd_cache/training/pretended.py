"""Simulated evictions over a whole image at once, differentiable by a straight-through estimator.

In the forward pass, zeros and ones mark exactly the tokens that an `SSDCache` would hold at every step. In the backward
pass, the eviction threshold is soft, and an evicted token receives the change of the loss that it would have caused.
This module runs no model and takes no optimizer steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssd_cache.cache.eviction import is_spared, lowest
from ssd_cache.cache.plans import LayerPlan
from ssd_cache.head_map.learned_score import LearnedScore


@dataclass(frozen=True)
class RetainedTokens:
    """Which visual tokens the heads of a layer hold, after each eviction.

    Attributes:
        parts: for heads that evict at the same steps, their indices, and the number of evictions before each token
            arrives, `[tokens]`.
        tensors: for each part, float32 ones and zeros, `[rows, heads, 1 + evictions, tokens]`.
    """

    parts: list[tuple[list[int], torch.Tensor]]
    tensors: Sequence[torch.Tensor]

    def at(self, arriving: slice) -> torch.Tensor:
        """The tokens held when some visual tokens arrive, `[rows, kv_heads, arriving, tokens]`; ones for later ones."""
        found: dict[int, torch.Tensor] = {}
        for (heads, number), after in zip(self.parts, self.tensors, strict=True):
            found |= dict(zip(heads, after.index_select(2, number[arriving]).unbind(1), strict=True))
        return torch.stack([found[head] for head in sorted(found)], 1)


def retained_tokens(
    plan: LayerPlan,
    learned: LearnedScore,
    keys: torch.Tensor,
    values: torch.Tensor,
    softness: float,
    extra: torch.Tensor | None = None,
) -> RetainedTokens:
    """Simulate the evictions of a layer over a whole image.

    Args:
        plan: plan of the layer; semantic heads rank tokens by `learned`, spatial heads by age.
        learned: score of the layer's heads.
        keys, values: K and V of the visual tokens, `[rows, kv_heads, tokens, head_dim]`.
        softness: temperature of the soft threshold, in units of the score; affects only the gradient.
        extra: `[kv_heads]`, zeros: further slots of each head. Their gradient is the change of the loss for one slot.
    """
    rows, _, length, _ = keys.shape
    worth = learned.of_states(keys, values)
    positions = torch.arange(length, device=keys.device)
    parts, tensors = [], []
    # heads whose slots differ by multiples of the buffer evict at the same steps, once their slots are full
    kinds = [
        (num_slots % plan.buffer, is_spatial, 0 if is_spatial else num_recent)
        for num_slots, is_spatial, num_recent in zip(plan.num_slots, plan.is_spatial, plan.num_recent, strict=True)
    ]
    for kind in set(kinds):
        mine = [head for head, of_head in enumerate(kinds) if of_head == kind]
        _, is_spatial, num_recent = kind
        num_slots = torch.tensor([plan.num_slots[head] for head in mine], device=keys.device)
        first = min(plan.num_slots[head] for head in mine)
        evictions = range(first, min(length, plan.num_cells), plan.buffer)
        of_mine = None if extra is None else extra[mine]
        held = _Held(worth.new_ones(rows, len(mine), length), plan.buffer, softness, of_mine)
        for num_seen in evictions:
            seen = positions[:num_seen].expand(1, len(mine), -1)
            if is_spatial:
                ranks = seen.float().expand(rows, -1, -1)
            else:
                ranks = worth[:, mine, :num_seen] + learned.at(mine).of_places(seen, num_seen)
            held.evict(ranks, is_spared(seen, num_seen, num_recent, plan.num_sinks), num_slots <= num_seen)
        # number of evictions before each token arrived
        number = torch.div(positions - first, plan.buffer, rounding_mode="floor").add(1).clamp(0, len(evictions))
        parts.append((mine, number))
        tensors.append(torch.stack(held.after, 2))
    return RetainedTokens(parts, tensors)


class _Held:
    """The tokens held by heads that evict at the same steps; `after` has `[rows, heads, tokens]` for each eviction."""

    def __init__(self, everything: torch.Tensor, buffer: int, softness: float, extra: torch.Tensor | None):
        self.buffer, self.softness, self.extra = buffer, softness, extra
        self.alive, self.soft, self.after = everything > 0, everything, [everything]

    def evict(self, ranks: torch.Tensor, spared: torch.Tensor, is_full: torch.Tensor) -> None:
        """Evict `buffer` tokens per row and head: of those still held, the tokens with the lowest rank.

        `ranks` is `[rows, heads, seen]`. Tokens where the boolean mask `spared` is True are kept. Heads where `is_full`
        is False, `[heads]`, keep all.
        """
        seen = ranks.shape[2]
        alive = self.alive[..., :seen]
        ranks = ranks.masked_fill(spared, torch.inf)
        victims = lowest(ranks.detach(), ~alive, self.buffer)
        is_full = is_full[:, None]
        kept = alive.scatter(2, victims, False) | (alive & ~is_full)
        self.alive = torch.cat([kept, self.alive[..., seen:]], 2)
        # the threshold lies between the lowest kept and the highest dropped rank, and moves with the tokens near it
        low = ranks.detach().gather(2, victims[..., -1:])
        high = ranks.detach().masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        cut = torch.where(high.isinf(), low, (low + high) / 2)  # if nothing is kept, it is above all ranks
        soft = torch.sigmoid((ranks.detach() - cut) / self.softness)
        near = soft * (1 - soft) * alive
        ranks = ranks.masked_fill(ranks.isinf(), 0.0)
        total = near.sum(-1, keepdim=True).clamp(min=0.01)
        shift = (near * (ranks - ranks.detach())).sum(-1, keepdim=True) / total
        moved = soft + soft * (1 - soft) / self.softness * (ranks - ranks.detach() - shift)
        if self.extra is not None:  # a further slot goes to the tokens near the threshold
            moved = moved + near / total * self.extra[:, None]
        before = self.soft[..., :seen]
        # a dropped token cannot return: its soft value is the minimum over all evictions so far
        self.soft = torch.cat([torch.where((moved < before) & is_full, moved, before), self.soft[..., seen:]], 2)
        self.after.append(self.alive.float() + (self.soft - self.soft.detach()))


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        masked = logits.clone()
        masked[_visual_part(logits, held)].masked_fill_(held[:, :, None] < 0.5, -torch.inf)
        total = masked.logsumexp(-1, keepdim=True)
        weights = masked.sub_(total).exp_()
        ctx.save_for_backward(logits, weights, total, held)
        return weights

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        logits, weights, total, held = ctx.saved_tensors
        change = gradient - (weights * gradient).sum(-1, keepdim=True)
        visual = _visual_part(logits, held)
        # the weight that an evicted token would have if it alone were added
        let_in = (logits[visual] - total[*visual[:2], :]).sigmoid_()
        share = torch.where(held[:, :, None] < 0.5, let_in, weights[visual])
        return weights * change, share.mul_(change[visual]).sum(2)


def _visual_part(logits: torch.Tensor, held: torch.Tensor) -> tuple:
    """The index of the visual queries and tokens in logits; they are the last ones."""
    queries, tokens = (all_of - visual for all_of, visual in zip(logits.shape[-2:], held.shape[-2:], strict=True))
    return ..., slice(queries, None), slice(tokens, None)


def masked_softmax(logits: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Softmax over the held tokens, with a gradient also for tokens that are not held.

    Args:
        logits: `[rows, kv_heads, groups, queries, prompt + tokens]`, minus infinity for masked tokens.
        held: `[rows, kv_heads, visual queries, tokens]`, ones and zeros; the last queries are the visual ones.

    Returns:
        The weights, of the logits' shape. In the backward pass, the gradient of `held` is the change of the loss that
        each token's weight would cause, also where `held` is zero.
    """
    return _MaskedSoftmax.apply(logits, held)
