"""Checkpoint folders with random weights: a Janus with small images, a head map and the words of shapes-janus, and
other families, whose images are of any size.

The Janus's images are 8 x 8 visual tokens (128 x 128 pixels), so one is generated in a fraction of a second.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import GenerationConfig

from helpers.models import (
    BOS,
    PAD,
    emu3_processor,
    glm_image_processor,
    tiny_causal,
    tiny_emu3,
    tiny_glm_image,
    tiny_janus,
    words_tokenizer,
)
from ssd_cache import HeadMap

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_shapes_janus.py"
SIDE, LAYERS, HEADS = 8, 2, 2


def load_example(name="train_shapes_janus"):
    """A file of examples/ as a module, which may import others beside it."""
    if str(EXAMPLE.parent) not in sys.path:
        sys.path.append(str(EXAMPLE.parent))
    spec = importlib.util.spec_from_file_location(name, EXAMPLE.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def head_map(side: int = SIDE):
    return HeadMap(
        torch.tensor([[True, False], [False, False]]),
        (side, side),
        scores=torch.tensor([[0.9, 0.2], [0.1, 0.0]]),
        threshold=0.5,
        model_id="tiny",
        model_type="janus",
        method="made up for tests",
    )


def write_checkpoint(
    folder: Path, *, guidance_scale=None, temperature=None, with_head_map=True, side: int = SIDE
) -> Path:
    model = tiny_janus(layers=LAYERS, heads=HEADS, grid_side=side, attn_implementation="sdpa")
    model.generation_config.guidance_scale, model.generation_config.temperature = guidance_scale, temperature
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    load_example().build_processor().save_pretrained(folder)
    if with_head_map:
        head_map(side).save_pretrained(folder / "head_map")
    return folder


def write_emoji_janus(folder: Path) -> Path:
    """The folder `checkpoint` that the example exports from random weights, with a head map for its 2 layers."""
    example = load_example("train_emoji_janus")
    size = {"hidden_size": 32 * HEADS, "num_layers": LAYERS}
    torch.manual_seed(0)
    model = example.build_model(example.build_processor(), **size)
    folder.mkdir(parents=True, exist_ok=True)
    example.save_state(folder / "training.pt", model, [], 0)
    example.export(folder, **size)
    head_map(24).save_pretrained(folder / "checkpoint" / "head_map")
    return folder / "checkpoint"


def write_family(name: str, folder: Path) -> Path:
    """A checkpoint of two layers and two KV heads: "janus", "emu3", "glm" or "llama"."""
    if name == "janus":
        return write_checkpoint(folder, with_head_map=False)
    if name == "llama":
        processor = words_tokenizer(["a", "red", "blue", "circle", "square", "and"], {})
        model = tiny_causal("llama", attn_implementation="sdpa")
        model.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=PAD)
    else:
        processor, make = {"emu3": (emu3_processor(), tiny_emu3), "glm": (glm_image_processor(), tiny_glm_image)}[name]
        model = make(processor, attn_implementation="sdpa")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
