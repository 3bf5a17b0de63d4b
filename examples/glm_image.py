"""Generate an image with GLM-Image in diffusers and a fifth of the visual tokens in its autoregressive part.

    python examples/glm_image.py "a photo of a red circle" --height 1024 --width 1024 --output circle.png

Without --head-map the cache needs no labels. The diffusion part, which runs afterwards, has no KV cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import GlmImagePipeline

from ssd_cache import HeadMap, enable


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, generate one image and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--model", default="zai-org/GLM-Image", help="a Hub id or folder in diffusers' format")
    parser.add_argument("--head-map", help="a Hub repository or folder; none is needed when not given")
    parser.add_argument("--budget", type=float, help="fraction of the visual tokens that a head keeps")
    parser.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 32")
    parser.add_argument("--steps", type=int, default=50, help="of the diffusion part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("glm_image.png"))
    options = parser.parse_args(arguments)

    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    pipe = GlmImagePipeline.from_pretrained(options.model, torch_dtype=dtype).to(options.device)
    encoder = pipe.vision_language_encoder
    text = encoder.config.text_config
    head_map = HeadMap.online(num_layers=text.num_hidden_layers, num_kv_heads=text.num_key_value_heads)
    if options.head_map is not None:
        head_map = HeadMap.from_pretrained(options.head_map)

    with enable(encoder, head_map, budget=options.budget):  # the grid is read from the call
        image = pipe(
            prompt=options.prompt,
            height=options.height,
            width=options.width,
            num_inference_steps=options.steps,
            generator=torch.Generator().manual_seed(options.seed),
        ).images[0]
    image.save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
