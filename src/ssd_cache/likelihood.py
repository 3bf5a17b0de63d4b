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
