"""Simulated evictions over a whole image at once, differentiable by a straight-through estimator.

In the forward pass, zeros and ones mark exactly the tokens that an `SSDCache` would hold at every step. In the backward
pass, the eviction threshold is soft, and an evicted token receives the change of the loss that it would have caused.
This module runs no model and takes no optimizer steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssd_cache.cache.layer import LayerPlan
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
    ages = torch.arange(length, device=keys.device)
    parts: dict[int, torch.Tensor] = {}
    kinds = list(zip(plan.num_slots, plan.is_spatial, strict=True))
    for num_slots, is_spatial in set(kinds):
        mine = [head for head, kind in enumerate(kinds) if kind == (num_slots, is_spatial)]
        buffer = min(plan.buffer, num_slots)
        evictions = range(num_slots, length, buffer) if num_slots < plan.num_cells else range(0)
        held = _Held(worth.new_ones(rows, len(mine), length), num_slots - buffer, softness)
        for num_seen in evictions:
            if is_spatial:
                ranks = ages[None, None, :num_seen].float().expand(rows, len(mine), -1)
            else:
                places = ages[:num_seen].expand(1, len(mine), -1)
                ranks = worth[:, mine, :num_seen] + learned.at(mine).of_places(places, num_seen)
                recent = ages[:num_seen] >= num_seen - plan.num_recent[mine[0]]
                ranks = ranks.masked_fill(recent, torch.inf)
            held.evict(ranks.masked_fill(ages[:num_seen] < plan.num_sinks, torch.inf))
        # number of evictions before each token arrived
        number = torch.div(ages - num_slots, buffer, rounding_mode="floor").add(1).clamp(0, len(evictions))
        parts |= dict(zip(mine, torch.stack(held.after, 2).index_select(2, number).unbind(1), strict=True))
    return torch.stack([parts[head] for head in range(heads)], 1)


class _Held:
    """The tokens held by heads with equal slot counts; `after` has `[rows, heads, tokens]` for each eviction."""

    def __init__(self, everything: torch.Tensor, num_kept: int, softness: float):
        self.num_kept, self.softness = num_kept, softness
        self.alive, self.soft, self.after = everything > 0, everything, [everything]

    def evict(self, ranks: torch.Tensor) -> None:
        """Permanently drop all held tokens except the `num_kept` with the highest `ranks`, `[rows, heads, seen]`."""
        seen = ranks.shape[2]
        alive = self.alive[..., :seen]
        # of equal ranks the older token is dropped, so the stable sort sees newer tokens first
        newest_first = ranks.detach().masked_fill(~alive, -torch.inf).flip(-1)
        values, indices = newest_first.sort(dim=-1, descending=True, stable=True)
        kept = torch.zeros_like(alive).scatter_(2, seen - 1 - indices[..., : self.num_kept], True)
        self.alive = torch.cat([kept, self.alive[..., seen:]], 2)
        # the threshold lies between the lowest kept and the highest dropped rank, and moves with the tokens near it
        between = F.pad(values, (1, 0), value=torch.inf)  # if nothing is kept, the threshold is above all ranks
        high, low = between[..., self.num_kept : self.num_kept + 2].split(1, -1)
        cut = torch.where(high.isinf(), low, (low + high) / 2)
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
