"""`batched_guidance`: transformers' classifier-free guidance with both branches in one batch, over one cache.

transformers' own runs the unconditional branch in a logits processor, with a `DynamicCache` that nobody can replace.
Here the model's forward doubles its rows, `[conditional; unconditional]`, and hands back guided scores; `generate`
itself (sampling, grammar, stopping) stays as it is. Models that guide themselves, as Janus does, need none of this.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ssd_cache._compat import CACHE, take_cache

BY_ROW = {"input_ids", "attention_mask", "position_ids", "cache_position"}
"""What may hold rows of the batch; all else that is a tensor would have to be doubled in a way of its own."""


@contextmanager
def batched_guidance(
    model: PreTrainedModel,
    guidance_scale: float,
    negative_prompt_ids: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
) -> Iterator[PreTrainedModel]:
    """Guide every `model.generate(...)` inside the block, which must not be given a `guidance_scale` of its own.

    The scores are those of transformers' `guidance_scale=`, `log p_u + scale * (log p_c - log p_u)`, to rounding: a
    batch of twice the rows, and padding before the shorter of the prompts, add up numbers in another order.

    Args:
        model: a causal language model; a call brings token ids, not embeddings or pictures.
        guidance_scale: 1 is no guidance, more is stronger.
        negative_prompt_ids: `[batch or 1, length]`, what the unconditional rows read; the prompt's last token when not
            given, as in transformers. A row may stand for several of the batch.
        negative_prompt_attention_mask: the same shape, 0 on padding, which stands on the left.

    Yields:
        The model. Its `forward` is the old one after the block, also after an exception.

    Raises:
        ValueError: inside the block, a batch that the negative prompts do not divide, other inputs than token ids, no
            cache, or a prompt in chunks.
    """
    own = vars(model).get("forward")
    model.forward = _guided(model.forward, guidance_scale, negative_prompt_ids, negative_prompt_attention_mask)
    try:
        yield model
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _guided(forward, scale: float, negative_ids: torch.Tensor | None, negative_mask: torch.Tensor | None):
    """A forward over `batch` rows that runs `forward` over twice as many."""
    rows: _Rows | None = None

    @functools.wraps(forward)  # generate looks at the signature
    def guided_forward(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        nonlocal rows
        cache = take_cache(kwargs)
        _check(input_ids, cache, position_ids, kwargs)
        if cache.get_seq_length() == 0:
            rows = _Rows(input_ids, attention_mask, negative_ids, negative_mask)
            input_ids = rows.prompt_ids
        elif rows is None or input_ids.shape[1] != 1:
            raise ValueError("batched guidance takes a prompt whole, then token by token: leave prefill_chunk_size out")
        else:
            input_ids = torch.cat([input_ids, input_ids])
        mask = rows.mask(attention_mask, cache.get_seq_length() + input_ids.shape[1])
        positions = None
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -input_ids.shape[1] :]
        outputs = forward(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            **{CACHE: cache},
            **kwargs,
        )
        given, free = F.log_softmax(outputs.logits[:, -1:].float(), -1).chunk(2)
        outputs.logits = scale * (given - free) + free
        return outputs

    return guided_forward


class _Rows:
    """The prompts of both branches in one batch, padded on the left to one width."""

    def __init__(self, ids, mask, negative_ids, negative_mask):
        batch = ids.shape[0]
        if negative_ids is None:
            negative_ids, negative_mask = ids[:, -1:], None
        if batch % negative_ids.shape[0]:
            raise ValueError(
                f"negative_prompt_ids has {negative_ids.shape[0]} rows and the batch {batch}: give one row, or one for "
                "each prompt"
            )
        if negative_mask is None:
            negative_mask = torch.ones_like(negative_ids)
        repeats = batch // negative_ids.shape[0]
        negative_ids, negative_mask = (
            tensor.to(ids.device).repeat_interleave(repeats, 0) for tensor in (negative_ids, negative_mask)
        )
        width = max(ids.shape[1], negative_ids.shape[1])
        self.num_padding = width - ids.shape[1]
        self.negative_mask = F.pad(negative_mask, (width - negative_mask.shape[1], 0))
        padded = [F.pad(part, (width - part.shape[1], 0)) for part in (ids, negative_ids.to(ids.dtype))]
        self.prompt_ids = torch.cat(padded)
        self.is_padded = bool(self.num_padding or mask is not None or (self.negative_mask == 0).any())

    def mask(self, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """The mask of both branches, `[2 * batch, length]`, from that of the conditional one; None without padding."""
        if not self.is_padded:
            return None
        batch = self.negative_mask.shape[0]
        if mask is None:
            mask = self.negative_mask.new_ones(batch, length - self.num_padding)
        both = (
            F.pad(mask.to(self.negative_mask.dtype), (self.num_padding, 0)),
            F.pad(self.negative_mask, (0, length - self.negative_mask.shape[1]), value=1),
        )
        return torch.cat(both)


def _check(input_ids, cache, position_ids, kwargs) -> None:
    """Refuse a call whose rows this module does not know how to double."""
    if input_ids is None or cache is None:
        missing = "token ids" if input_ids is None else "a cache"
        raise ValueError(f"batched guidance needs {missing} in every step: call generate(input_ids, use_cache=True)")
    others = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in BY_ROW]
    if position_ids is not None and position_ids.ndim != 2:
        others.append("position_ids of three axes")
    if others:
        raise ValueError(
            f"batched guidance doubles the rows of token ids and masks, and the call has {', '.join(others)} too; "
            "leave it out, or draw without guidance"
        )
