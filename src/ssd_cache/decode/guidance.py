"""`batched_guidance`: transformers' classifier-free guidance with both branches in one batch, over one cache.

transformers runs the unconditional branch in a logits processor, with a `DynamicCache` that cannot be replaced. Here
the model's forward doubles its rows, `[conditional; unconditional]`, and returns guided logits. `generate` itself
(sampling, grammar, stopping) is not changed. Models with their own guidance, such as Janus, do not need this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel

from ssd_cache._compat import CACHE, find_cache, in_prefill, take_cache, uncompiled
from ssd_cache.decode.patching import Block, Patch, innermost, patched

BY_ROW = {"input_ids", "attention_mask", "position_ids", "cache_position"}
"""Arguments that may hold rows of the batch; other tensors are refused, since doubling their rows is not defined."""


@contextmanager
def batched_guidance(
    model: PreTrainedModel,
    guidance_scale: float,
    negative_prompt_ids: torch.Tensor | None = None,
    negative_prompt_attention_mask: torch.Tensor | None = None,
    *,
    cache: Cache | None = None,
) -> Iterator[PreTrainedModel]:
    """Guide every `model.generate(...)` call inside the block; the calls must not set `guidance_scale` themselves.

    The logits equal those of transformers' `guidance_scale=`, `log p_u + scale * (log p_c - log p_u)`, to rounding: a
    batch of twice the rows, and padding before the shorter prompt, change the order of summation.

    Blocks may nest and overlap, also across threads. A call is guided by the innermost block that its own thread
    entered, or else by the only open block.

    Args:
        model: a causal language model; calls must pass token ids, not embeddings or images.
        guidance_scale: 1 is no guidance; larger values are stronger.
        negative_prompt_ids: `[batch or 1, length]`, prompt of the unconditional rows. Default: the prompt's last token,
            as in transformers. One row may serve several rows of the batch.
        negative_prompt_attention_mask: the same shape, 0 on padding, which is on the left.
        cache: guide only the calls over this cache, in any thread. Default: any cache.

    Yields:
        The model. Its `forward` is restored after the block, also after an exception.

    Raises:
        ValueError: inside the block, the batch is not a multiple of the rows of negative prompts, or a call has other
            inputs than token ids, no cache, or a prompt in chunks.
        RuntimeError: several blocks are open and the calling thread entered none of them.
    """
    guidance = _Guidance(
        scale=guidance_scale,
        negative_ids=negative_prompt_ids,
        negative_mask=negative_prompt_attention_mask,
        cache=cache,
    )
    with patched(uncompiled(model), "forward", _GuidedForward, guidance):
        yield model


@dataclass(eq=False, kw_only=True)
class _Guidance(Block):
    """Guidance of one block, and the rows of every cache that it generates into."""

    scale: float
    negative_ids: torch.Tensor | None
    negative_mask: torch.Tensor | None
    cache: Cache | None
    rows: WeakKeyDictionary[Cache, _Rows] = field(default_factory=WeakKeyDictionary)


class _GuidedForward(Patch):
    """Replacement for `forward` over `batch` rows that runs the model's own over twice as many, for guided calls."""

    def __call__(self, *args, **kwargs):
        guidance = self._guidance_of(find_cache(kwargs))
        if guidance is None:
            return self.inner(*args, **kwargs)
        return self._guide(guidance, *args, **kwargs)

    def _guidance_of(self, cache: Cache | None) -> _Guidance | None:
        owners = list(self.owners)
        if cache is not None:
            for guidance in reversed(owners):
                if guidance.cache is cache:
                    return guidance
        return innermost([guidance for guidance in owners if guidance.cache is None], "batched_guidance")

    def _guide(self, guidance: _Guidance, input_ids=None, attention_mask=None, position_ids=None, **kwargs: Any) -> Any:
        cache = take_cache(kwargs)
        _check(input_ids, cache, position_ids, kwargs)
        rows = guidance.rows.get(cache)
        num_seen = cache.get_seq_length()
        if num_seen == 0:
            rows = _Rows(input_ids, attention_mask, guidance.negative_ids, guidance.negative_mask)
            guidance.rows[cache] = rows
            input_ids = rows.prompt_ids
        elif rows is None or input_ids.shape[1] != 1 or (num_seen == rows.width and in_prefill()):
            raise ValueError("batched guidance takes a prompt whole, then token by token: leave prefill_chunk_size out")
        else:
            input_ids = torch.cat([input_ids, input_ids])
        mask = rows.mask(attention_mask, num_seen + input_ids.shape[1])
        positions = None
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, -input_ids.shape[1] :]
        outputs = self.inner(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            **{CACHE: cache},
            **kwargs,
        )
        given, free = F.log_softmax(outputs.logits[:, -1:].float(), -1).chunk(2)
        outputs.logits = guidance.scale * (given - free) + free
        return outputs


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
        self.width = width = max(ids.shape[1], negative_ids.shape[1])
        self.num_padding = width - ids.shape[1]
        self.negative_mask = F.pad(negative_mask, (width - negative_mask.shape[1], 0))
        padded = [F.pad(part, (width - part.shape[1], 0)) for part in (ids, negative_ids.to(ids.dtype))]
        self.prompt_ids = torch.cat(padded)
        self.is_padded = bool(self.num_padding or mask is not None or (self.negative_mask == 0).any())

    def mask(self, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """Mask of both branches, `[2 * batch, length]`, from the conditional branch's mask; None without padding."""
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
    """Refuse a call whose rows this module cannot double."""
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
