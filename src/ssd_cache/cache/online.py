"""Labels found during generation: whether a window or the highest scores keep more of a head's attention.

An online layer calls this once for each image, when its slots are first full. It evicts nothing.
"""

from __future__ import annotations

import torch


def prefers_window(weights: torch.Tensor, scores: torch.Tensor, num_prompt: int, num_recent: int) -> torch.Tensor:
    """Whether a window keeps more attention than heavy hitters, head by head: the labels of an online map.

    The function takes the tokens that a head held before the newest queries, and two ways to keep half of them: the
    newest half (a spatial head), or the half with the highest scores, always with the newest tokens in it (a semantic
    head). The head is labelled by the half that received more attention from the newest queries. Sinks are left out,
    since both kinds keep the same ones. All rows of the batch count together; a tie makes the head semantic.

    Args:
        weights: `[batch, kv_heads, groups, steps, num_prompt + stored]`, the attention of the newest queries, with
            every token still in the slot in which it arrived.
        scores: `[batch, kv_heads, stored - steps]`, from a scorer's `rank`, before these queries.
        num_prompt: columns of the prompt.
        num_recent: newest tokens that a semantic head always keeps, out of all stored tokens; the half keeps the same
            fraction.

    Returns:
        `[kv_heads]`, True where the window keeps more attention.
    """
    num_before, num_stored = scores.shape[-1], weights.shape[-1] - num_prompt
    num_kept = num_before // 2
    received = weights[..., num_prompt : num_prompt + num_before].sum((2, 3))  # [batch, kv_heads, num_before]
    ranks = scores.clone()
    ranks[..., num_before - num_recent * num_kept // num_stored :] = float("inf")
    # newest first, so that of equal scores the older token is dropped
    best = ranks.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :num_kept]
    hitters = received.flip(-1).gather(-1, best).sum((0, 2), dtype=torch.float64)
    return received[..., num_before - num_kept :].sum((0, 2), dtype=torch.float64) > hitters * (1 + 1e-6)
