"""Models by shape: the real configuration classes with random weights, made on the device in the dtype they run in.

What a step costs does not depend on what the weights say, so nothing is downloaded. Who draws with them is
`subject.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    Emu3ForCausalLM,
    Emu3TextConfig,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

BOS, EOS, PAD, BOI = 1, 2, 0, 4
"""Token ids of the random models' prompts."""

TINY_TOWERS = {
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "mlp_ratio": 1.0,
        "depth": 1,
    },
    "vq_config": {"latent_channels": 32, "base_channels": 32, "channel_multiplier": [1] * 5, "num_res_blocks": 0},
}
"""For a Janus that is to be small: the parts that no step of the generation runs."""


@dataclass(frozen=True)
class Shape:
    """A model to be made up.

    Attributes:
        model_class: the transformers class.
        make_config: its configuration.
        grid: rows and columns of visual tokens; a token that ends a line is a column too.
        num_prompt: tokens of the prompts that are drawn.
    """

    model_class: type[PreTrainedModel]
    make_config: Callable[[], PreTrainedConfig]
    grid: tuple[int, int]
    num_prompt: int


def janus_config(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    *,
    vocab_size=102400,
    length=16384,
    **towers,
) -> JanusConfig:
    """A Janus-Pro whose decoder has these sizes; the towers and the 16384 codes are Janus-Pro's unless given."""
    wide = {"projection_dim": hidden_size}
    return JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads,
            "max_position_embeddings": length,
        },
        vision_config={**towers.get("vision_config", {}), **wide},
        vq_config={**towers.get("vq_config", {}), **wide, "image_token_embed_dim": hidden_size},
        image_token_id=6,
    )


def llamagen_config() -> LlamaConfig:
    """LlamaGen's GPT-XL as a Llama: the same layers, with positions along one axis instead of two.

    36 layers, 20 heads of 64, and 2/3 of 4 x 1280 rounded up to a multiple of 256 inside the MLP (FoundationVision's
    `autoregressive/models/gpt.py`). The class token is one of the vocabulary here.
    """
    return LlamaConfig(
        vocab_size=16384,
        hidden_size=1280,
        intermediate_size=3584,
        num_hidden_layers=36,
        num_attention_heads=20,
        num_key_value_heads=20,
        max_position_embeddings=1024,
    )


SHAPES = {
    "small-cpu": Shape(
        JanusForConditionalGeneration,
        lambda: janus_config(512, 1408, 8, 8, vocab_size=64, length=1024, **TINY_TOWERS),
        (24, 24),
        16,
    ),
    "janus-pro-1b": Shape(JanusForConditionalGeneration, lambda: janus_config(2048, 5632, 24, 16), (24, 24), 16),
    "janus-pro-7b": Shape(JanusForConditionalGeneration, lambda: janus_config(4096, 11008, 30, 32), (24, 24), 16),
    "llamagen-xl": Shape(LlamaForCausalLM, llamagen_config, (24, 24), 1),
    "emu3": Shape(Emu3ForCausalLM, Emu3TextConfig, (90, 91), 16),
}
"""By name. Janus-Pro's sizes are those of its checkpoints, Emu3's the defaults of its configuration class."""


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """The model with random weights; torch's own generators are left as they were.

    Weights are made where and as they stay: 7 billion in bfloat16 take 14 GB on a GPU and nothing on the CPU.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = shape.model_class._from_config(shape.make_config(), dtype=dtype).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI}
    )
    return model
