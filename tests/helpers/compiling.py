"""What tests of compiled steps share: the need for a compiler, and counted steps, as a CUDA graph makes them."""

from __future__ import annotations

import shutil

import pytest
import torch


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return any(map(shutil.which, ("g++", "clang++", "c++")))


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler on the CPU")


def held_tensors(cache):
    """All tensors of a cache's stores."""
    found = [value for layer in cache.layers for store in layer.stores for value in vars(store).values()]
    return [value for value in found if isinstance(value, torch.Tensor)]


@torch.no_grad()
def static_addresses(model, cache, tokens):
    """Addresses of a cache's tensors at every static step over `[rows, tokens]`; the first 7 tokens come before."""
    addresses = []
    model(tokens[:, :6], past_key_values=cache)
    model(tokens[:, 6:7], past_key_values=cache)
    for step in range(7, tokens.shape[1]):
        with cache.static_step():
            addresses.append(tuple(tensor.data_ptr() for tensor in held_tensors(cache)))
            model.model(
                tokens[:, step : step + 1],
                past_key_values=cache,
                position_ids=torch.full((1, 1), step),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
            )
    return addresses
