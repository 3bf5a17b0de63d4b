"""Simulated evictions over a whole image at once, differentiable by a straight-through estimator.

In the forward pass, zeros and ones mark exactly the tokens that an `SSDCache` would hold at every step. In the backward
pass, the eviction threshold is soft, and an evicted token receives the change of the loss that it would have caused.
This module runs no model and takes no optimizer steps.
"""

from __future__ import annotations

import torch

from ssd_cache.cache.eviction import is_spared, lowest
from ssd_cache.cache.plans import LayerPlan
from ssd_cache.head_map.learned_score import LearnedScore


def retained_tokens(
    plan: LayerPlan, learned: LearnedScore, keys: torch.Tensor, values: torch.Tensor, softness: float
) -> torch.Tensor:
    """Which visual tokens the heads of a layer hold when each visual token arrives.

    Args:
        plan: plan of the layer; semantic heads rank tokens by `learned`, spatial heads by age.
        learned: score of the layer's heads.
        keys, values: K and V of the visual tokens, `[rows, kv_heads, tokens, head_dim]`.
        softness: temperature of the soft threshold, in units of the score; affects only the gradient.

    Returns:
        `[rows, kv_heads, arriving token, tokens]`, float32 ones and zeros; ones for tokens after the arriving one.
    """
    rows, heads, length, _ = keys.shape
    worth = learned.of_states(keys, values)
    positions = torch.arange(length, device=keys.device)
    parts: dict[int, torch.Tensor] = {}
    kinds = list(zip(plan.num_slots, plan.is_spatial, strict=True))
    for num_slots, is_spatial in set(kinds):
        mine = [head for head, kind in enumerate(kinds) if kind == (num_slots, is_spatial)]
        buffer = min(plan.buffer, num_slots)
        evictions = range(num_slots, length, buffer) if num_slots < plan.num_cells else range(0)
        held = _Held(worth.new_ones(rows, len(mine), length), buffer, softness)
        num_recent = 0 if is_spatial else plan.num_recent[mine[0]]
        for num_seen in evictions:
            seen = positions[:num_seen].expand(1, len(mine), -1)
            if is_spatial:
                ranks = seen.float().expand(rows, -1, -1)
            else:
                ranks = worth[:, mine, :num_seen] + learned.at(mine).of_places(seen, num_seen)
            held.evict(ranks, is_spared(seen, num_seen, num_recent, plan.num_sinks))
        # number of evictions before each token arrived
        number = torch.div(positions - num_slots, buffer, rounding_mode="floor").add(1).clamp(0, len(evictions))
        parts |= dict(zip(mine, torch.stack(held.after, 2).index_select(2, number).unbind(1), strict=True))
    return torch.stack([parts[head] for head in range(heads)], 1)


class _Held:
    """The tokens held by heads with equal slot counts; `after` has `[rows, heads, tokens]` for each eviction."""

    def __init__(self, everything: torch.Tensor, buffer: int, softness: float):
        self.buffer, self.softness = buffer, softness
        self.alive, self.soft, self.after = everything > 0, everything, [everything]

    def evict(self, ranks: torch.Tensor, spared: torch.Tensor) -> None:
        """Drop the `buffer` held tokens with the lowest `ranks`, `[rows, heads, seen]`, except those in `spared`."""
        seen = ranks.shape[2]
        alive = self.alive[..., :seen]
        ranks = ranks.masked_fill(spared, torch.inf)
        victims = lowest(ranks.detach(), ~alive, self.buffer)
        kept = alive.scatter(2, victims, False)
        self.alive = torch.cat([kept, self.alive[..., seen:]], 2)
        # the threshold lies between the lowest kept and the highest dropped rank, and moves with the tokens near it
        low = ranks.detach().gather(2, victims[..., -1:])
        high = ranks.detach().masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        cut = torch.where(high.isinf(), low, (low + high) / 2)  # if nothing is kept, it is above all ranks
        soft = torch.sigmoid((ranks.detach() - cut) / self.softness)
        near = soft * (1 - soft) * alive
        ranks = ranks.masked_fill(ranks.isinf(), 0.0)
        shift = (near * (ranks - ranks.detach())).sum(-1, keepdim=True) / near.sum(-1, keepdim=True).clamp(min=0.01)
        moved = soft + soft * (1 - soft) / self.softness * (ranks - ranks.detach() - shift)
        before = self.soft[..., :seen]
        # a dropped token cannot return: its soft value is the minimum over all evictions so far
        self.soft = torch.cat([torch.where(moved < before, moved, before), self.soft[..., seen:]], 2)
        self.after.append(self.alive.float() + (self.soft - self.soft.detach()))


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        num_prompt = logits.shape[-1] - held.shape[-1]
        masked = logits.clone()
        masked[..., num_prompt:, num_prompt:].masked_fill_(held[:, :, None] < 0.5, -torch.inf)
        total = masked.logsumexp(-1, keepdim=True)
        weights = (masked - total).exp()
        ctx.save_for_backward(logits, weights, total, held)
        return weights

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        logits, weights, total, held = ctx.saved_tensors
        start = logits.shape[-1] - held.shape[-1]
        change = gradient - (weights * gradient).sum(-1, keepdim=True)
        # the weight that an evicted token would have if it alone were added
        visual = (..., slice(start, None), slice(start, None))
        let_in = torch.sigmoid(logits[visual] - total[..., start:, :])
        share = torch.where(held[:, :, None] < 0.5, let_in, weights[visual])
        return weights * change, (share * change[visual]).sum(2)


def masked_softmax(logits: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Softmax over the held tokens, with a gradient also for tokens that are not held.

    Args:
        logits: `[rows, kv_heads, groups, prompt + tokens, prompt + tokens]`, minus infinity for masked tokens.
        held: `[rows, kv_heads, tokens, tokens]`, ones and zeros for the visual tokens.

    Returns:
        The weights, of the logits' shape. In the backward pass, the gradient of `held` is the change of the loss that
        each token's weight would cause, also where `held` is zero.
    """
    return _MaskedSoftmax.apply(logits, held)
