"""Caches without a head map, inside transformers' own generate; test_retention.py has the rule itself."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import (
    emu3_processor,
    glm_image_processor,
    left_padded_prompts,
    tiny_emu3,
    tiny_glm_image,
    tiny_janus,
    tiny_llama,
)
from transformers import DynamicCache

from ssd_cache import HeadMap, HeadMapError, SSDCache, enable
from ssd_cache._compat import CACHE
from ssd_cache.model_grids import GRIDS
from ssd_cache.models.find import FAMILIES

GRID = (6, 6)
SETTINGS = {"budget": 20, "grid": GRID, "buffer": 4}


def generate_image(model, cache, lengths=(5, 9, 3), do_sample=True):
    torch.manual_seed(0)
    inputs = left_padded_prompts(lengths)
    return model.generate(**inputs, generation_mode="image", **{CACHE: cache}, do_sample=do_sample, guidance_scale=3.0)


@pytest.fixture(scope="module")
def model():
    return tiny_janus(grid_side=6, heads=4, layers=3)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_no_queries_are_needed(model, attn_implementation):
    cache, expected = (SSDCache.online(model, **SETTINGS) for _ in range(2))
    tokens = generate_image(model, expected, do_sample=False)
    other = tiny_janus(grid_side=6, heads=4, layers=3, attn_implementation=attn_implementation)
    other.load_state_dict(model.state_dict())
    assert torch.equal(generate_image(other, cache, do_sample=False), tokens)
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        assert ours.stores[0].queries is None
        assert torch.equal(ours.stores[0].positions, theirs.stores[0].positions)


def test_heads_keep_different_tokens_and_the_newest_row(model):
    cache = SSDCache.online(model, **SETTINGS)
    generate_image(model, cache)
    assert (cache.score, cache.num_recent) == ("leverage", 10)
    heads = [head[row].tolist() for layer in cache.layers for head in layer.held_positions() for row in range(3)]
    assert len({tuple(head) for head in heads}) > 1
    assert all(set(range(25, 35)) <= set(head) for head in heads)


@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "int8"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_other_rows(settings, dtype):
    """Each row evicts on its own keys; with grouped query heads."""
    head_map = HeadMap.online(num_layers=1, num_kv_heads=2, grid=GRID)
    whole, alone = (SSDCache(head_map, 20, buffer=4, **settings) for _ in range(2))
    torch.manual_seed(0)
    for number in (5, *[1] * 36):
        keys, values = torch.randn(2, 3, 2, number, 8).to(dtype)
        whole.update(keys, values, 0)
        alone.update(keys[1:2], values[1:2], 0)
    assert torch.equal(whole.layers[0].stores[0].positions[1:2], alone.layers[0].stores[0].positions)
    assert not torch.equal(*whole.layers[0].stores[0].positions[:2])


def test_reset_makes_it_as_new(model):
    cache = SSDCache.online(model, **SETTINGS)
    first = generate_image(model, cache)
    cache.reset()
    assert torch.equal(generate_image(model, cache), first)


def test_a_full_budget_is_dynamic_cache(model):
    cache = SSDCache.online(model, 1.0, grid=GRID)
    assert torch.equal(generate_image(model, cache), generate_image(model, DynamicCache()))


@pytest.mark.parametrize("step", [10, 19, 20, 25])
def test_copies_and_moved_rows_go_on_alike(model, step):
    """A deep copy made before, at or after the first eviction goes on as the original does."""
    config = model.config.get_text_config(decoder=True)
    torch.manual_seed(1)
    cache = SSDCache.online(model, **SETTINGS)
    states = torch.randn(2, 36, config.hidden_size)
    with torch.no_grad():
        decoder = model.model.language_model
        decoder(inputs_embeds=torch.randn(2, 5, config.hidden_size), past_key_values=cache)
        for token in range(step):
            decoder(inputs_embeds=states[:, token : token + 1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        twin.reorder_cache(torch.tensor([1, 0]))
        for token in range(step, 36):
            new = states[:, token : token + 1]
            ours = decoder(inputs_embeds=new, past_key_values=cache).last_hidden_state
            theirs = decoder(inputs_embeds=new.flip(0), past_key_values=twin).last_hidden_state
            torch.testing.assert_close(theirs.flip(0), ours)


def test_enable_takes_an_online_map(model):
    head_map = HeadMap.online(num_layers=3, num_kv_heads=4, grid=GRID)
    expected = generate_image(model, SSDCache.online(model, **SETTINGS))
    with enable(model, head_map, budget=20, buffer=4):
        assert torch.equal(generate_image(model, None), expected)


def test_an_online_map_can_not_be_saved_or_inverted(tmp_path):
    head_map = HeadMap.online(num_layers=3, num_kv_heads=4)
    assert repr(head_map) == "HeadMap(3 layers x 4 KV heads, online, grid 24x24, made without profiling)"
    assert head_map != HeadMap.uniform("semantic", num_layers=3, num_kv_heads=4)
    for refused in (lambda: head_map.save_pretrained(tmp_path / "map"), lambda: ~head_map):
        with pytest.raises(HeadMapError, match="an online map has no labels, so it cannot be"):
            refused()
    assert not (tmp_path / "map").exists()


def test_a_map_brings_its_own_budget():
    fitted = HeadMap(torch.tensor([[True, False]]), GRID, budget=[{"spatial": 14, "semantic": 22}])
    assert SSDCache(fitted, buffer=4).layers[0].plan.num_slots == (14, 22)
    assert SSDCache(fitted, 0.5, buffer=4).layers[0].plan.num_slots == (14, 22)
    assert SSDCache(fitted, 0.5, slots="uniform", buffer=4).layers[0].plan.num_slots == (18, 18)
    assert SSDCache(HeadMap(torch.tensor([[True]]), (24, 24))).layers[0].plan.num_slots == (115,)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ([0.2, 0.2], "budget has 2 entries, but the head map has 1 layers"),
        ({"spatial": 0.2}, "give both kinds"),
        (37, "37 slots, but the grid has 36 visual tokens"),
        ("0.2", "budget='0.2' is out of range"),
        (float("nan"), "budget=nan is out of range"),
    ],
)
def test_a_map_with_an_impossible_budget_is_refused(budget, message):
    with pytest.raises(HeadMapError, match=message):
        HeadMap(torch.tensor([[True]]), GRID, budget=budget)


# --- the grid comes from the model's family


def test_the_grid_is_read_from_the_model(model):
    cache = SSDCache.online(model, buffer=2, num_recent=2)
    assert (cache.head_map.grid, cache.head_map.previews) == (GRID, ())
    assert cache.num_slots[0][0] == round(0.2 * 36)
    assert torch.equal(
        generate_image(model, SSDCache.online(model, 20, buffer=4)), generate_image(model, online(model))
    )
    assert SSDCache.online(model, 0.5, grid=(4, 9)).head_map.grid == (4, 9)  # what is given goes first


def online(model):
    return SSDCache.online(model, **SETTINGS)


def test_a_grid_brings_the_previews_of_its_family():
    glm = tiny_glm_image(glm_image_processor())
    cache = SSDCache.online(glm, 0.5, grid=(36, 24))
    assert (cache.head_map.grid, cache.head_map.previews) == ((36, 24), ((19, 13),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tiny_emu3(emu3_processor()),
            r"'emu3' generates images of several sizes: .* grid=\(90, 91\)",
        ),
        (
            lambda: tiny_glm_image(glm_image_processor()),
            r"'glm_image' generates images of several sizes: .* grid=\(36, 24\)",
        ),
        (lambda: tiny_llama(), r"a model of type 'llama' is unknown: give grid=\(rows, columns\)"),
    ],
)
def test_a_model_that_does_not_fix_its_grid_asks_for_one(make, message):
    with pytest.raises(ValueError, match=message):
        SSDCache.online(make())


def test_every_family_has_its_grids_in_model_grids():
    """Otherwise `SSDCache.online` would not know the family."""
    assert set(FAMILIES) == set(GRIDS)
