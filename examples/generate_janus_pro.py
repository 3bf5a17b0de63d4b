"""Generate images with Janus-Pro and a fifth of its KV cache, with transformers' own classes.

    python examples/generate_janus_pro.py "a photo of a red circle" --head-map my-map

It is a template for your own scripts; `ssd-cache generate` has more options and compares policies.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import typer
from PIL import Image
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_cache import HeadMap, SSDCache  # importing registers the attention name "ssd"
from ssd_cache.models import resolve_device, resolve_dtype


def main(
    prompts: list[str],
    model: str = "deepseek-community/Janus-Pro-1B",
    head_map: str = "online",
    budget: float | None = None,
    guidance: float = 5.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    output: Path = Path("images"),
) -> None:
    """Generate one image for each of PROMPTS, all at once, into the folder OUTPUT."""
    where = resolve_device(device)
    processor = JanusProcessor.from_pretrained(model)
    janus = JanusForConditionalGeneration.from_pretrained(
        model, dtype=resolve_dtype(dtype, where), attn_implementation="ssd"
    )
    janus = janus.to(where).eval()
    if head_map == "online":  # no head map
        cache = SSDCache.online(janus, budget)
    else:  # without a budget the map's own slots, or 0.2 of the visual tokens
        cache = SSDCache(HeadMap.from_pretrained(head_map), budget)

    texts = prompts
    if processor.chat_template is not None:
        chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in prompts]
        texts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(
        text=texts, generation_mode="image", padding=True, padding_side="left", max_length=None, return_tensors="pt"
    ).to(where)
    torch.manual_seed(seed)
    tokens = janus.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_mode="image",
        **cache.as_kwargs(),
        guidance_scale=guidance,
        do_sample=True,
        top_k=0,
        generation_kwargs={"boi_token_id": processor.tokenizer.boi_token_id},
    )
    memory = cache.memory_stats()  # call cache.reset() before the next image
    print(f"{memory.key_value / 1e6:.1f} MB of K and V; a full cache would hold {memory.full_cache / 1e6:.1f} MB")

    with torch.no_grad():
        pixels = janus.decode_image_tokens(tokens).float().cpu().permute(0, 3, 1, 2)
    output.mkdir(parents=True, exist_ok=True)
    # arrays, since the image processor on torchvision refuses to return PIL images
    for number, array in enumerate(processor.postprocess(list(pixels))["pixel_values"]):
        Image.fromarray(np.asarray(array).transpose(1, 2, 0)).save(output / f"{number:03}.png")
        print(output / f"{number:03}.png", prompts[number])


if __name__ == "__main__":
    typer.run(main)
