"""A rival for GPUs: a `StaticCache` over torch's `varlen_attn`, whose `seqused_k` lets a step read stored tokens only.

With any other attention, a step reads all slots of a `StaticCache` under a mask. It is for prompts without padding, as
those of the bench, in float16 or bfloat16. Written without a GPU and not run on one: the tests use a stand-in for
`varlen_attn`, and torch's own operator on meta tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "varlen"


class VarlenLayer(StaticLayer):
    """A static layer whose K and V `[batch, kv_heads, slots, head_dim]` are views of `[batch, slots, kv_heads, ...]`.

    `varlen_attn` reads the tokens of all rows as one sequence, without a copy only in this order.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for name in ("keys", "values"):
            states = getattr(self, name).transpose(1, 2).contiguous().transpose(1, 2)
            torch._dynamo.mark_static_address(states)
            setattr(self, name, states)


def varlen_cache(config: PreTrainedConfig, max_cache_len: int) -> StaticCache:
    """A `StaticCache` of `VarlenLayer`s."""
    cache = StaticCache(config=config, max_cache_len=max_cache_len)
    cache.layers = [VarlenLayer(max_cache_len) for _ in cache.layers]
    return cache


def varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for one-token steps over `VarlenLayer`s; the prompt runs sdpa.

    Args:
        query: `[batch, heads, new, head_dim]`.
        key, value: `[batch, kv_heads, slots, head_dim]`, as a `VarlenLayer` holds them.
        attention_mask: `[batch, 1, new, slots]`, True for the stored tokens, which are the first ones.

    Returns:
        `[batch, new, heads, head_dim]`, and None for the weights.
    """
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, kv_heads, slots, _ = key.shape
    rows = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    keys, values = (states.transpose(1, 2).reshape(batch * slots, kv_heads, -1) for states in (key, value))
    output: Any = varlen_attn(  # a tuple only with `return_aux`
        query[:, :, 0],
        keys,
        values,
        cu_seq_q=rows,
        cu_seq_k=slots * rows,
        max_q=1,
        max_k=slots,
        scale=scaling,
        enable_gqa=query.shape[1] != kv_heads,
        seqused_k=attention_mask[:, 0, 0].sum(-1, dtype=torch.int32),
    )
    return output[:, None], None


AttentionInterface.register(ATTENTION, varlen_attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
