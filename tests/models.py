"""Small models with random weights, of the real classes: a Janus, and a Llama with grouped KV heads."""

from __future__ import annotations

import torch
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

BOS, EOS, PAD, BOI = 1, 2, 0, 4


def tiny_janus(*, layers=2, hidden=32, heads=2, grid_side=24, seed=0, attn_implementation="ssd"):
    """A Janus whose pictures have `grid_side` squared visual tokens."""
    torch.manual_seed(seed)
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 1024,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "initializer_range": 0.2,  # sharp enough that attention is not flat
        },
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "mlp_ratio": 1.0,
            "projection_dim": hidden,
            "depth": 1,
            "image_size": 16 * grid_side,
            "patch_size": 16,
            "num_image_tokens": grid_side**2,
        },
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 32,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 0,
            "projection_dim": hidden,
            "image_token_embed_dim": hidden,
            "initializer_range": 0.2,
        },
        image_token_id=6,
    )
    config._attn_implementation = "sdpa"
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI}
    )
    model.set_attn_implementation({"text_config": attn_implementation})
    return model


def tiny_llama(*, layers=2, heads=4, kv_heads=2, seed=0, attn_implementation="ssd"):
    """A text model with `heads / kv_heads` query heads to a KV head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attn_implementation)
    return model


def left_padded_prompts(lengths, seed=0):
    """Token ids and attention mask `[len(lengths), max(lengths)]`, BOS first and BOI last in each row."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(10, 40, (length,), generator=generator)
        words[0], words[-1] = BOS, BOI
        ids[row, width - length :] = words
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}
