"""Golden outputs: hashes of tokens, bytes, held positions and files, to compare two versions of the code.

Record with the old code, check with the new code on the same machine:

    python tests/golden_outputs.py record golden.json
    python tests/golden_outputs.py check golden.json

Floating-point results differ between processors, so no recorded file is kept in the repository. Cases use public names
only, except `held_positions`. Each case is seeded and independent of the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers.models import BOI, left_padded_prompts, random_score, tiny_janus, tiny_llama
from helpers.tiny_checkpoint import write_checkpoint, write_family

from ssd_cache import (
    POLICIES,
    HeadMap,
    SSDCache,
    enable,
    fast_decode,
    fit_heads,
    learn_score,
    profile_heads,
)
from ssd_cache._compat import CACHE
from ssd_cache.evaluation.fidelity import measure_divergence
from ssd_cache.models import BUNDLED, find_generator

GRID = (6, 6)
PROMPTS = ["a photo of a red circle", "a photo of two blue squares", "a photo of a circle left of a triangle"]
CASES: dict[str, Callable[[], dict[str, Any]]] = {}


def case(function: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Register a case under the name of its function."""
    CASES[function.__name__] = function
    return function


def digest(*tensors: torch.Tensor) -> str:
    """Hash of shapes, dtypes and bytes."""
    result = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        result.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        result.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return result.hexdigest()[:20]


def held_positions(cache: SSDCache) -> torch.Tensor:
    """Visual tokens held now, `[layers, batch, kv_heads, tokens]`, ascending in each head, filled up with -1."""
    layers = []
    for layer in cache.layers:
        layers.append(layer.held_positions())
    width = max((head.shape[1] for heads in layers for head in heads), default=0)
    padded = [[torch.nn.functional.pad(head, (0, width - head.shape[1]), value=-1) for head in h] for h in layers]
    return torch.stack([torch.stack(heads, 1) for heads in padded]) if width else torch.empty(0)


class Recording(SSDCache):
    """An `SSDCache` that hashes the positions held before each token of the first layer."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx == 0:
            self.steps = getattr(self, "steps", hashlib.sha256())
            if self.layers[0].stores:
                self.steps.update(digest(held_positions(self)).encode())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def summary(tokens: torch.Tensor, cache: SSDCache) -> dict[str, Any]:
    """What a run left behind."""
    stats = cache.memory_stats()
    steps = getattr(cache, "steps", None)
    return {
        "tokens": digest(tokens),
        "bytes": [cache.nbytes, stats.bookkeeping, stats.full_cache],
        "positions": digest(held_positions(cache)),
        "steps": steps.hexdigest()[:20] if steps else None,
    }


def labels(layers=2, kv_heads=2, grid=GRID, **facts) -> HeadMap:
    """Both kinds of heads in each layer."""
    is_spatial = torch.arange(layers * kv_heads).reshape(layers, kv_heads) % 3 != 0
    is_spatial[0, 0] = False
    return HeadMap(is_spatial, grid=grid, **facts)


def learned_labels() -> HeadMap:
    torch.manual_seed(0)
    return labels(learned=random_score(2, 2, 16, GRID))


def generate_janus(model, cache: SSDCache, lengths=(5, 9, 3), **settings) -> dict[str, Any]:
    """Tokens of a tiny Janus with left padding."""
    torch.manual_seed(0)
    settings = {"do_sample": True, "guidance_scale": 5.0, "generation_mode": "image", **settings}
    tokens = model.generate(**left_padded_prompts(lengths), **{CACHE: cache}, **settings)
    return summary(tokens, cache)


@case
def janus_policies() -> dict[str, Any]:
    model, head_map = tiny_janus(grid_side=6), learned_labels()
    results = {}
    for policy in POLICIES:
        for buffer in (1, 3):
            settings = {"buffer": buffer, "num_recent": 2} if policy == "linear" else {"buffer": buffer}
            for budget in (0.4, 0.7):
                cache = Recording.from_policy(policy, head_map, budget, **settings)
                results[f"{policy} {buffer} {budget}"] = generate_janus(model, cache)
    return results


@case
def janus_budgets() -> dict[str, Any]:
    model, head_map = tiny_janus(grid_side=6), labels()
    budgets = {
        "kind": {"spatial": 0.4, "semantic": 0.6},
        "layer": [0.5, {"spatial": 20, "semantic": 13}],
        "head": [[12, 20], [9, 30]],
        "full": 1.0,
    }
    results = {}
    for name, budget in budgets.items():
        for kv_dtype in (None, "int8", "fp8"):
            for guidance in (1.001, 5.0):
                cache = Recording(head_map, budget, buffer=3, num_recent=2, num_sinks=1, kv_dtype=kv_dtype)
                results[f"{name} {kv_dtype} {guidance}"] = generate_janus(model, cache, guidance_scale=guidance)
    return results


@case
def janus_dtypes_and_scores() -> dict[str, Any]:
    results = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny_janus(grid_side=6).to(dtype)
        for score in ("sum", "mean", "last", "margin"):
            results[f"{dtype} {score}"] = generate_janus(model, Recording(labels(), 0.5, buffer=4, score=score))
    return results


@case
def janus_online() -> dict[str, Any]:
    model = tiny_janus(grid_side=6)
    cache = Recording.online(model, 0.5, grid=GRID, buffer=3)
    return {"online": generate_janus(model, cache)}


@case
def janus_reset_and_fast_decode() -> dict[str, Any]:
    model, results = tiny_janus(grid_side=12, heads=2), {}
    head_map = labels(grid=(12, 12))
    with fast_decode(model):
        for budget in (0.3, [[30, 40], [50, 60]]):
            cache = SSDCache(head_map, budget, buffer=6)
            for image in range(2):
                results[f"{budget} {image}"] = generate_janus(model, cache)
                cache.reset()
    return results


@case
def llama_grouped_heads() -> dict[str, Any]:
    model, results = tiny_llama(), {}
    for buffer in (1, 24):
        for name, ids in (("padded", left_padded_prompts((7, 4, 6))), ("one", {"input_ids": torch.tensor([[1, BOI]])})):
            cache = Recording(labels(grid=(8, 24)), 0.4, buffer=buffer)
            torch.manual_seed(0)
            tokens = model.generate(**ids, do_sample=True, max_new_tokens=150, **{CACHE: cache})
            results[f"{name} {buffer}"] = summary(tokens, cache)
    return results


def family(name: str, grid: tuple[int, int]) -> dict[str, Any]:
    """A tiny checkpoint of a family, through its own class for generation."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        generator = find_generator(str(write_family(name, Path(folder) / name)), grid=grid).load("float32", "cpu")
        checkpoint = generator.checkpoint
        head_map = labels(checkpoint.num_layers, checkpoint.num_kv_heads).with_layout(checkpoint.layout)
        prompts = ["a photo of a red circle", "a blue square"]
        with enable(generator.model, head_map, budget=0.5, buffer=4):
            pass  # installs and removes
        for policy in ("full", "ssd", "h2o", "streaming-llm"):
            cache = Recording.from_policy(policy, head_map, 0.5, buffer=4)
            tokens = generator.generate(prompts, cache, seed=1)
            results[policy] = summary(tokens, cache)
    return results


@case
def emu3() -> dict[str, Any]:
    return family("emu3", (5, 7))


@case
def glm_image() -> dict[str, Any]:
    return family("glm", (8, 4))


@case
def shapes_janus() -> dict[str, Any]:
    generator = find_generator(BUNDLED).load("float32", "cpu")
    head_map = generator.checkpoint.head_map()
    results = {}
    for name, cache in {
        "default": SSDCache(head_map),
        "sum": Recording(head_map, score="sum"),
        "int8": SSDCache(head_map, kv_dtype="int8"),
    }.items():
        results[name] = summary(generator.generate(PROMPTS, cache, seed=3), cache)
    return results


@case
def profile_fit_learn() -> dict[str, Any]:
    """Head-map files of every stage, on a tiny checkpoint."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        generator = find_generator(str(write_checkpoint(Path(folder) / "model", guidance_scale=2.0))).load(
            "float32", "cpu"
        )
        quiet = {"progress": False}
        levels = [16, 32, 48]
        maps = {
            "coverage": profile_heads(generator, PROMPTS, budget=0.5, levels=levels, **quiet),
            "window": profile_heads(generator, PROMPTS, method="window", **quiet),
        }
        maps["fitted"] = fit_heads(maps["coverage"], 32, step=4)
        maps["divergence"] = measure_divergence(generator, PROMPTS[:2], maps["coverage"], **quiet)
        maps["fitted by divergence"] = fit_heads(maps["divergence"], 32)
        maps["learned"] = learn_score(generator, PROMPTS, maps["fitted"], num_steps=3, batch_size=2, **quiet)
        for name, head_map in maps.items():
            head_map.save_pretrained(Path(folder) / name)
            content = (Path(folder) / name / "head_map.safetensors").read_bytes()
            results[name] = [hashlib.sha256(content).hexdigest()[:20], head_map.budget]
    return results


def run(names: list[str]) -> dict[str, Any]:
    """Results of the cases, by name."""
    results = {}
    for name in names:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[name] = json.loads(json.dumps(CASES[name]()))
        print(name, "done", file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--case", action="append", choices=CASES, help="only these cases")
    options = parser.parse_args()
    results = run(options.case or list(CASES))
    if options.action == "record":
        options.file.write_text(json.dumps(results, indent=1) + "\n")
        return
    recorded = json.loads(options.file.read_text())
    differing = [
        f"{name} / {key}: recorded {recorded[name].get(key)}, now {value}"
        for name, result in results.items()
        for key, value in result.items()
        if recorded[name].get(key) != value
    ]
    sys.exit("\n".join(differing) or None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
