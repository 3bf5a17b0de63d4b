"""HeadMap as a value and as two files: what it holds, what it refuses, and what hostile files cannot do."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssd_cache.head_map.card import PLOT_NAME, SEMANTIC, SPATIAL, card, plot_labels, png
from ssd_cache.head_map.head_map import HeadMap, HeadMapError

GOLDEN = Path(__file__).parents[1] / "golden" / "head_map"
LABELS = torch.tensor([[True, False, False], [False, True, True]])
SCORES = torch.tensor([[0.75, 0.25, 0.0], [0.5, 1.0, 0.625]])


def make_map(**changes) -> HeadMap:
    facts = {
        "scores": {"window_mass": SCORES},
        "threshold": 0.6,
        "model_id": "user/model",
        "revision": "c0ffee",
        "model_type": "janus",
        "method": "window mass",
        "profile": {"num_prompts": 4, "seeds": [0, 1], "sha256_of_prompts": "ab" * 32},
    }
    return HeadMap(LABELS, (4, 6), **{**facts, **changes})


def forge(folder: Path, tensors: dict[str, torch.Tensor] | bytes | None = None, **config_changes) -> Path:
    """Writes a pair of files whose sha256 is right, by the format's documentation and not by the library's code."""
    if tensors is None:
        tensors = {"is_spatial": LABELS, "scores.window_mass": SCORES}
    tensor_bytes = tensors if isinstance(tensors, bytes) else safetensors.torch.save(tensors)
    config = {
        "format_version": 1,
        "grid": [4, 6],
        "num_layers": 2,
        "num_kv_heads": 3,
        "model_id": None,
        "revision": None,
        "model_type": None,
        "method": None,
        "threshold": None,
        "budget": None,
        "profile": {},
        **config_changes,
    }
    config = {name: value for name, value in config.items() if value is not ...}
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    sha256 = hashlib.sha256(canonical.encode() + tensor_bytes).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"sha256": sha256, **config}))
    (folder / "head_map.safetensors").write_bytes(tensor_bytes)
    return folder


# The value


def test_a_map_holds_what_it_was_given():
    head_map = make_map()
    assert torch.equal(head_map.is_spatial, LABELS)
    assert head_map.is_spatial.dtype == torch.bool
    assert (head_map.num_layers, head_map.num_kv_heads, head_map.num_visual_tokens) == (2, 3, 24)
    assert head_map.grid == (4, 6)
    assert head_map.scores.keys() == {"window_mass"}
    assert torch.equal(head_map.scores["window_mass"], SCORES)
    assert (head_map.threshold, head_map.model_id, head_map.revision) == (0.6, "user/model", "c0ffee")
    assert (head_map.model_type, head_map.method) == ("janus", "window mass")
    assert head_map.profile == {"num_prompts": 4, "seeds": [0, 1], "sha256_of_prompts": "ab" * 32}
    assert head_map.origin == "made in memory"
    assert repr(head_map) == "HeadMap(2 layers x 3 KV heads, 3 spatial, 3 semantic, grid 4x6, made in memory)"


def test_the_default_grid_is_janus_pro_s_and_all_else_is_empty():
    head_map = HeadMap(LABELS)
    assert head_map.grid == (24, 24)
    assert (head_map.scores, head_map.profile) == ({}, {})
    assert {head_map.threshold, head_map.model_id, head_map.revision, head_map.model_type, head_map.method} == {None}


def test_a_lone_score_is_named_score_and_kept_in_float32():
    head_map = HeadMap(LABELS, scores=SCORES.double())
    assert head_map.scores["score"].dtype == torch.float32
    assert torch.equal(head_map.scores["score"], SCORES)


def test_a_map_does_not_change_when_its_sources_do():
    labels, scores, profile = LABELS.clone(), SCORES.clone(), {"seeds": [0]}
    head_map = HeadMap(labels, scores=scores, profile=profile)
    labels.logical_not_()
    scores.zero_()
    profile["seeds"].append(1)
    assert torch.equal(head_map.is_spatial, LABELS)
    assert torch.equal(head_map.scores["score"], SCORES)
    assert head_map.profile == {"seeds": [0]}
    with pytest.raises(AttributeError):
        head_map.grid = (1, 1)


@pytest.mark.parametrize(("kind", "is_spatial"), [("spatial", True), ("semantic", False)])
def test_uniform(kind, is_spatial):
    head_map = HeadMap.uniform(kind, num_layers=3, num_kv_heads=2, grid=(5, 7))
    assert torch.equal(head_map.is_spatial, torch.full((3, 2), is_spatial))
    assert head_map.grid == (5, 7)
    assert head_map.method == f"uniform {kind}"


@pytest.mark.parametrize("method", [None, "window mass"])
def test_inverted_turns_every_label_and_twice_gives_the_same_map(method):
    head_map = make_map(method=method)
    assert torch.equal((~head_map).is_spatial, ~LABELS)
    assert torch.equal((~head_map).scores["window_mass"], SCORES)
    assert (~head_map).method == ("inverted" if method is None else "inverted: window mass")
    assert (~head_map).origin == "made in memory, inverted"
    assert ~head_map != head_map
    assert ~~head_map == head_map


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 0.5},
        {"model_id": "user/other"},
        {"revision": None},
        {"method": "other"},
        {"model_type": "emu3"},
        {"profile": {}},
        {"scores": None},
        {"scores": {"other": SCORES}},
        {"scores": {"window_mass": SCORES + 1}},
    ],
)
def test_maps_that_differ_in_one_fact_differ(changes):
    assert make_map() == make_map()
    assert make_map(**changes) != make_map()
    assert hash(make_map(**changes)) == hash(make_map()), "the hash is of labels and grid alone"


def test_equality_sees_labels_and_grid_and_does_not_compare_with_other_things():
    assert HeadMap(LABELS) != HeadMap(~LABELS)
    assert HeadMap(LABELS, (4, 6)) != HeadMap(LABELS, (6, 4))
    assert HeadMap(LABELS) != HeadMap(LABELS.T)
    assert HeadMap(LABELS) != "map"
    assert len({HeadMap(LABELS), HeadMap(LABELS.clone()), HeadMap(~LABELS)}) == 2


def test_the_digest_names_labels_and_grid():
    digests = {HeadMap(labels, grid).digest for labels in (LABELS, ~LABELS, LABELS.T) for grid in ((4, 6), (6, 4))}
    assert len(digests) == 6
    assert make_map().digest == HeadMap(LABELS, (4, 6)).digest == "cfb3045d24c1"


def test_a_map_can_be_copied_and_pickled():
    for copied in (copy.deepcopy(make_map()), pickle.loads(pickle.dumps(make_map()))):
        assert copied == make_map()
        assert copied.origin == "made in memory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_spatial": LABELS.int()}, r"is_spatial is torch.int32; give a tensor of torch.bool"),
        ({"is_spatial": [[True]]}, r"is_spatial is list"),
        ({"is_spatial": torch.tensor([True])}, r"shape \[1\]; labels are \[layers, kv_heads\]"),
        ({"is_spatial": torch.zeros(0, 4, dtype=torch.bool)}, r"shape \[0, 4\]"),
        ({"is_spatial": torch.zeros(1025, 1, dtype=torch.bool)}, r"shape \[1025, 1\].* 1 to 1024"),
        ({"is_spatial": torch.zeros(1, 4097, dtype=torch.bool)}, r"shape \[1, 4097\].* 1 to 4096"),
        ({"grid": (24,)}, r"grid=\(24,\); give \(rows, columns\)"),
        ({"grid": (24, 0)}, r"grid=\(24, 0\)"),
        ({"grid": (24, 4097)}, r"grid=\(24, 4097\)"),
        ({"grid": (24.0, 24)}, r"grid="),
        ({"grid": (True, 24)}, r"grid="),
        ({"grid": 576}, r"grid=576"),
        ({"scores": SCORES.T}, r"score 'score' is torch.float32 \[3, 2\]; .* shape \[2, 3\]"),
        ({"scores": SCORES.int()}, r"score 'score' is torch.int32"),
        ({"scores": {"score": [[1.0]]}}, r"score 'score' is \[\[1.0\]\]"),
        ({"scores": {"a/b": SCORES}}, r"name 'a/b'"),
        ({"scores": {1: SCORES}}, r"name 1 "),
        ({"scores": [SCORES]}, r"give a tensor, or a dict"),
        ({"scores": {f"s{i}": SCORES for i in range(65)}}, r"at most 64"),
        ({"scores": torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]])}, r"NaN or infinite at layer 1, KV head 1"),
        ({"scores": torch.full((2, 3), 1e300, dtype=torch.double)}, r"NaN or infinite at layer 0, KV head 0"),
        ({"threshold": float("nan")}, r"threshold=nan"),
        ({"threshold": True}, r"threshold=True"),
        ({"threshold": "0.5"}, r"threshold='0.5'"),
        ({"threshold": 10**400}, r"threshold=1000"),
        ({"model_id": ""}, r"model_id=''"),
        ({"model_id": "a\nb"}, r"model_id='a\\nb'; give 1 to 256 printable"),
        ({"revision": "x" * 257}, r"revision='xxx"),
        ({"method": 3}, r"method=3"),
        ({"model_type": "\ud800"}, r"model_type="),
        ({"profile": [1]}, r"profile: list is not a dict"),
        ({"profile": {"a": float("inf")}}, r"profile: .*finite numbers only"),
        ({"profile": {"a": SCORES}}, r"profile: .*Tensor is not JSON"),
        ({"profile": {"a": "x" * 70_000}}, r"profile: 70009 bytes of at most 65536"),
        ({"profile": {"a": eval("[" * 16 + "]" * 16)}}, r"nests deeper"),
    ],
)
def test_what_a_map_refuses_at_birth(arguments, message):
    with pytest.raises(HeadMapError, match=message):
        HeadMap(**{"is_spatial": LABELS, **arguments})


def test_uniform_refuses_other_kinds_and_sizes_before_it_allocates():
    with pytest.raises(HeadMapError, match="kind='both' is neither"):
        HeadMap.uniform("both", num_layers=1, num_kv_heads=1)
    with pytest.raises(HeadMapError, match=r"shape \[1000000000, 1000000000\]"):
        HeadMap.uniform("spatial", num_layers=10**9, num_kv_heads=10**9)


# The files


def test_golden_file():
    """The format is a promise: this folder was written by version 0.1.0 and loads for ever."""
    head_map = HeadMap.from_pretrained(GOLDEN)
    expected = ["#..#", "....", ".##."]
    assert head_map.is_spatial.tolist() == [[cell == "#" for cell in row] for row in expected]
    assert head_map.grid == (6, 8)
    assert head_map.scores.keys() == {"window_mass", "margin_mass"}
    assert head_map.scores["window_mass"].tolist() == [
        [0.75, 0.5, 0.25, 1.0],
        [0.0, 0.125, 0.5, 0.25],
        [0, 0.875, 1, 0],
    ]
    assert head_map.scores["margin_mass"].tolist() == [[0.0, 0.5, 0.5, 0], [1, 0.25, 0.25, 0.25], [0.5, 0, 0, 0.75]]
    assert (head_map.threshold, head_map.model_type, head_map.model_id) == (0.625, "janus", "user/tiny-janus")
    assert (head_map.revision, head_map.method) == ("0123456789abcdef0123456789abcdef01234567", "window mass")
    assert head_map.profile == {"num_prompts": 2, "seeds": [0, 1], "window": 10, "note": "größer"}
    assert head_map.budget == [{"spatial": 12, "semantic": 16}, 0.5, 20]
    assert head_map.digest == "2968bca653eb"
    assert repr(head_map) == f"HeadMap(3 layers x 4 KV heads, 4 spatial, 8 semantic, grid 6x8, from {GOLDEN})"


def test_saving_writes_the_golden_bytes(tmp_path):
    HeadMap.from_pretrained(GOLDEN).save_pretrained(tmp_path)
    for name in ("config.json", "head_map.safetensors"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_a_saved_map_loads_from_its_folder_from_either_file_and_from_a_subfolder(tmp_path, monkeypatch):
    folder = make_map().save_pretrained(tmp_path / "maps" / "first")
    assert folder == tmp_path / "maps" / "first"
    assert sorted(os.listdir(folder)) == ["config.json", "head_map.safetensors"]
    for source in (folder, str(folder), folder / "config.json", str(folder / "head_map.safetensors")):
        loaded = HeadMap.from_pretrained(source)
        assert loaded == make_map()
        assert loaded.origin == str(folder)
    loaded = HeadMap.from_pretrained(tmp_path, subfolder="maps/first")
    assert loaded == make_map()
    assert loaded.origin == str(folder)
    monkeypatch.chdir(tmp_path)
    assert HeadMap.from_pretrained("maps/first") == make_map()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert HeadMap.from_pretrained("~/maps/first") == make_map()


def test_forged_files_load_so_that_their_refusals_below_mean_something(tmp_path):
    head_map = HeadMap.from_pretrained(forge(tmp_path))
    assert head_map == HeadMap(LABELS, (4, 6), scores={"window_mass": SCORES})


def test_a_loaded_map_lists_its_scores_by_name(tmp_path):
    names = [f"score_{number}" for number in range(9, 0, -1)]
    folder = HeadMap(LABELS, scores=dict.fromkeys(names, SCORES)).save_pretrained(tmp_path / "map")
    assert list(HeadMap.from_pretrained(folder).scores) == sorted(names)


BAD_FLOATS = torch.tensor([[0.0, float("nan"), 0], [0, 0, 0]])
RAW_BYTE_TWO = safetensors.torch.save({"is_spatial": LABELS})[:-6] + b"\2\0\0\0\1\1"


@pytest.mark.parametrize(
    ("forgery", "message"),
    [
        ({"format_version": 2}, r"config.json: format_version 2, this ssd-cache reads 1; upgrade it"),
        ({"format_version": True}, r"format_version True"),
        ({"format_version": "1"}, r"format_version '1'"),
        ({"format_version": ...}, r"has no format_version, so it is not a head map"),
        ({"grid": ...}, r"missing fields \['grid'\]"),
        ({"auto_map": "x.py"}, r"unknown fields \['auto_map'\]; .* upgrade ssd-cache"),
        ({"grid": [4]}, r"grid=\[4\]"),
        ({"grid": [10**6, 10**6]}, r"grid=\[1000000, 1000000\]"),
        ({"num_layers": 3}, r"states 3 layers and 3 KV heads, is_spatial .* \[2, 3\]"),
        ({"num_kv_heads": None}, r"states 2 layers and None KV heads"),
        ({"profile": None, "model_id": 3}, r"model_id=3"),
        ({"profile": eval("[" * 40 + "]" * 40)}, r"nests deeper than 16 levels"),
        ({"threshold": "high"}, r"threshold='high'"),
        ({"tensors": {"scores.a": SCORES}}, r"safetensors: has no tensor is_spatial"),
        ({"tensors": {"is_spatial": LABELS.int()}}, r"is_spatial is torch.int32 and must be bool"),
        ({"tensors": {"is_spatial": LABELS.float()}}, r"is_spatial is torch.float32 and must be bool"),
        ({"tensors": RAW_BYTE_TWO}, r"must be bool, bytes 0 and 1"),
        ({"tensors": {"is_spatial": LABELS, "weight": SCORES}}, r"holds 'weight' of torch.float32"),
        ({"tensors": {"is_spatial": LABELS, "scores.a": SCORES.half()}}, r"holds 'scores.a' of torch.float16"),
        ({"tensors": {"is_spatial": LABELS, "scores.a b": SCORES}}, r"name 'a b'"),
        ({"tensors": {"is_spatial": LABELS, "scores.a": SCORES.T.contiguous()}}, r"score 'a' .* shape \[2, 3\]"),
        ({"tensors": {"is_spatial": LABELS, "scores.a": BAD_FLOATS}}, r"score 'a' is NaN .* layer 0, KV head 1"),
        ({"tensors": {"is_spatial": LABELS[0]}}, r"states 2 layers"),
        ({"tensors": {"is_spatial": LABELS[:0]}, "num_layers": 0}, r"shape \[0, 3\]"),
        ({"tensors": b""}, r"not a safetensors file, or a truncated one"),
        ({"tensors": pickle.dumps({"is_spatial": 1})}, r"not a safetensors file"),
        ({"tensors": struct.pack("<Q", 2**63) + b"{}"}, r"not a safetensors file, or a truncated one"),
        ({"tensors": struct.pack("<Q", 100_000) + b" " * 100_000}, r"not a safetensors file"),
        ({"tensors": struct.pack("<Q", 2) + b"[]"}, r"not a whole safetensors file"),
    ],
)
def test_what_loading_refuses(tmp_path, forgery, message):
    with pytest.raises(HeadMapError, match=message) as caught:
        HeadMap.from_pretrained(forge(tmp_path / "map", **forgery))
    assert str(tmp_path / "map") in str(caught.value), "the place is named"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not the JSON of a head map"),
        (b"[1]", "has no format_version"),
        (b'"format_version"', "has no format_version"),
        (b'{"architectures": ["Janus"]}', "has no format_version, so it is not a head map"),
        (b'{"format_version": 1, "threshold": NaN}', "not the JSON of a head map"),
        (b'{"format_version": 1, "threshold": 1e999}', "not the JSON of a head map"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "not the JSON of a head map"),
        (b"[" * 500_000, "not the JSON of a head map"),
        (b'{"a":' * 100_000, "not the JSON of a head map"),
        (b"\xff\xfe", "not the JSON of a head map"),
    ],
)
def test_what_loading_refuses_as_config(tmp_path, text, message):
    (forge(tmp_path) / "config.json").write_bytes(text)
    with pytest.raises(HeadMapError, match=message):
        HeadMap.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "size"), [("config.json", 1 << 20), ("head_map.safetensors", 64 << 20)])
def test_a_file_that_is_too_big_is_refused_before_it_is_read(tmp_path, monkeypatch, name, size):
    path = forge(tmp_path) / name
    os.truncate(path, size + 1)
    opened, open_path = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *how: opened.append(self.name) or open_path(self, *how))
    with pytest.raises(HeadMapError, match=rf"{name}: holds more than {size} bytes"):
        HeadMap.from_pretrained(tmp_path)
    assert name not in opened


def test_a_map_too_big_for_its_file_is_not_saved(tmp_path):
    labels = torch.zeros(1024, 4096, dtype=torch.bool)
    with pytest.raises(HeadMapError, match="keep fewer scores"):
        HeadMap(labels, scores=dict.fromkeys("abcd", torch.zeros(1024, 4096))).save_pretrained(tmp_path / "map")
    assert not (tmp_path / "map").exists()
    assert HeadMap.from_pretrained(HeadMap(labels).save_pretrained(tmp_path / "map")) == HeadMap(labels)


@pytest.mark.parametrize("name", ["config.json", "head_map.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    (forge(tmp_path) / name).unlink()
    with pytest.raises(HeadMapError, match=rf"{tmp_path}/{name}: no such file; a head map is a folder with"):
        HeadMap.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "head_map.safetensors"])
def test_links_and_pipes_in_the_place_of_a_file(tmp_path, name):
    folder = forge(tmp_path / "map")
    secret = (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(secret)
    with pytest.raises(HeadMapError, match=rf"{name}: a link that leaves the folder"):
        HeadMap.from_pretrained(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(HeadMapError, match=rf"{name}: cannot be read"):
        HeadMap.from_pretrained(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(HeadMapError, match=rf"{name}: not a regular file"):
        HeadMap.from_pretrained(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(HeadMapError, match=rf"{name}: not a regular file"):
        HeadMap.from_pretrained(folder)
    (folder / name).rmdir()
    (folder / "real").write_bytes(secret.read_bytes())
    (folder / name).symlink_to("real")
    assert HeadMap.from_pretrained(folder).num_layers == 2, "a link inside the folder is the owner's business"


def test_a_subfolder_that_links_out_of_the_folder_is_refused(tmp_path):
    forge(tmp_path / "elsewhere")
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "first").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HeadMapError, match="a link that leaves the folder"):
        HeadMap.from_pretrained(tmp_path / "maps", subfolder="first")
    assert HeadMap.from_pretrained(tmp_path / "maps" / "first").num_layers == 2, "the caller named the link itself"


def test_a_snapshot_folder_of_the_hub_cache_loads_and_a_link_past_its_blobs_does_not(tmp_path):
    real = forge(tmp_path / "real")
    snapshot = tmp_path / "models--user--map" / "snapshots" / "abc"
    blobs = tmp_path / "models--user--map" / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    for name in ("config.json", "head_map.safetensors"):
        (blobs / name[:4]).write_bytes((real / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name[:4]}")
    assert HeadMap.from_pretrained(snapshot).num_layers == 2
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../real/config.json")
    with pytest.raises(HeadMapError, match="leaves the folder"):
        HeadMap.from_pretrained(snapshot)


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "a\\b", "..\\a", "C:/a", "C:a"])
def test_a_subfolder_cannot_leave_its_folder(tmp_path, subfolder):
    with pytest.raises(HeadMapError, match="leaves the folder; give a relative path"):
        HeadMap.from_pretrained(forge(tmp_path), subfolder=subfolder)


@pytest.mark.parametrize("source", ["./nothing", "/no/such/folder", "a/b/c", "~nobody/map", "map.safetensors", "a\\b"])
def test_a_path_that_does_not_exist_is_never_looked_for_on_the_hub(source):
    with pytest.raises(HeadMapError, match="no such folder or file; check the path"):
        HeadMap.from_pretrained(source)
    with pytest.raises(HeadMapError, match="no such folder or file; check the path"):
        HeadMap.from_pretrained(Path("user/map"))


def test_sources_that_mean_nothing(tmp_path):
    for source in ("", None, b"map", 3):
        with pytest.raises(HeadMapError, match="give a folder, a file, or a repository id"):
            HeadMap.from_pretrained(source)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(HeadMapError, match=r"weights.bin: neither a folder nor a config.json or head_map.safetensors"):
        HeadMap.from_pretrained(tmp_path / "weights.bin")
    with pytest.raises(HeadMapError, match="revision='main' is for repositories of the Hub"):
        HeadMap.from_pretrained(forge(tmp_path), revision="main")


# Crashes and damage


def test_a_save_that_dies_half_way_never_leaves_a_wrong_map(tmp_path, monkeypatch):
    old, new = make_map(), ~make_map()
    new.save_pretrained(tmp_path / "new")
    moves, replace = [], os.replace

    def die_at(number):
        def dying(source, target):
            if len(moves) == number:
                raise OSError("power cut")
            moves.append(target)
            replace(source, target)

        return dying

    for number, outcome in ((0, "old"), (1, "refused")):
        moves.clear()
        old.save_pretrained(tmp_path / "map")
        monkeypatch.setattr(os, "replace", die_at(number))
        with pytest.raises(HeadMapError, match="cannot be written .power cut"):
            new.save_pretrained(tmp_path / "map")
        monkeypatch.setattr(os, "replace", replace)
        assert sorted(os.listdir(tmp_path / "map")) == ["config.json", "head_map.safetensors"], "nothing is left over"
        if outcome == "old":
            assert HeadMap.from_pretrained(tmp_path / "map") == old
        else:
            with pytest.raises(HeadMapError, match="do not belong together"):
                HeadMap.from_pretrained(tmp_path / "map")
    new.save_pretrained(tmp_path / "map")
    assert HeadMap.from_pretrained(tmp_path / "map") == new


def test_files_of_two_maps_do_not_mix(tmp_path):
    first, second = make_map().save_pretrained(tmp_path / "1"), (~make_map()).save_pretrained(tmp_path / "2")
    (second / "config.json").replace(first / "config.json")
    with pytest.raises(HeadMapError, match=rf"{first}: config.json and head_map.safetensors do not belong together"):
        HeadMap.from_pretrained(first)


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HeadMapError, match=r"file: the head map cannot be written"):
        make_map().save_pretrained(tmp_path / "file")


NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
TEXTS = st.none() | st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def head_maps(draw) -> HeadMap:
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    cells = shape[0] * shape[1]

    def tensor(elements, dtype):
        return torch.tensor(draw(st.lists(elements, min_size=cells, max_size=cells)), dtype=dtype).view(shape)

    return HeadMap(
        tensor(st.booleans(), torch.bool),
        (draw(st.integers(1, 4096)), draw(st.integers(1, 4096))),
        scores={
            name: tensor(st.floats(width=32, allow_nan=False, allow_infinity=False), torch.float32)
            for name in draw(st.lists(NAMES, max_size=2, unique=True))
        },
        threshold=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        **{name: draw(TEXTS) for name in ("model_id", "revision", "model_type", "method")},
        profile=draw(st.dictionaries(st.text(max_size=8), JSON, max_size=3)),
    )


@settings(max_examples=100)
@given(head_map=head_maps())
def test_every_map_survives_its_files(tmp_path_factory, head_map):
    folder = tmp_path_factory.mktemp("map")
    loaded = HeadMap.from_pretrained(head_map.save_pretrained(folder))
    assert loaded == head_map
    assert (loaded.digest, loaded.origin) == (head_map.digest, str(folder))
    assert ~~loaded == head_map
    assert card(head_map, "user/map").startswith("---\n")


def map_or_refusal(folder: Path) -> HeadMap | str:
    """Any other exception fails the test that asked."""
    try:
        return HeadMap.from_pretrained(folder)
    except HeadMapError as refusal:
        return str(refusal)


@settings(max_examples=1000)
@given(data=st.data(), name=st.sampled_from(["config.json", "head_map.safetensors"]))
def test_damaged_files_give_an_equal_map_or_a_refusal(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("map")
    for file in ("config.json", "head_map.safetensors"):
        (folder / file).write_bytes((GOLDEN / file).read_bytes())
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        damage = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "drop"]))
        if damage == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif damage == "set" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif damage == "cut":
            del content[at:]
        elif damage == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del content[at : at + 9]
    (folder / name).write_bytes(content)
    loaded = map_or_refusal(folder)
    assert str(folder) in loaded if isinstance(loaded, str) else loaded == HeadMap.from_pretrained(GOLDEN)


@settings(max_examples=500)
@given(
    header=JSON
    | st.dictionaries(
        st.sampled_from(["is_spatial", "scores.a", "__metadata__"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["BOOL", "F32", "F64", "I8", "F8_E4M3", "F4", "C64", "U64", "none"]),
                "shape": st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**64 - 1, -1]), max_size=3),
                "data_offsets": st.lists(st.sampled_from([0, 1, 6, 24, 30, 2**63]), min_size=2, max_size=2),
            }
        ),
    ),
    body=st.sampled_from([0, 6, 30, 64]),
)
def test_hostile_headers_with_the_right_checksum_give_a_refusal_or_a_map(tmp_path_factory, header, body):
    text = json.dumps(header).encode()
    tensors = struct.pack("<Q", len(text)) + text + bytes(body)
    folder = forge(tmp_path_factory.mktemp("map"), tensors)
    loaded = map_or_refusal(folder)
    assert str(folder) in loaded if isinstance(loaded, str) else loaded.is_spatial.shape == (2, 3)


# The card and the plot


def test_the_card_says_what_it_is_how_it_was_made_and_how_to_use_it():
    text = card(make_map(), "user/my-map")
    _, front_matter, body = text.split("---\n", 2)
    assert "library_name: ssd-cache" in front_matter
    assert "base_model: user/model" in front_matter
    assert 'HeadMap.from_pretrained("user/my-map")' in body
    assert 'JanusForConditionalGeneration.from_pretrained("user/model", attn_implementation="ssd")' in body
    assert f"({PLOT_NAME})" in body
    assert "| layers x KV heads | 2 x 3 |" in body
    assert "| spatial, semantic | 3, 3 |" in body
    assert "| threshold | 0.6 |" in body
    assert '"num_prompts": 4' in body


@pytest.mark.parametrize("model_id", [None, "local", "/srv/model", "a: b/c", "../a", "x\N{SNOWMAN}/y", "a/b"])
def test_a_card_s_front_matter_links_only_what_the_hub_can_link(model_id):
    text = card(HeadMap(LABELS, model_id=model_id, profile={"a": "```\n# injected"}), "user/map")
    assert ("base_model" in text.split("---\n")[1]) == (model_id == "a/b")


def test_the_example_of_the_card_names_a_class_that_transformers_has():
    import transformers

    for model_type, name in (("janus", "JanusForConditionalGeneration"), ("emu3", "AutoModelForMultimodalLM")):
        assert f"from transformers import {name}\n" in card(make_map(model_type=model_type), "user/map")
        assert hasattr(transformers, name)


@pytest.mark.parametrize("shape", [(2, 3), (24, 16), (1, 300), (200, 2)])
def test_the_plot_has_a_cell_for_every_head(shape):
    labels = torch.rand(shape) < 0.4
    image = plot_labels(HeadMap(labels, model_id="somebody/" + "long-name-" * 20))
    pixels = image.convert("RGB").tobytes()
    counts = {}
    for colour in (SPATIAL, SEMANTIC):
        wanted = bytes.fromhex(colour[1:])
        counts[colour] = sum(pixels[at : at + 3] == wanted for at in range(0, len(pixels), 3)) - 18 * 18  # the legend
    cell = counts[SPATIAL] / labels.sum().item()
    assert cell == counts[SEMANTIC] / (~labels).sum().item(), "cells are of one size, none is hidden"
    assert cell == int(cell**0.5) ** 2
    assert Image.open(io.BytesIO(png(HeadMap(labels)))).format == "PNG"
