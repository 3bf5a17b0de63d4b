"""What tests of compiled steps share: the need for a compiler, and counted steps, as a CUDA graph makes them."""

from __future__ import annotations

import shutil

import pytest
import torch


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler on the CPU")


@torch.no_grad()
def counted_places(model, cache, tokens):
    """Where a cache's tensors lie at every counted step; a prompt of 6 and one more of `[rows, tokens]` come before."""
    places = []
    model(tokens[:, :6], past_key_values=cache)
    model(tokens[:, 6:7], past_key_values=cache)
    for step in range(7, tokens.shape[1]):
        with cache.counted_step():
            places.append(cache.places)
            model.model(
                tokens[:, step : step + 1],
                past_key_values=cache,
                position_ids=torch.full((1, 1), step),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            )
    return places
