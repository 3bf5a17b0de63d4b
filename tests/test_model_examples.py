"""examples/emu3.py and examples/glm_image.py run with arguments, on small random weights, and save an image."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.models import emu3_processor, tiny_emu3
from PIL import Image

from ssd_cache import HeadMap

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("has_map", [False, True], ids=["online", "head map"])
def test_emu3(tmp_path, capsys, has_map):
    processor = emu3_processor()
    processor.save_pretrained(tmp_path / "model")
    tiny_emu3(processor, attn_implementation="sdpa").save_pretrained(tmp_path / "model")
    arguments = ["a photo of a red circle", "--model", str(tmp_path / "model"), "--side", "12", "--budget", "0.3"]
    if has_map:
        labels = HeadMap(torch.tensor([[True, False], [False, True]]), (90, 91))
        arguments += ["--head-map", str(labels.save_pretrained(tmp_path / "map"))]
    load("emu3").main([*arguments, "--device", "cpu", "--output", str(tmp_path / "emu3.png")])
    assert Image.open(tmp_path / "emu3.png").size == (96, 96)
    assert "emu3.png" in capsys.readouterr().out


def test_glm_image(tmp_path, capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[diffusers]')")
    from helpers.models import glm_image_pipeline

    glm_image_pipeline().save_pretrained(tmp_path / "model")
    arguments = ["a photo of a red circle", "--model", str(tmp_path / "model"), "--height", "128", "--width", "192"]
    load("glm_image").main([*arguments, "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "glm.png")])
    assert Image.open(tmp_path / "glm.png").size == (192, 128)
    assert "glm.png" in capsys.readouterr().out
