"""Log-probabilities of the next visual token under guidance, and the KL divergence of two distributions.

This module has only tensor functions; it runs no model.
"""

from __future__ import annotations

import torch


def log_probabilities(
    scores: torch.Tensor, is_unconditional: torch.Tensor, guidance_scale: float, temperature: float
) -> torch.Tensor:
    """The log-probabilities from which tokens are sampled.

    Args:
        scores: logits of the head, `[rows, ..., vocabulary]`.
        is_unconditional: `[rows]`, True for guidance's rows without a prompt; without such rows, there is no guidance.
        guidance_scale, temperature: as for `Generator.generate`, the temperature above 0.

    Returns:
        `[images, ..., vocabulary]`.
    """
    if is_unconditional.any():
        without = scores[is_unconditional]
        scores = without + guidance_scale * (scores[~is_unconditional] - without)
    return (scores / temperature).log_softmax(-1)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, `[...]`, of log-probabilities `[..., vocabulary]`; terms with p = 0 are 0."""
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0)
    return terms.sum(-1).clamp_min(0)  # rounding can make it negative


def certain_scores(scores: torch.Tensor, tokens: torch.Tensor, is_unconditional: torch.Tensor) -> torch.Tensor:
    """Logits under which a given token is the most likely one, with or without guidance.

    Args:
        scores: logits of the head, `[rows, ..., vocabulary]`; only shape, dtype and device are used.
        tokens: `[images]`, the given token of each image.
        is_unconditional: as for `log_probabilities`.
    """
    tokens = tokens.to(scores.device)
    rows = torch.empty(len(scores), dtype=tokens.dtype, device=tokens.device)
    for branch in (is_unconditional, ~is_unconditional):
        if branch.any():
            rows[branch.to(rows.device)] = tokens
    index = rows.view(-1, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    return torch.zeros_like(scores).scatter_(-1, index, 100.0)
