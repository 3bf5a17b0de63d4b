"""hub/ as it would be pushed: the head map's repository is what `push_to_hub` uploads, and transformers' page runs.

The repository for `custom_generate` is tested in `test_custom_generate.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from helpers.hub_server import HubServer
from helpers.pages import check_card
from helpers.tiny_checkpoint import head_map, write_checkpoint
from PIL import Image

from ssd_cache import HeadMap
from ssd_cache.models import find_head_map

ROOT = Path(__file__).parents[1]
HUB = ROOT / "hub"
REPO = "user/shapes-janus-head-map"
PAGE = HUB / "transformers" / "ssd_cache.md"


def test_the_head_map_is_what_is_pushed_of_the_bundled_model(hub: HubServer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    bundled, folder = find_head_map("shapes-janus"), HUB / "head_map"
    assert HeadMap.from_pretrained(folder) == bundled
    bundled.push_to_hub(REPO)
    pushed = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    assert pushed.keys() - {".gitattributes"} == {path.name for path in folder.iterdir()}
    for name in ("README.md", "config.json", "head_map.safetensors"):
        assert pushed[name] == (folder / name).read_bytes(), f"{name} is of another version: push it again"
    check_card((folder / "README.md").read_text("utf-8"))
    assert Image.open(folder / "head_map.png").size >= (520, 200)


def test_the_page_for_transformers_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", side=24)
    head_map(24).save_pretrained("janus-pro-1b-map")
    blocks = re.findall(r"```py\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        code = block.replace("deepseek-community/Janus-Pro-1B", str(tmp_path / "model"))
        exec(compile(code, str(PAGE), "exec"), namespace)
    assert len(blocks) == 2
    assert namespace["tokens"].shape == (1, 576)
    assert re.fullmatch(r"\d+\.\d MB of K and V\n", capsys.readouterr().out)


def test_the_page_for_transformers_has_the_form_of_the_others():
    text = PAGE.read_text("utf-8")
    assert text.startswith("<!--Copyright ")
    headings = re.findall(r"^(#+ .*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    assert headings == ["# ssd-cache", "## Transformers integration", "## Resources"]
    assert len(text.split()) < 800


def test_the_index_names_every_folder():
    named = set(re.findall(r"^\| `([a-z_]+)/", (HUB / "README.md").read_text("utf-8"), re.MULTILINE))
    assert named == {path.name for path in HUB.iterdir() if path.is_dir()}
