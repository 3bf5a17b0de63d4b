"""The attention "ssd": pass each step's query to the layer of the cache, which attends to the tokens of every head.

Importing this module registers the name with transformers, for attention and for masks. With any other cache than
`SSDCache`, or without a cache, it is sdpa itself, so a model may keep it permanently.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ssd"


class AttendingLayer(Protocol):
    """A layer of a cache that receives queries; its `update` sets itself as `ssd_layer` of the keys it returns."""

    num_kv_heads: int

    @property
    def in_prompt(self) -> bool:
        """Whether the newest tokens are of the prompt."""

    def see_prompt(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        window: int | None,
    ) -> None:
        """Receive the tensors of attention over the prompt.

        Args:
            query, key, value: `[batch, heads or kv_heads, tokens, head_dim]`.
            mask: `[batch, num_prompt]`, False on padding, or None.
            scaling: factor on the products of queries and keys.
            window: tokens of a sliding window, or None for full attention.
        """

    def attend(self, query: torch.Tensor, key: Any, value: Any, scaling: float, dropout: float) -> torch.Tensor:
        """Attend with one visual token's query.

        Args:
            query: `[batch, kv_heads, groups, head_dim]`.
            key, value: as `update` returned them.

        Returns:
            `[batch, kv_heads, groups, value_dim]`.
        """


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

    Args:
        query: `[batch, heads, new, head_dim]`.
        key, value: the same objects that the cache's `update` returned.
        attention_mask: transformers' mask for this forward. One-token steps do not read it: it has the first layer's
            length, and the padding columns are known from the prompt.

    Returns:
        `[batch, new, heads, head_dim]`, and None for the weights.
    """
    layer: AttendingLayer | None = getattr(key, "ssd_layer", None)
    if layer is not None and not layer.in_prompt:
        batch, num_heads, new, head_dim = query.shape
        scaling = head_dim**-0.5 if scaling is None else scaling
        num_kv_heads = layer.num_kv_heads
        grouped = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return layer.attend(grouped, key, value, scaling, dropout).reshape(batch, new, num_heads, -1), None
    if layer is None:
        _check_not_paged(kwargs)
    else:
        mask = prompt_columns(attention_mask, key.shape[2])
        own_scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        layer.see_prompt(query, key, value, mask, own_scaling, kwargs.get("sliding_window"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _check_not_paged(arguments: dict[str, Any]) -> None:
    """Refuse continuous batching: transformers makes the mask for its packed rows only for "sdpa"."""
    if arguments.get("read_index") is not None or arguments.get("block_table") is not None:
        raise ValueError(
            "generate_batch works on a paged cache of its own, which the attention 'ssd' does not read: call "
            "model.set_attn_implementation('sdpa') before generate_batch, or model.generate with an SSDCache"
        )


def prompt_columns(attention_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """`[batch, length]`, False on padding: the last token's row of a mask `[batch, 1, new, length]`."""
    if attention_mask is None:
        return None
    last = attention_mask[:, 0, -1, :length]
    return last if last.dtype == torch.bool else last >= 0


AttentionInterface.register(NAME, ssd_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
