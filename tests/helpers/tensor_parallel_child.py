"""One of the processes of a tensor parallel model; test_devices.py starts them and reads the JSON that each prints.

It is not a test: it generates with the caches of `CASES`, with which the test also generates in one process.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
from transformers import GlmImageForConditionalGeneration, JanusForConditionalGeneration, LlamaForCausalLM

from helpers.models import glm_image_processor, left_padded_prompts, words_tokenizer
from ssd_cache import HeadMap, SSDCache, enable, profile_heads
from ssd_cache.models import generator_of

SIDE = 8
LABELS = torch.tensor([[True, False, True, True], [False, False, True, True]])  # process 1 has no semantic head
MIXED = HeadMap(LABELS, (SIDE, SIDE))
ONE_KIND = HeadMap(torch.tensor([[True] * 4, [False] * 4]), (SIDE, SIDE))
BY_HEAD = [[14, 30, 22, 14], [40, 14, 20, 14]]
CASES = {
    "full": (MIXED, {"budget": 1.0}),
    "a fifth": (MIXED, {"budget": 14, "buffer": 4}),
    "inverted": (~MIXED, {"budget": {"spatial": 14, "semantic": 16}, "buffer": 4}),
    "by head": (MIXED, {"budget": BY_HEAD, "buffer": 4}),
    "one kind": (ONE_KIND, {"budget": 14, "buffer": 4}),
    "online": (HeadMap.online(num_layers=2, num_kv_heads=4, grid=(SIDE, SIDE)), {"budget": 18, "buffer": 4}),
}
JANUS_MAP = HeadMap(torch.tensor([[True, False], [False, True]]), (SIDE, SIDE))


def generate(model, head_map, settings):
    """Tokens, and the cache's bytes, of two prompts with padding, sampled."""
    torch.manual_seed(0)
    with enable(model, head_map, **settings):
        output = model.generate(
            **left_padded_prompts([5, 9]),
            max_new_tokens=SIDE * SIDE,
            do_sample=True,
            top_k=0,
            return_dict_in_generate=True,
        )
    return output.sequences.tolist(), output.past_key_values.nbytes


def generate_janus(model):
    """Visual tokens with guidance."""
    torch.manual_seed(0)
    with enable(model, JANUS_MAP, budget=14, buffer=4):
        return model.generate(
            **left_padded_prompts([5, 9]), generation_mode="image", guidance_scale=3.0, do_sample=True, top_k=0
        ).tolist()


def generate_glm(model):
    """Preview and image, of prompts with padding."""
    generator = generator_of(model, glm_image_processor(), (8, 4))
    head_map = HeadMap(JANUS_MAP.is_spatial, (8, 4), previews=[(22, 11)])
    with enable(model, head_map, budget=0.2):
        torch.manual_seed(0)
        inputs = generator.prepare(["a photo of a red circle", "a blue square"])
        number = head_map.num_visual_tokens
        return model.generate(**inputs, min_new_tokens=number, max_new_tokens=number, do_sample=True).tolist()


def load(family, folder, **kwargs):
    # in float64 a sum over two processes is next to one over all, so no token hangs on the last bit
    return family.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa", **kwargs).eval()


def errors(model, rank):
    """What is refused, by name."""
    cases = {
        "unlike maps": lambda: generate(model, MIXED if rank == 0 else ~MIXED, {"budget": 14, "buffer": 4}),
        "unlike budgets": lambda: generate(model, MIXED, {"budget": 14 + rank, "buffer": 4}),
        "not told": lambda: model.generate(torch.ones(1, 4, dtype=torch.long), past_key_values=SSDCache(MIXED, 1.0)),
        "profile": lambda: profile_heads(
            generator_of(model, words_tokenizer(["a", "circle"], {}), (SIDE, SIDE)), ["a circle"], progress=False
        ),
    }
    found = {}
    for name, case in cases.items():
        with contextlib.suppress(ValueError):  # HeadMapError among them
            try:
                case()
            except ValueError as error:
                found[name] = str(error)
                raise
    return found


def main() -> None:
    """Generate with the models of the folder that `sys.argv` names, and print what came out."""
    from transformers.distributed import DistributedConfig

    split = {"distributed_config": DistributedConfig(tp_plan="auto")}
    folder = Path(sys.argv[1])
    model = load(LlamaForCausalLM, folder / "llama", **split)
    rank = torch.distributed.get_rank()
    result = {"cases": {name: generate(model, *case) for name, case in CASES.items()}}
    result["errors"] = errors(model, rank)
    result["online heads"] = len(SSDCache.online(model, 18, grid=(SIDE, SIDE), buffer=4).layers[0].plan.is_spatial)
    result["janus"] = generate_janus(load(JanusForConditionalGeneration, folder / "janus", **split))
    result["glm"] = generate_glm(load(GlmImageForConditionalGeneration, folder / "glm", **split))
    print(json.dumps(result))
    torch.distributed.destroy_process_group()
