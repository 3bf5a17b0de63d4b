"""The memory of a training step, by a formula over the model's configuration, and the images that fit into it.

The formula is an upper bound of what `tests/learning_memory.py` measures. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssd_cache.cache.settings import default_buffer
from ssd_cache.models import Generator
from ssd_cache.models.checkpoint import Checkpoint
from ssd_cache.training.teacher_forcing import BLOCK_BYTES, Recording

MEMORY = 4 << 30
"""Bytes, in addition to the weights, that images take at once: K and V in generation, `step_nbytes` in a step. It is
fixed, because another number of images at once would change images and rounding. One image may take more."""

ATTENTION, HEAD = 8, 6
"""Tensors of the size of a block that exist at once in the backward pass of attention, and of the output head."""

OF_EVICTION = 40
"""Bytes kept for each head, eviction and visual token, for the gradient of the soft thresholds."""


def step_nbytes(
    checkpoint: Checkpoint, dtype: torch.dtype, rows: int, num_prompt: int, buffer: int | None = None
) -> int:
    """Peak bytes of a training step on some rows at once, in addition to the weights and the recorded images.

    The sum of two parts:

    - What is kept: the input of every layer and three more tensors of that size, `[rows, tokens, hidden_size]`.
    - The work on one layer in its backward pass, or on the output head if that is more. Of a layer: the soft evictions,
      and the greater of a block of attention weights with all that its gradient needs, and the MLP. A block has at most
      `BLOCK_BYTES`.

    Args:
        checkpoint: the model; only its configuration is read.
        dtype: the model's dtype.
        rows: batch rows that go through the decoder at once; an image has two with guidance.
        num_prompt: tokens of the longest prompt.
        buffer: eviction interval of the cache that the score is for, as for `learn_score`.

    Returns:
        An upper bound, in bytes. Small models, whose head fills no block, need less.
    """
    config = checkpoint.family.text_config_of(checkpoint.config)
    cells, size = checkpoint.num_visual_tokens, dtype.itemsize
    length = num_prompt + cells - 1
    of_hidden = rows * length * config.hidden_size
    of_inner = rows * length * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    weights = rows * config.num_attention_heads * length**2 * torch.float32.itemsize
    block = weights // -(-weights // BLOCK_BYTES)
    buffer = default_buffer(checkpoint.layout, "learned") if buffer is None else buffer
    evictions = OF_EVICTION * rows * checkpoint.num_kv_heads * cells * -(-cells // buffer)
    attention = ATTENTION * block + of_hidden * (4 * size + 6)
    linear = ATTENTION // 2 * block + of_inner * 6 * size + of_hidden * (4 * size + 12)
    kept = (checkpoint.num_layers + 3) * of_hidden * size
    return kept + max(evictions + max(attention, linear), HEAD * BLOCK_BYTES)


def images_at_once(generator: Generator, recordings: Sequence[Recording], most: int, buffer: int | None) -> int:
    """Images that go through the decoder at once in a step: `most`, halved until they fit into `MEMORY`, at least 1.

    All `recordings` have the same rows for an image; the longest prompt counts. `buffer` is as for `step_nbytes`.
    """
    rows_of_image = 2 if recordings[0].is_unconditional.any() else 1
    num_prompt = max(recording.seen.shape[1] for recording in recordings)
    size, model = most, (generator.checkpoint, generator.model.dtype)
    while size > 1 and step_nbytes(*model, rows_of_image * size, num_prompt, buffer) > MEMORY:
        size //= 2
    return size
