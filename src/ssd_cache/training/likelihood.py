"""What a model says of the next visual token: log-probabilities under guidance, and how far two of them are apart.

Tensor functions alone; whose scores they are, and why they are compared, is the callers' business.
"""

from __future__ import annotations

import torch


def log_probabilities(
    scores: torch.Tensor, is_unconditional: torch.Tensor, guidance_scale: float, temperature: float
) -> torch.Tensor:
    """What tokens are sampled by, of the head's scores.

    Args:
        scores: `[rows, ..., vocabulary]`.
        is_unconditional: `[rows]`, the rows that guidance draws without their prompts; none of them: no guidance.
        guidance_scale, temperature: as for `Generator.generate`, the temperature above 0.

    Returns:
        `[pictures, ..., vocabulary]`.
    """
    if is_unconditional.any():
        without = scores[is_unconditional]
        scores = without + guidance_scale * (scores[~is_unconditional] - without)
    return (scores / temperature).log_softmax(-1)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, `[...]`, of log-probabilities `[..., vocabulary]`; what p rules out counts nothing."""
    p = log_p.exp()
    terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0)
    return terms.sum(-1).clamp_min(0)  # below 0 by rounding alone


def certain_scores(scores: torch.Tensor, tokens: torch.Tensor, is_unconditional: torch.Tensor) -> torch.Tensor:
    """Scores under which a given token is the likeliest one, with guidance or without.

    Args:
        scores: of the head, `[rows, ..., vocabulary]`, for their shape, dtype and device.
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
