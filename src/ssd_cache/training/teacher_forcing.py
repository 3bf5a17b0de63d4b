"""Recordings: images generated with a full cache, fed to the decoder again, all tokens at once and with gradients.

This module runs the decoder with an attention function given by the caller. `recording.py` makes recordings; nothing is
trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.models import Generator
from ssd_cache.training.likelihood import log_probabilities

NAME = "ssd-training"

Weigh = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""A function that computes attention weights, of the shape of the logits.

Its arguments are a layer's index; the logits of all tokens `[rows, kv_heads, groups, tokens, tokens]`, float32, minus
infinity where a full cache masks a token; and K and V of the visual tokens `[rows, kv_heads, visual tokens, head_dim]`.
"""


@dataclass(frozen=True)
class Recording:
    """The decoder inputs of some images, prompts included.

    Attributes:
        inputs: the decoder's inputs, `[rows, num_prompt + cells - 1, ...]` each: token ids or embeddings, positions.
        seen: `[rows, num_prompt]`, False on padding.
        is_unconditional: `[rows]`, True for guidance's rows without a prompt, which are in the order of the others.
    """

    inputs: dict[str, torch.Tensor]
    seen: torch.Tensor
    is_unconditional: torch.Tensor

    def split(self, num_images: int) -> list[Recording]:
        """Recordings of this many images each, with their unconditional rows; the last may be smaller."""
        kinds = [kind.nonzero()[:, 0].split(num_images) for kind in (~self.is_unconditional, self.is_unconditional)]
        return [self._of_rows(torch.cat(rows)) for rows in zip_longest(*kinds, fillvalue=kinds[1][0][:0])]

    def conditional(self) -> Recording:
        """The recording without unconditional rows, for a guidance scale at which they have no effect."""
        return self._of_rows((~self.is_unconditional).nonzero()[:, 0])

    def _of_rows(self, rows: torch.Tensor) -> Recording:
        inputs = {name: tensor[rows.to(tensor.device)] for name, tensor in self.inputs.items()}
        return Recording(inputs, self.seen[rows.to(self.seen.device)], self.is_unconditional[rows])


def attend_recording(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' attention function for the name "ssd-training"; works only inside `teacher_forced`."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.ssd_attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


@contextmanager
def teacher_forced(generator: Generator, recording: Recording, weigh: Weigh) -> Iterator[None]:
    """Inside the block, the decoder uses the attention weights of `weigh`; model parameters require no gradients."""
    allowed, num_prompt = _allowed_tokens(recording), recording.seen.shape[1]

    def attend(layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float):
        grouped = query.unflatten(1, (key.shape[1], -1)) * scaling
        logits = (grouped @ key[:, :, None].mT).float().masked_fill(~allowed, -torch.inf)
        weights = weigh(layer_idx, logits, key[:, :, num_prompt:], value[:, :, num_prompt:])
        return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)

    model = generator.model
    layers = [module for module in generator.language_model.get_decoder().modules() if hasattr(module, "layer_idx")]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ssd_attention(generator.language_model, NAME):
        try:
            for parameter in learned:
                parameter.requires_grad_(False)
            for module in layers:
                module.ssd_attend = attend
            yield
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)
            for module in layers:
                del module.ssd_attend


def _allowed_tokens(recording: Recording) -> torch.Tensor:
    """The attention mask of a full cache, `[rows, 1, 1, tokens, tokens]`; padding attends to itself."""
    length = next(tensor for name, tensor in recording.inputs.items() if name != "position_ids").shape[1]
    seen = torch.nn.functional.pad(recording.seen, (0, length - recording.seen.shape[1]), value=True)
    causal = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=seen.device)
    return (causal & seen[:, None] | itself)[:, None, None]


def log_probabilities_of(
    generator: Generator, recording: Recording, guidance_scale: float, temperature: float
) -> torch.Tensor:
    """Log-probabilities of every visual token, `[images, cells, vocabulary]`, float32, inside `teacher_forced`."""
    decoder, head = generator.language_model.get_decoder(), generator.visual_head
    assert head is not None
    states = decoder(**recording.inputs, use_cache=False).last_hidden_state[:, recording.seen.shape[1] - 1 :]
    scores = head(states).float()
    return log_probabilities(scores, recording.is_unconditional.to(scores.device), guidance_scale, temperature)


AttentionInterface.register(NAME, attend_recording)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
