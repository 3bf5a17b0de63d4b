"""`batched_guidance`: transformers' classifier-free guidance with both branches in one batch, over one cache.

transformers runs the unconditional branch in a logits processor, with a `DynamicCache` that cannot be replaced. Here
the model's forward doubles its rows, `[conditional; unconditional]`, and returns guided logits. `generate` itself
(sampling, grammar, stopping) is not changed. Models with their own guidance, such as Janus, do not need this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel

from ssd_cache._compat import CACHE, find_cache, in_prefill, take_cache, uncompiled
from ssd_cache.decode.patching import Block, Patch, innermost, patched


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

    The logits equal those of transformers' `guidance_scale=`, `log p_u + scale * (log p_c - log p_u)`, to rounding.
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
    guidance = _Guidance(guidance_scale, negative_prompt_ids, negative_prompt_attention_mask, cache)
    with patched(uncompiled(model), "forward", _GuidedForward, guidance):
        yield model


class _Guidance(Block):
    """Guidance of one block, and the rows of every cache that it generates into."""

    def __init__(self, scale, negative_ids, negative_mask, cache):
        super().__init__()
        self.scale, self.negative_ids, self.negative_mask, self.cache = scale, negative_ids, negative_mask, cache
        self.rows: WeakKeyDictionary[Cache, _Rows] = WeakKeyDictionary()


class _GuidedForward(Patch):
    """Replacement for `forward`: for guided calls, it runs the model's `forward` over twice the rows."""

    def __call__(self, *args, **kwargs):
        cache, owners = find_cache(kwargs), list(self.owners)
        guidance = next((each for each in reversed(owners) if cache is not None and each.cache is cache), None)
        if guidance is None:
            guidance = innermost([each for each in owners if each.cache is None], "batched_guidance")
        return self.inner(*args, **kwargs) if guidance is None else self._guide(guidance, *args, **kwargs)

    def _guide(self, guidance: _Guidance, input_ids=None, attention_mask=None, position_ids=None, **kwargs: Any) -> Any:
        cache = take_cache(kwargs)
        _check(input_ids, cache, position_ids, kwargs)
        num_seen, rows = cache.get_seq_length(), guidance.rows.get(cache)
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
        call = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, CACHE: cache}
        outputs = self.inner(**call, **kwargs)
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
        repeats, width = batch // negative_ids.shape[0], max(ids.shape[1], negative_ids.shape[1])
        negative_ids, negative_mask = (
            F.pad(part.to(ids.device).repeat_interleave(repeats, 0), (width - part.shape[1], 0))
            for part in (negative_ids.to(ids.dtype), negative_mask)
        )
        self.width, self.num_padding, self.negative_mask = width, width - ids.shape[1], negative_mask
        self.prompt_ids = torch.cat([F.pad(ids, (self.num_padding, 0)), negative_ids])
        self.is_padded = bool(self.num_padding or mask is not None or (negative_mask == 0).any())

    def mask(self, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
        """Extend the conditional branch's mask to both branches, `[2 * batch, length]`; None if nothing is padded."""
        if not self.is_padded:
            return None
        negative = F.pad(self.negative_mask, (0, length - self.width), value=1)
        if mask is None:
            mask = negative.new_ones(len(negative), length - self.num_padding)
        return torch.cat([F.pad(mask.to(negative.dtype), (self.num_padding, 0)), negative])


def _check(input_ids, cache, position_ids, kwargs) -> None:
    """Refuse a call whose rows this module cannot double."""
    if input_ids is None or cache is None:
        missing = "token ids" if input_ids is None else "a cache"
        raise ValueError(f"batched guidance needs {missing} in every step: call generate(input_ids, use_cache=True)")
    others = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name != "cache_position"]
    if position_ids is not None and position_ids.ndim != 2:
        others.append("position_ids of three axes")
    if others:
        raise ValueError(
            f"batched guidance doubles the rows of token ids and masks, and the call has {', '.join(others)} too; "
            "leave it out, or generate without guidance"
        )
