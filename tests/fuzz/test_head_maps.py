"""Both files of a head map, with the right checksum: a changed map is loaded or refused, and its card stays a card.

The card of a map that was loaded is rendered, and holds only the tags, links and front matter that every card has.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from contextlib import suppress

import pytest
import torch
from helpers.fuzzing import check_both, fuzz_file
from helpers.models import random_score
from helpers.pages import check_card
from typer.testing import CliRunner

from ssd_cache import HeadMap, HeadMapError, SSDCache
from ssd_cache.cli import app
from ssd_cache.head_map.card import card, plot_labels


@pytest.fixture
def folder(tmp_path):
    """A map with everything that a map may hold but draft grids."""
    point = {"budget": 0.2, "kl": 0.01, "agreement": 0.9, "retained": 0.95, "kl_standard_error": 0.001}
    head_map = HeadMap(
        torch.tensor([[True, False], [False, False]]),
        (4, 6),
        scores={"window_mass": torch.rand(2, 2), "kl": torch.rand(2, 2)},
        threshold=0.5,
        model_id="user/model",
        revision="0123abcd",
        model_type="janus",
        method="profiled",
        budget=[{"spatial": 8, "semantic": 0.5}, [9, 10]],
        learned=random_score(2, 2, 4, (4, 6), ranks_all=True),
        profile={
            "prompts": ["a", "b"],
            "buffer": 2,
            "num_recent": 0.5,
            "fidelity": {"num_images": 4, "curve": [point]},
        },
    )
    return head_map.save_pretrained(tmp_path / "map")


def sign(folder):
    """Give a changed pair of files the right checksum, by the format's documentation, where it still is an object."""
    config, tensors = folder / "config.json", folder / "head_map.safetensors"
    with suppress(ValueError, RecursionError):
        facts = json.loads(config.read_bytes())
        if isinstance(facts, dict):
            facts.pop("sha256", None)
            canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
            facts["sha256"] = hashlib.sha256(canonical.encode() + tensors.read_bytes()).hexdigest()
            config.write_text(json.dumps(facts))


def use(folder):
    """Load a map, and do with it all that needs no model."""
    head_map = HeadMap.from_pretrained(folder)
    check_card(card(head_map, "user/map"))
    assert plot_labels(head_map).width < 20_000
    with warnings.catch_warnings(), suppress(ValueError):  # settings that the map's budget does not allow
        warnings.simplefilter("ignore")
        SSDCache(head_map)
    assert HeadMap.from_pretrained(head_map.save_pretrained(folder.parent / "again")) == head_map


def inspect(folder):
    """Print a map as `ssd-cache inspect` does."""
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    if result.exit_code == 2:
        raise HeadMapError(result.output)
    assert result.exit_code == 0, result.output
    assert all(char.isprintable() or char == "\n" for char in result.output)


READERS = {
    "config.json, loaded": HeadMap.from_pretrained,
    "config.json, used": use,
    "config.json, inspected": inspect,
    "head_map.safetensors, loaded": HeadMap.from_pretrained,
    "head_map.safetensors, used": use,
    "head_map.safetensors, inspected": inspect,
}


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_loaded_or_refused(folder, name):
    outcome = fuzz_file(
        name,
        folder / name.partition(",")[0],
        lambda: READERS[name](folder),
        errors=(HeadMapError,),
        prepare=lambda: sign(folder),
        names_file=False,
    )
    check_both(outcome)
