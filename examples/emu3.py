"""Generate an image with Emu3 and a fifth of the visual tokens: the call of transformers' docs, inside `enable`.

    python examples/emu3.py "a photo of a red circle" --head-map user/emu3-head-map --output circle.png

Without --head-map the cache needs no labels. Guidance runs in the same batch and needs no special code.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Emu3ForConditionalGeneration, Emu3Processor

from ssd_cache import HeadMap, enable
from ssd_cache.models import generator_of


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, generate one image and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("--model", default="BAAI/Emu3-Gen-hf", help="a Hub id or folder in transformers' format")
    parser.add_argument("--head-map", help="a Hub repository or folder; none is needed when not given")
    parser.add_argument("--budget", type=float, help="fraction of the visual tokens that a head keeps")
    parser.add_argument("--side", type=int, default=90, help="visual tokens in a row and in a column")
    parser.add_argument("--negative", default="lowres, blurry", help="what the unconditional rows read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("emu3.png"))
    options = parser.parse_args(arguments)

    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = Emu3ForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    processor = Emu3Processor.from_pretrained(options.model)
    grid = (options.side, options.side + 1)  # an end-of-line token closes each row
    generator = generator_of(model, processor, grid)
    inputs, negative = generator.prepare([options.prompt]), generator.prepare([options.negative])

    text = model.config.text_config
    head_map = HeadMap.online(num_layers=text.num_hidden_layers, num_kv_heads=text.num_key_value_heads, grid=grid)
    if options.head_map is not None:
        head_map = HeadMap.from_pretrained(options.head_map).with_grid(grid)

    torch.manual_seed(options.seed)
    with enable(model, head_map, budget=options.budget):
        sequences = model.generate(
            **inputs,
            max_new_tokens=grid[0] * grid[1],
            prefix_allowed_tokens_fn=generator.grammar(inputs["input_ids"].shape[1]),
            guidance_scale=3.0,
            negative_prompt_ids=negative["input_ids"],
            negative_prompt_attention_mask=negative["attention_mask"],
            do_sample=True,
            top_k=2048,
        )
    generator.to_images(sequences[:, inputs["input_ids"].shape[1] :])[0].save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
