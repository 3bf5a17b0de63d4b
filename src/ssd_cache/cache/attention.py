"""The attention "ssd": pass each step's query to the cache, then run sdpa or a kernel over the tokens of every head.

Importing this module registers the name with transformers, for attention and for masks. With any other cache than
`SSDCache`, or without a cache, it is sdpa itself, so a model may keep it permanently. It computes attention only: the
cache has already chosen the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ssd_cache.cache.layer import SSDLayer
from ssd_cache.kernels import dispatch as fused

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

    Args:
        query: `[batch, heads, new, head_dim]`.
        key, value: the same objects that the cache's `update` returned.
        attention_mask: transformers' mask for this forward. One-token steps do not read it: it has the first layer's
            length, and the padding columns are known from the prompt.

    Returns:
        `[batch, new, heads, head_dim]`, and None for the weights.
    """
    layer: SSDLayer | None = getattr(key, "ssd_layer", None)
    if layer is None or (layer.step is None and layer.num_visual == 0):
        if layer is None:
            _check_not_paged(kwargs)
        else:
            _check_window(layer, kwargs.get("sliding_window"))
            layer.receive_mask(prompt_columns(attention_mask, key.shape[2]))
            layer.use_kernel(fused.can_serve(query, key, value, on_cpu=layer.is_fast))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    batch, num_heads, _, head_dim = query.shape
    scaling = head_dim**-0.5 if scaling is None else scaling
    num_kv_heads = len(layer.plan.is_spatial)
    grouped = query.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    if layer.is_fused:
        if dropout or (torch.is_grad_enabled() and query.requires_grad):
            raise ValueError(
                "a picture that was begun without gradients now asks for them, or for dropout, which the kernel of "
                "SSDCache does not have: draw it to the end under torch.no_grad() and model.eval()"
            )
        return _attend_fused(layer, grouped, key[0], value[0], scaling).reshape(batch, 1, num_heads, -1), None
    attend = _attend_by_products if _is_faster_by_products(layer, query, dropout) else F.scaled_dot_product_attention
    outputs = []
    parts = layer.receive_query(grouped, scaling)
    for part, (keys, values, mask) in zip(parts, layer.visible(key, value), strict=True):
        outputs.append(attend(part, keys, values, mask, dropout, scale=scaling))
    return layer.restore_order(outputs).reshape(batch, 1, num_heads, -1), None


def _is_faster_by_products(layer: SSDLayer, query: torch.Tensor, dropout: float) -> bool:
    """Whether two matrix products beat torch's sdpa: for one query per head on a CPU, above all in bfloat16.

    Eager steps keep sdpa, because their tokens then equal those of a full cache bit for bit.
    """
    return layer.step is not None and query.device.type == "cpu" and not dropout


def _attend_by_products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Compute `scaled_dot_product_attention` as two matrix products."""
    weights = (query * scale) @ keys.mT
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.float().softmax(-1).to(values.dtype) @ values


def _attend_fused(
    layer: SSDLayer, query: torch.Tensor, new_key: torch.Tensor, new_value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Run one kernel per store: write K and V, attend, accumulate scores; `kernels.dispatch.decode` has the shapes."""
    if query.dtype != new_key.dtype and torch.is_autocast_enabled(query.device.type):
        query = query.to(new_key.dtype)  # as sdpa does under autocast
    step, output = layer.step_at(), query.new_empty(*query.shape[:3], new_value.shape[3])
    for store, heads in zip(layer.stores, layer.heads, strict=True):
        fused.decode(
            query,
            new_key,
            new_value,
            store.keys,
            store.values,
            store.scores,
            heads,
            store.mask,
            step,
            scaling,
            store.buffer,
            output,
        )
    return output


def _check_window(layer: SSDLayer, window: int | None) -> None:
    """At the prompt, refuse a layer with sliding window attention unless its window holds prompt and image."""
    length = layer.num_prompt + layer.plan.num_cells
    if window is not None and window < length:
        raise ValueError(
            f"layer {layer.plan.layer_idx} attends a sliding window of {window} tokens, and prompt and picture are "
            f"{length}: SSDCache is for layers of full attention"
        )


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
