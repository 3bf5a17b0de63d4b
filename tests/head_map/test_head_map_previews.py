"""Maps of generators with a draft grid before the image: their cells, their files, and their use by a cache."""

from __future__ import annotations

import json

import pytest
import torch

from ssd_cache import HeadMap, HeadMapError, SSDCache
from ssd_cache.evaluation.policies import parse_policy

LABELS = torch.tensor([[True, False], [False, False]])


def test_previews_count_as_visual_tokens_and_come_back_from_a_file(tmp_path):
    head_map = HeadMap(LABELS, (6, 4), previews=[(3, 2), [2, 2]], budget=10)
    assert head_map.previews == ((3, 2), (2, 2))
    assert head_map.num_visual_tokens == 6 + 4 + 24
    assert "grid 3x2+2x2+6x4" in repr(head_map)
    assert HeadMap.from_pretrained(head_map.save_pretrained(tmp_path)) == head_map
    assert head_map != HeadMap(LABELS, (6, 4), budget=10)
    assert head_map.digest != HeadMap(LABELS, (6, 4)).digest
    assert (~head_map).previews == head_map.previews


def test_a_map_without_previews_is_written_as_before(tmp_path):
    folder = HeadMap(LABELS, (6, 4)).save_pretrained(tmp_path)
    assert "previews" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("previews", [(3, 2), [(0, 2)], [(3, 2)] * 9, "3x2", [(3, 2, 1)]])
def test_previews_that_are_no_grids_are_refused(previews):
    with pytest.raises(HeadMapError, match="grid=|previews="):
        HeadMap(LABELS, (6, 4), previews=previews)


def test_another_size_keeps_the_labels_and_all_facts(tmp_path):
    head_map = HeadMap.from_pretrained(HeadMap(LABELS, (6, 4), model_id="some/model").save_pretrained(tmp_path))
    larger = head_map.with_grid((8, 8), [(3, 3)])
    assert (larger.grid, larger.previews, larger.model_id, larger.origin) == (
        (8, 8),
        ((3, 3),),
        "some/model",
        str(tmp_path),
    )
    assert torch.equal(larger.is_spatial, LABELS)
    assert head_map.with_grid((6, 4)) is head_map
    assert HeadMap.online(num_layers=2, num_kv_heads=2, grid=(6, 4)).with_grid((8, 8)).is_online


@pytest.mark.parametrize("policy", ["full", "ssd", "h2o", "streaming-llm", "online", "inverted", "random-1", "{map}"])
def test_caches_of_all_policies_are_for_all_rasters(tmp_path, policy):
    head_map = HeadMap(LABELS, (6, 4), previews=[(3, 2)])
    policy = policy.format(map=head_map.save_pretrained(tmp_path))
    cache = parse_policy(policy).make_cache(head_map, 0.9)
    assert (cache.head_map.grid, cache.head_map.previews) == ((6, 4), ((3, 2),))
    with pytest.raises(ValueError, match="single grid"):
        parse_policy("margin").make_cache(head_map, 0.9)


def test_a_cache_counts_all_rasters_and_warns_by_the_widest_row():
    head_map = HeadMap(LABELS, (6, 4), previews=[(2, 12)])
    cache = SSDCache(head_map, 0.5, buffer=2)
    assert {slots for layer in cache.layers for slots in layer.plan.num_slots} == {24}
    assert SSDCache(head_map, 0.9).buffer == 4
    with pytest.warns(UserWarning, match="fewer than a grid row and two \\(14\\)"):
        SSDCache(head_map, 14, buffer=4)
    baseline = SSDCache.from_policy("streaming-llm", head_map, 20)
    assert baseline.head_map.previews == head_map.previews
