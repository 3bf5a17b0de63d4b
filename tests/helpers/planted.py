"""A Janus whose heads are known by construction: all weights are set by hand, nothing is random.

It generates one fixed image at temperature 0. A token's id encodes its column, the first grid row has other ids, and
the attention's output is multiplied by 0, so what heads look at changes nothing. The kinds of head:

- "above": at the token right above, by the phases of RoPE on constant queries and keys;
- "margin": at the tokens of the first and last column; "first": at the first three tokens; both by their ids;
- "everywhere": at everything alike.
"""

from __future__ import annotations

import math

import torch

from helpers.models import BOI, tiny_janus
from helpers.tiny_checkpoint import load_example
from ssd_cache.models import generator_of

SIDE, HEAD_DIM = 8, 16
LOOKS = (("above", "margin", "first", "everywhere"), ("everywhere", "first", "above", "margin"))
IS_SPATIAL = torch.tensor([[look == "above" for look in layer] for layer in LOOKS])
TARGETS = {"margin": (0, SIDE - 1, SIDE, 2 * SIDE - 1), "first": (SIDE, SIDE + 1, SIDE + 2), "everywhere": ()}

# dimensions of the hidden state: one a visual id (columns, then the first grid row's), begin-of-image, other text, a 1
BOI_DIM, TEXT_DIM, ONE = 2 * SIDE, 2 * SIDE + 1, 2 * SIDE + 2
NORM = math.sqrt(4 * HEAD_DIM / 2)
"""What RMSNorm multiplies a hidden state by that has two entries of 1."""


def planted_generator():
    """A `Generator` with two layers of four heads that look where `LOOKS` says, and images of 8 x 8 tokens."""
    model = tiny_janus(layers=len(LOOKS), hidden=4 * HEAD_DIM, heads=4, grid_side=SIDE)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    decoder = model.model.language_model
    decoder.embed_tokens.weight.zero_()
    decoder.embed_tokens.weight[:, TEXT_DIM] = 1
    decoder.embed_tokens.weight[BOI, [TEXT_DIM, BOI_DIM]] = torch.tensor([0.0, 1.0])
    decoder.embed_tokens.weight[:, ONE] = 1
    _plant_visual_embeddings(model.model)
    _plant_succession(model.model)
    for layer, looks in zip(decoder.layers, LOOKS, strict=True):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.o_proj, layer.mlp.down_proj):
            projection.weight.zero_()
        for head, look in enumerate(looks):
            _plant_head(attention, slice(head * HEAD_DIM, (head + 1) * HEAD_DIM), look)
    return generator_of(model, load_example().build_processor())


def _plant_head(attention, dims, look):
    query, key = attention.q_proj.weight[dims] * NORM, attention.k_proj.weight[dims] * NORM
    half = HEAD_DIM // 2
    angles = SIDE * 10_000.0 ** (-torch.arange(half) / half)  # by which RoPE turns a key one grid row back
    if look == "above":
        # the product of a pair of dimensions is cos(angle * (distance - SIDE) / SIDE): greatest for all right above
        query[:half, ONE], query[half:, ONE] = 32 * angles.cos(), -32 * angles.sin()
        key[:half, ONE] = 1
    else:
        query[half - 1, ONE] = 24  # the slowest pair hardly turns within an image
        key[half - 1, list(TARGETS[look])] = 1
    attention.q_proj.weight[dims], attention.k_proj.weight[dims] = query / NORM, key / NORM


def _plant_visual_embeddings(janus):
    """Ids as points on a circle, since the embedding has 4 dimensions; a neuron of the aligner for each point."""
    num_ids = 2 * SIDE
    angles = torch.arange(num_ids) * 2 * math.pi / num_ids
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    between = (1 + math.cos(2 * math.pi / num_ids)) / 2  # a neuron's own point is above it, all others below
    janus.generation_embeddings.weight.zero_()
    janus.generation_embeddings.weight[:num_ids, :2] = points
    first, (second,) = janus.generation_aligner.fc1, janus.generation_aligner.hidden_layers
    for parameter in (first.weight, first.bias, second.weight, second.bias):
        parameter.zero_()
    first.weight[:num_ids, :2], first.bias[:num_ids] = 200 * points, -200 * between
    second.weight[:num_ids, :num_ids] = torch.eye(num_ids) / (200 * (1 - between))
    second.bias[ONE] = 1


def _plant_succession(janus):
    """Each token's id names the next one's: first the first grid row's ids, then the columns over and over."""
    head = janus.generation_head
    for parameter in (head.proj_out.weight, head.proj_out.bias, head.vision_head.weight, head.vision_head.bias):
        parameter.zero_()
    head.proj_out.weight.copy_(2 * torch.eye(len(head.proj_out.weight)))
    head.vision_head.weight[SIDE, BOI_DIM] = 1
    for token in range(2 * SIDE):
        head.vision_head.weight[(token + 1) % (2 * SIDE) if token >= SIDE else (token + 1) % SIDE, token] = 1


def planted_tokens():
    """The image that it generates, `[cells]`."""
    rows = torch.arange(SIDE).repeat(SIDE, 1)
    rows[0] += SIDE
    return rows.flatten()
