"""Caches on small head maps, fed by a tiny Janus or with random states, for tests of a cache's life."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch

from helpers.models import left_padded_prompts, random_score
from ssd_cache import HeadMap, SSDCache
from ssd_cache._compat import CACHE
from ssd_cache.cache.attention import ssd_attention_forward

GRID = (6, 6)


def mixed_map(layers=2, kv_heads=2, grid=GRID, learned=None):
    is_spatial = torch.arange(layers * kv_heads).reshape(layers, kv_heads) % 3 != 0
    is_spatial[0, 0] = False
    return HeadMap(is_spatial, grid=grid, learned=learned)


def generate_image(model, cache, lengths=(5, 9, 3), seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {"do_sample": True, "guidance_scale": 5.0, **kwargs}
    return model.generate(**left_padded_prompts(lengths), generation_mode="image", **{CACHE: cache}, **kwargs)


def random_states(batch, new, seed, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, kv_heads, new, dim, generator=generator) for _ in range(3)]


def feed(cache, states, rows=None):
    outputs = []
    for layer in range(len(cache.layers)):
        query, key, value = (part if rows is None else part[rows] for part in states)
        keys, values = cache.update(key, value, layer)
        module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
        outputs.append(ssd_attention_forward(module, query, keys, values, None)[0])
    return torch.stack(outputs)


def half_generated(budget, rows=None, **settings):
    torch.manual_seed(0)  # of the score
    learned = random_score(2, 2, 8, GRID) if settings.get("score") == "learned" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = SSDCache(mixed_map(learned=learned), budget, **{"buffer": 4, "num_recent": 2, **settings})
    feed(cache, random_states(3, 5, 0), rows)
    for step in range(17):
        feed(cache, random_states(3, 1, 1 + step), rows)
    return cache


def move_and_go_on(moved, expected, move, rows):
    """Move the rows of one cache, and feed both the same; the other was given these `rows` from the start."""
    if move == "reorder":
        moved.reorder_cache(rows)
    elif move == "select":
        moved.batch_select_indices(rows)
    elif move == "mask":
        moved.batch_select_indices(torch.tensor([True, False, True]))
    else:
        moved.batch_repeat_interleave(2)
    for step in range(20):
        states = random_states(3, 1, 100 + step)
        torch.testing.assert_close(feed(moved, states, rows), feed(expected, states, rows))
