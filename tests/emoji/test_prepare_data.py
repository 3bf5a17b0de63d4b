"""examples/prepare_emoji_data.py: packages are checked, failed icons are named, and cells become tokens and back.

Rendering needs resvg_py; without it, those tests are skipped. The packages themselves are not needed: small ones of the
same format are written here.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from helpers.scripts import run_script
from helpers.tiny_checkpoint import EXAMPLE, load_example

from ssd_cache.emoji.captions import STYLES, SUBJECTS
from ssd_cache.emoji.icons import CLEAR, load_icons, read_icons

example = load_example("prepare_emoji_data")
needs_resvg = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="resvg_py renders the icons")
NAMES = [example.ICON_NAMES.get(subject, subject.replace(" ", "-")) for subject in SUBJECTS]


def write_package(folder, package, bodies):
    folder.mkdir(parents=True)
    about = {"name": package, "version": "9.9.9", "license": "Apache-2.0"}
    (folder / "package.json").write_text(json.dumps(about))
    icons = {name: {"body": body} for name, body in bodies.items()}
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
    return folder


def bodies(seed):
    """A square and a disc for every subject, each in its own place and colours."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in NAMES:
        left, top = rng.integers(2, 14, 2)
        square, disc = (f"rgb({','.join(map(str, rng.integers(0, 255, 3)))})" for _ in range(2))
        made[name] = f'<path fill="{square}" d="M{left} {top}h14v9h-14z"/><circle cx="16" cy="24" r="6" fill="{disc}"/>'
    return made


def packages(tmp_path, change=None):
    folders = []
    for seed, (style, package) in enumerate(example.PACKAGES.items()):
        made = bodies(seed)
        if change is not None:
            change(style, made)
        folders.append(write_package(tmp_path / style, package, made))
    return folders


def test_a_folder_that_is_not_the_package_is_refused(tmp_path):
    with pytest.raises(example.DataError, match="run `npm pack @iconify-json/noto`"):
        example.read_icon_set(tmp_path / "nothing", "@iconify-json/noto")
    folder = write_package(tmp_path / "other", "@iconify-json/twemoji", bodies(0))
    with pytest.raises(example.DataError, match="@iconify-json/twemoji; expected @iconify-json/noto"):
        example.read_icon_set(folder, "@iconify-json/noto")
    (folder / "icons.json").write_text("{")
    with pytest.raises(example.DataError, match="is not the unpacked npm package"):
        example.read_icon_set(folder, "@iconify-json/twemoji")


def test_the_script_ends_with_one_line_where_a_package_or_the_rasterizer_is_missing(tmp_path, monkeypatch):
    folders = packages(tmp_path)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    for arguments, message in [
        ([folders[0], tmp_path / "none"], "run `npm pack @iconify-json/fluent-emoji-flat`"),
        (folders, "pip install resvg_py"),
    ]:
        script = EXAMPLE.with_name("prepare_emoji_data.py")
        code, _, stderr = run_script(script, *arguments, "--output", tmp_path / "out")
        assert code == 1
        assert stderr.startswith("error: ")
        assert message in stderr
        assert stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


@needs_resvg
def test_icons_that_do_not_render_are_all_named_and_counted(tmp_path):
    def spoil(style, made):
        if style == "fluent":
            made["fox"] = "<path"
            made["owl"] = "<g/>"
            del made["bomb"]

    with pytest.raises(example.DataError) as error:
        example.main(*packages(tmp_path, spoil), output=tmp_path / "out")
    assert "3 of 160 icons failed" in str(error.value)
    for name, reason in [("fox", "does not render"), ("owl", "draws nothing"), ("bomb", "has no icon bomb")]:
        assert name in str(error.value)
        assert reason in str(error.value)
    assert not (tmp_path / "out").exists()


@needs_resvg
def test_the_data_set_is_written_whole_and_read_back(tmp_path, capsys):
    example.main(*packages(tmp_path), output=tmp_path / "out", num_codes=40)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "icons.npz",
        "icons_144.npy",
        "icons.png",
        "tokens.png",
        "SOURCES.md",
    }
    icons = read_icons(tmp_path / "out" / "icons.npz")
    assert icons.codes.shape == (40, 4, 4, 4)
    assert icons.num_tokens == 48
    shown = (icons.grids[:, :, 0] != CLEAR).mean()
    assert 0.3 < shown < 0.9  # icons fill their square along the longer side
    rendered = np.load(tmp_path / "out" / "icons_144.npy")
    assert rendered.shape == (80, 2, 144, 144, 4)
    assert (rendered[..., :3] <= rendered[..., 3:]).all()  # premultiplied
    assert "noto 9.9.9: Apache-2.0" in (tmp_path / "out" / "SOURCES.md").read_text()
    assert "160 icons, 40 codes" in capsys.readouterr().out


@needs_resvg
def test_an_icon_fills_its_square_centred():
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{}</svg>'
    pixels = example.rasterize(svg.format('<path fill="#f00" d="M1 1h8v4h-8z"/>'), 16)
    assert pixels.shape == (16, 16, 4)
    assert (pixels[4:12] == np.array([1, 0, 0, 1], np.float32)).all()
    assert (pixels[:4] == 0).all()
    assert (pixels[12:] == 0).all()


def test_cells_are_the_means_of_the_pixels_they_cover():
    rng = np.random.default_rng(0)
    icons = rng.integers(0, 256, (2, 2, 144, 144, 4), dtype=np.uint8)
    cells = example.to_cells(icons)
    assert cells.shape == (2, 2, 2, 18, 18, 4, 4, 4)
    row, column = 5, 11
    block = icons[1, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].astype(np.float64) / 255
    means = block.reshape(4, 2, 4, 2, 4).mean((1, 3))
    np.testing.assert_allclose(cells[1, 0, 0, row, column], means, atol=1e-6)
    np.testing.assert_allclose(cells[1, 0, 1, row, 17 - column], means[:, ::-1], atol=1e-6)


def test_codes_of_few_distinct_cells_are_those_cells_and_tokens_name_them():
    torch.manual_seed(0)
    kinds = torch.rand(10, 64) * 0.9 + 0.1
    cells = kinds[torch.randint(10, (len(SUBJECTS), len(STYLES), 2, 18, 18))]
    cells[3, 1, :, 4] = 0
    points = cells.flatten(0, 4)
    codes = example.fit_codes(points[points.amax(1) > 0], 10)
    half_a_level = 0.5 / 255  # codes are stored in 8 bits; a mean of 10,000 cells in float32 is nearer
    torch.testing.assert_close(codes[codes[:, 0].argsort()], kinds[kinds[:, 0].argsort()], rtol=0, atol=half_a_level)
    grids = example.tokenize(cells.unflatten(-1, (4, 4, 4)), codes)
    assert (grids == CLEAR).sum() == 2 * 18
    assert (grids[3, 1, :, 4] == CLEAR).all()
    shown = grids != CLEAR
    torch.testing.assert_close(codes[grids[shown] - 8], cells[shown], rtol=0, atol=half_a_level)


def test_the_names_of_icons_are_those_of_distinct_subjects():
    assert set(example.ICON_NAMES) <= set(SUBJECTS)
    assert len(set(NAMES)) == len(SUBJECTS)
    assert load_icons().codes.shape[0] == example.NUM_CODES
