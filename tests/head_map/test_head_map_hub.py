"""The Hub road against a real HTTP server on the loopback: what comes down, what goes up, and every way it can fail.

The server's address is put into huggingface_hub's constants (it reads HF_ENDPOINT once, at import); one test uses child
processes with the environment variables themselves.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.hub_server import HubServer, Repo
from PIL import Image

import ssd_cache
from ssd_cache.head_map.head_map import HeadMap, HeadMapError

LABELS = torch.tensor([[True, False, False], [False, True, True]])
MAP = HeadMap(LABELS, (4, 6), scores=LABELS.float(), threshold=0.5, model_id="user/model", profile={"seeds": [0]})
OTHER = ~MAP
REPO = "user/map"


def files_of(head_map: HeadMap, folder: str = "") -> dict[str, bytes]:
    return {folder + name: content for name, content in head_map._files().items()}


@pytest.fixture
def hub(hub):
    """A Hub with `user/map`."""
    hub.repos[REPO] = Repo()
    hub.repos[REPO].commit(files_of(MAP))
    return hub


def refusal(*args, **kwargs) -> str:
    with pytest.raises(HeadMapError) as caught:
        HeadMap.from_pretrained(*args, **kwargs)
    return str(caught.value)


# Down


def test_a_map_comes_down_and_knows_its_commit(hub):
    head_map = HeadMap.from_pretrained(REPO)
    commit = hub.repos[REPO].refs["main"]
    assert head_map == MAP
    assert head_map.origin == f"user/map@{commit}"
    assert repr(head_map).endswith(f"from user/map@{commit})")
    assert {path.split("/")[-1] for _, path, _ in hub.requests if "/resolve/" in path} == {
        "config.json",
        "head_map.safetensors",
    }


def test_a_second_load_asks_for_the_commit_alone_and_a_forced_one_for_everything(hub):
    HeadMap.from_pretrained(REPO)
    hub.requests.clear()
    assert HeadMap.from_pretrained(REPO) == MAP
    assert {(method, path.split("/")[-1]) for method, path, _ in hub.requests} == {("HEAD", "config.json")}
    hub.requests.clear()
    assert HeadMap.from_pretrained(REPO, force_download=True) == MAP
    assert [path for method, path, _ in hub.requests if method == "GET" and path.startswith("/cdn/")]


def test_revisions(hub):
    repo = hub.repos[REPO]
    first = repo.refs["main"]
    repo.refs["v1"] = first
    second = repo.commit(files_of(OTHER))
    for revision in ("v1", first):
        assert HeadMap.from_pretrained(REPO, revision=revision) == MAP
    for revision in (None, "main", second):
        head_map = HeadMap.from_pretrained(REPO, revision=revision)
        assert head_map == OTHER
        assert head_map.origin == f"user/map@{second}"


@pytest.mark.parametrize("moment", range(1, 10))
def test_a_push_in_the_middle_of_a_load_does_not_mix_two_maps(hub, monkeypatch, moment):
    repo = hub.repos[REPO]
    old, new = repo.refs["main"], repo.commit(files_of(OTHER))
    repo.refs["main"] = old
    resolve, calls = repo.resolve, []

    def push_at_that_moment(revision):
        calls.append(revision)
        if len(calls) == moment:
            repo.refs["main"] = new
        return resolve(revision)

    monkeypatch.setattr(repo, "resolve", push_at_that_moment)
    if moment == 4:  # between huggingface_hub's own HEAD and GET: it cannot but refuse
        assert "try again" in refusal(REPO)
    head_map = HeadMap.from_pretrained(REPO)
    assert (head_map, head_map.origin) in [(MAP, f"user/map@{old}"), (OTHER, f"user/map@{new}")]


def test_a_subfolder(hub):
    commit = hub.repos[REPO].commit(files_of(OTHER, "maps/tau-0.5/"))
    head_map = HeadMap.from_pretrained(REPO, subfolder="maps/tau-0.5")
    assert head_map == OTHER
    assert head_map.origin == f"user/map@{commit}/maps/tau-0.5"
    assert HeadMap.from_pretrained(REPO) == MAP
    hub.requests.clear()
    assert "leaves the folder" in refusal(REPO, subfolder="../other")
    assert hub.requests == []


def test_the_token_reaches_the_hub_and_not_its_file_host(hub):
    hub.repos[REPO].private = True
    assert HeadMap.from_pretrained(REPO, token="hf_reader") == MAP
    tokens = {(path.split("/")[1] == "cdn", token) for _, path, token in hub.requests}
    assert tokens == {(False, "hf_reader"), (True, None)}


def test_a_folder_of_that_name_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OTHER.save_pretrained("user/map")
    assert HeadMap.from_pretrained(REPO) == OTHER
    assert hub.requests == []


def test_the_snapshot_folder_that_snapshot_download_returns_loads_too(hub):
    assert HeadMap.from_pretrained(huggingface_hub.snapshot_download(REPO)) == MAP


# Down, and refused


def test_no_such_repository(hub):
    message = refusal("user/nothing")
    assert message.startswith(f"{hub.url}/user/nothing: no such repository on the Hub, or a private one, and no such")
    assert "hf auth login" in message
    assert "no such repository" in refusal("user/nothing", token="hf_reader")
    assert "no such repository" in refusal("nothing", force_download=True)


def test_a_private_repository_without_a_token(hub):
    hub.repos[REPO].private = True
    assert "or a private one" in refusal(REPO)
    assert "for a private repository pass token=" in refusal(REPO, token=False)


def test_a_token_that_the_hub_does_not_know(hub):
    message = refusal(REPO, token="hf_wrong")
    assert message.startswith(f"{hub.url}/user/map: the Hub refuses the token (401)")
    assert "hf_wrong" not in message


def test_token_true_without_a_saved_token(hub):
    assert "no token is saved here; pass token=" in refusal(REPO, token=True)


def test_a_gated_repository(hub):
    hub.repos[REPO].gated = True
    assert "access to this repository is restricted; ask for it on its page" in refusal(REPO, token="hf_reader")


def test_a_wrong_revision(hub):
    message = refusal(REPO, revision="v9")
    assert message.startswith(f"{hub.url}/user/map@v9: no such revision; revision= takes a branch")
    assert "no such revision" in refusal(REPO, revision="0" * 40)
    assert "is not a branch, tag or commit" in refusal(REPO, revision="../../main")


@pytest.mark.parametrize("missing", ["config.json", "head_map.safetensors"])
def test_a_missing_file(hub, missing):
    hub.repos["user/model"] = Repo()
    hub.repos["user/model"].commit({name: content for name, content in files_of(MAP).items() if name != missing})
    message = refusal("user/model")
    assert message.startswith(f"{hub.url}/user/model: has no config.json or no head_map.safetensors there")
    assert "profile_heads" in message
    assert "has no config.json" in refusal(REPO, subfolder="nowhere")


def test_the_repository_of_a_model(hub):
    hub.repos["user/model"] = Repo()
    hub.repos["user/model"].commit({**files_of(MAP), "config.json": b'{"architectures": ["Janus"]}'})
    message = refusal("user/model")
    assert f"user/model@{hub.repos['user/model'].refs['main']}/config.json: has no format_version" in message


@pytest.mark.parametrize(("name", "size"), [("config.json", (1 << 20) + 1), ("head_map.safetensors", (64 << 20) + 1)])
def test_a_file_that_is_too_big_is_not_downloaded(hub, name, size):
    hub.repos[REPO].commit({name: bytes(size)})
    assert f"{name} takes {size} bytes" in refusal(REPO)
    fetched = [path for method, path, _ in hub.requests if method == "GET"]
    assert not any(path.endswith(name) or path.startswith("/cdn/") for path in fetched)


@pytest.mark.parametrize("cut_after", [0, 100])
def test_a_body_that_breaks_off(hub, tmp_path, cut_after):
    hub.cut_after = cut_after
    message = refusal(REPO)
    assert message.startswith(f"{hub.url}/user/map: the transfer failed: ")
    assert "try again" in message
    hub.cut_after = None
    assert HeadMap.from_pretrained(REPO) == MAP, "nothing half-loaded stays in the cache"


def test_a_cached_file_that_was_damaged(hub, tmp_path):
    HeadMap.from_pretrained(REPO)
    blob = next(tmp_path.glob("cache/models--user--map/snapshots/*/head_map.safetensors")).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\xff")
    message = refusal(REPO)
    assert "do not belong together" in message
    assert "download it again with force_download=True" in message
    assert HeadMap.from_pretrained(REPO, force_download=True) == MAP


@pytest.mark.parametrize("status", [500, 503, 429, 418])
def test_a_hub_in_trouble(hub, status):
    hub.answer_always = status
    assert f"the Hub answered {status}; try again later" in refusal(REPO)
    hub.answer_always = None
    HeadMap.from_pretrained(REPO)
    hub.answer_always = status
    assert HeadMap.from_pretrained(REPO) == MAP, "the cached copy"


def test_a_bare_404(hub):
    hub.answer_always = 404
    assert "not found (404); check the name, and HF_ENDPOINT" in refusal(REPO)


def test_a_hub_that_forbids(hub):
    hub.answer_always = 403
    assert "the Hub refuses the token (403), or it lacks the permission" in refusal(REPO)


def test_a_server_that_is_no_hub(hub):
    hub.is_a_hub = False
    assert "this server does not answer like a Hub; check HF_ENDPOINT" in refusal(REPO)


@pytest.mark.parametrize("name", ["user/ma p", "us--er/map", "map.git", "a:b"])
def test_what_is_neither_a_path_nor_a_repository(hub, name):
    message = refusal(name)
    assert "neither a folder or file here, nor the id of a repository; an id reads 'user/name'" in message
    assert hub.requests == []


def test_arguments_that_exclude_each_other(hub):
    assert "change one of the arguments" in refusal(REPO, force_download=True, local_files_only=True)


# Without a server


def test_the_server_is_gone(hub):
    HeadMap.from_pretrained(REPO)
    hub.stop()
    huggingface_hub.utils.close_session()
    head_map = HeadMap.from_pretrained(REPO)
    assert head_map == MAP
    assert head_map.origin == f"user/map@{hub.repos[REPO].refs['main']}"
    message = refusal("user/other")
    assert message.startswith(f"{hub.url}/user/other: the server cannot be reached and there is no cached copy; check")
    assert "the server cannot be reached" in refusal(REPO, revision="v2")
    assert f"{hub.url}/user/map: " in refusal(REPO, force_download=True)


def test_offline(hub, monkeypatch):
    HeadMap.from_pretrained(REPO)
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert HeadMap.from_pretrained(REPO) == MAP
    message = refusal("user/other")
    assert message.startswith(f"{hub.url}/user/other: no cached copy, and offline mode is on; unset HF_HUB_OFFLINE")
    assert "offline mode is on" in refusal(REPO, force_download=True)
    assert hub.requests == []


def test_local_files_only(hub, tmp_path):
    assert "there is no cached copy; download it once without local_files_only=True" in refusal(
        REPO, local_files_only=True
    )
    HeadMap.from_pretrained(REPO, cache_dir=tmp_path / "mine")
    hub.requests.clear()
    assert HeadMap.from_pretrained(REPO, cache_dir=str(tmp_path / "mine"), local_files_only=True) == MAP
    assert "there is no cached copy" in refusal(REPO, local_files_only=True)
    assert hub.requests == []


def test_half_a_cached_copy_is_no_copy(hub):
    hub.repos["user/half"] = Repo()
    hub.repos["user/half"].commit({"config.json": files_of(MAP)["config.json"]})
    refusal("user/half")
    assert "there is no cached copy" in refusal("user/half", local_files_only=True)


# Up


def test_a_map_goes_up_and_comes_down_again(hub):
    info = MAP.push_to_hub("me/new-map", token="hf_writer")
    repo = hub.repos["me/new-map"]
    assert info.oid == repo.refs["main"]
    assert info.commit_url == f"{hub.url}/me/new-map/commit/{info.oid}"
    tree = repo.commits[info.oid]
    assert tree.keys() == {".gitattributes", "README.md", "config.json", "head_map.png", "head_map.safetensors"}
    assert b'HeadMap.from_pretrained("me/new-map")' in tree["README.md"]
    assert Image.open(io.BytesIO(tree["head_map.png"])).width >= 520
    assert not repo.private
    assert any(path.startswith("/lfs/") for method, path, _ in hub.requests if method == "PUT"), "tensors go by LFS"
    head_map = HeadMap.from_pretrained("me/new-map")
    assert head_map == MAP
    assert head_map.origin == f"me/new-map@{info.oid}"


def test_a_second_push_replaces_the_map_and_a_branch_holds_another(hub):
    MAP.push_to_hub("me/map", token="hf_writer", private=True)
    assert hub.repos["me/map"].private
    second = OTHER.push_to_hub("me/map", token="hf_writer", commit_message="Turn it round")
    assert second.commit_message == "Turn it round"
    HeadMap.uniform("spatial", num_layers=2, num_kv_heads=2).push_to_hub("me/map", token="hf_writer", revision="flat")
    assert HeadMap.from_pretrained("me/map", token="hf_reader") == OTHER
    assert HeadMap.from_pretrained("me/map", token="hf_reader", revision="flat").num_kv_heads == 2
    assert HeadMap.from_pretrained("me/map", token="hf_reader", revision=second.oid) == OTHER


def test_a_name_without_a_user_gets_the_token_s(hub):
    MAP.push_to_hub("short", token="hf_writer")
    tree = hub.repos["me/short"].commits[hub.repos["me/short"].refs["main"]]
    assert b'HeadMap.from_pretrained("me/short")' in tree["README.md"]


def test_no_token_goes_up_inside_a_file(hub):
    MAP.push_to_hub("me/new-map", token="hf_writer")
    tree = hub.repos["me/new-map"].commits[hub.repos["me/new-map"].refs["main"]]
    assert not any(b"hf_writer" in content for content in tree.values())


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("me/map", None, "the Hub refuses the token (401)"),
        ("me/map", "hf_reader", "the Hub refuses the token (403), or it lacks the permission; pass token="),
        ("me/map", "hf_wrong", "the Hub refuses the token (401)"),
        (REPO, "hf_reader", "the Hub refuses the token (403)"),
        ("a/b/c", "hf_writer", "nor the id of a repository"),
        ("me/ma p", "hf_writer", "nor the id of a repository"),
    ],
)
def test_a_push_that_the_hub_refuses(hub, repo_id, token, message):
    before = dict(hub.repos[REPO].refs)
    with pytest.raises(HeadMapError) as caught:
        MAP.push_to_hub(repo_id, token=token)
    assert str(caught.value).startswith(f"{hub.url}/{repo_id}: ")
    assert message in str(caught.value)
    assert hub.repos.keys() == {REPO}
    assert hub.repos[REPO].refs == before


def test_a_push_without_a_server(hub, monkeypatch):
    hub.stop()
    with pytest.raises(HeadMapError, match=rf"{hub.url}/me/map: the transfer failed: .*check network"):
        MAP.push_to_hub("me/map", token="hf_writer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HeadMapError, match="offline mode is on; unset HF_HUB_OFFLINE"):
        MAP.push_to_hub("me/map", token="hf_writer")


# The environment variables themselves


def test_hf_endpoint_hf_token_and_hf_hub_offline_in_child_processes(tmp_path):
    script = (
        "import sys\n"
        "from ssd_cache.head_map.head_map import HeadMap, HeadMapError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        print(HeadMap.from_pretrained(name))\n"
        "    except HeadMapError as error:\n"
        "        print('refused:', error)\n"
    )

    def child(**environment: str) -> list[str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        kept |= {"PYTHONPATH": str(Path(ssd_cache.__file__).parents[1]), "NO_PROXY": "127.0.0.1,localhost"}
        kept |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", script, REPO, "user/other"]
        done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with HubServer() as hub:
        hub.repos[REPO] = Repo(private=True)
        commit = hub.repos[REPO].commit(files_of(MAP))
        loaded = f"HeadMap(2 layers x 3 KV heads, 3 spatial, 3 semantic, grid 4x6, from user/map@{commit})"
        online = child(HF_TOKEN="hf_reader")
        assert online[0] == loaded
        assert online[1].startswith(f"refused: {hub.url}/user/other: no such repository")
        assert "hf_reader" in {token for _, _, token in hub.requests}
        hub.requests.clear()
        offline = child(HF_HUB_OFFLINE="1")
        assert offline[0] == loaded
        assert offline[1].startswith(f"refused: {hub.url}/user/other: no cached copy, and offline mode is on")
        assert hub.requests == []
