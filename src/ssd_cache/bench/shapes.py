"""Models by shape: the real configuration classes with random weights, made on their device and in their dtype.

The cost of a step does not depend on the values of the weights, so nothing is downloaded. `bench/subject.py` runs the
models.
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
"""Settings for a small Janus: minimal sizes of the parts that no generation step runs."""


@dataclass(frozen=True)
class Shape:
    """Description of a model with random weights.

    Attributes:
        model_class: the transformers class.
        make_config: function that makes its configuration.
        grid: rows and columns of visual tokens; an end-of-line token counts as a column.
        num_prompt: tokens of the prompts.
    """

    model_class: type[PreTrainedModel]
    make_config: Callable[[], PreTrainedConfig]
    grid: tuple[int, int]
    num_prompt: int


def llama_config(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, *, vocab_size: int, length: int
) -> LlamaConfig:
    """Configuration of a Llama without grouped heads."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=length,
    )


def janus_config(*sizes: int, vocab_size: int = 102400, length: int = 16384, **towers) -> JanusConfig:
    """Configuration of a Janus-Pro with a decoder of these sizes; default towers and codes are those of Janus-Pro."""
    text, width = llama_config(*sizes, vocab_size=vocab_size, length=length), sizes[0]
    return JanusConfig(
        text_config=text.to_dict(),
        vision_config={**towers.get("vision_config", {}), "projection_dim": width},
        vq_config={**towers.get("vq_config", {}), "projection_dim": width, "image_token_embed_dim": width},
        image_token_id=6,
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
    "llamagen-xl": Shape(
        LlamaForCausalLM, lambda: llama_config(1280, 3584, 36, 20, vocab_size=16384, length=1024), (24, 24), 1
    ),
    "emu3": Shape(Emu3ForCausalLM, Emu3TextConfig, (90, 91), 16),
}
"""Shapes by name. Janus-Pro has the sizes of its checkpoints, Emu3 the defaults of its configuration class.

LlamaGen's GPT-XL is here a Llama: the same layers, with positions along one axis instead of two, and with the class
token as part of the vocabulary (sizes from FoundationVision's `autoregressive/models/gpt.py`).
"""


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Make the model with random weights; the state of torch's global generators is restored.

    Weights are made on their final device in their final dtype: 7 billion in bfloat16 take 14 GB on a GPU and no memory
    of the CPU.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = shape.model_class._from_config(shape.make_config(), dtype=dtype).eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, generation_kwargs={"boi_token_id": BOI}
    )
    return model
