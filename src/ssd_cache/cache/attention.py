"""The attention "ssd": passes the query of each step to the cache layer, which attends to the tokens of every head.

Importing this module registers the name with transformers, for attention and for masks. With any other cache than
`SSDCache`, or without a cache, it is sdpa itself, so a model may keep it permanently.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ssd"


def ssd_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for the name "ssd".

    A cache receives the queries if its `update` sets a layer as `ssd_layer` of the keys that it returns. The layer has
    `num_kv_heads`, `in_prompt`, `see_prompt` and `attend`, as `SSDLayer` has.

    Args:
        query: `[batch, heads, new, head_dim]`.
        key, value: the same objects that the cache's `update` returned.
        attention_mask: transformers' mask for this forward. One-token steps do not read it: it has the first layer's
            length, and the padding columns are known from the prompt.

    Returns:
        `[batch, new, heads, head_dim]`, and None for the weights.
    """
    layer = getattr(key, "ssd_layer", None)
    if layer is None:
        if kwargs.get("read_index") is not None or kwargs.get("block_table") is not None:
            raise ValueError(  # transformers makes the mask for the packed rows of a paged cache only for "sdpa"
                "generate_batch works on a paged cache of its own, which the attention 'ssd' does not read: call "
                "model.set_attn_implementation('sdpa') before generate_batch, or model.generate with an SSDCache"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, num_heads, new, head_dim = query.shape
    factor = head_dim**-0.5 if scaling is None else scaling
    if not layer.in_prompt:
        grouped = query.reshape(batch, layer.num_kv_heads, num_heads // layer.num_kv_heads, head_dim)
        return layer.attend(grouped, key, value, factor, dropout).reshape(batch, new, num_heads, -1), None
    mask = prompt_columns(attention_mask, key.shape[2])
    layer.see_prompt(query, mask, factor, kwargs.get("sliding_window"), dropout)
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def prompt_columns(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """`[batch, length]`, False on padding: the last token's row of a mask `[batch, 1, new, length]`."""
    if attention_mask is None:
        return None
    last = attention_mask[:, 0, -1, :length]
    return last if last.dtype == torch.bool else last >= 0


AttentionInterface.register(NAME, ssd_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
