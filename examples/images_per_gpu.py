"""How many images fit on a GPU at once, with the full cache and with an SSDCache?

    python examples/images_per_gpu.py --model deepseek-community/Janus-Pro-1B --memory 24

It counts, from the configuration alone, the weights and the K and V of an image's rows. It does not count activations
or torch's own reserve. The results are therefore upper bounds. With `--device cuda` it also measures the number by
generating with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import typer
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from ssd_cache import HeadMap, SSDCache
from ssd_cache.models import Checkpoint, find_generator, resolve_device, resolve_dtype

PROMPT = 32
"""Tokens of a prompt of about one sentence, including the chat template."""


@dataclass(frozen=True)
class Need:
    """Bytes of the weights, and bytes of K and V per image, at its last token."""

    weights: int
    image: int

    def images(self, memory: float) -> int:
        """How many images fit into that many bytes."""
        return max(0, int((memory - self.weights) // self.image))


def build(checkpoint: Checkpoint, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint's model with random weights; on "meta" it takes no memory."""
    with torch.device(device):
        model = AutoModelForMultimodalLM.from_config(checkpoint.config, dtype=dtype)
    model.set_attn_implementation({"text_config": "ssd"})
    return model.eval()


def need(checkpoint: Checkpoint, cache: SSDCache, dtype: torch.dtype, rows: int, num_prompt: int = PROMPT) -> Need:
    """Compute it from the configuration; an image takes `rows` rows of the batch, 2 with guidance."""
    config = checkpoint.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cells = cache.head_map.num_visual_tokens
    tokens = sum(num_prompt + min(slots, cells) for layer in cache.layers for slots in layer.plan.num_slots)
    weights = sum(weight.nbytes for weight in build(checkpoint, "meta", dtype).parameters())
    return Need(weights, rows * tokens * 2 * head_dim * dtype.itemsize)


def largest(generate: Callable[[int], object], start: int = 1) -> int:
    """Largest number of images generated at once, 0 for none: doubles until memory runs out, then bisects."""

    def fits(number: int) -> bool:
        try:
            generate(number)
        except torch.OutOfMemoryError:
            return False
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return True

    low, high = 0, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main(
    model: str = "shapes-janus",
    budget: float = 0.2,
    head_map: str | None = None,
    memory: float = 24.0,
    rows: int = 2,
    dtype: str = "bfloat16",
    device: str = "cpu",
) -> None:
    """Print how many images fit into MEMORY gigabytes (10^9 bytes), and how many really fit in all memory of a GPU."""
    checkpoint, kind = find_generator(model), resolve_dtype(dtype)
    if head_map is None:  # the counts depend only on the budget
        shape = {"num_layers": checkpoint.num_layers, "num_kv_heads": checkpoint.num_kv_heads}
        labels = HeadMap.uniform("semantic", **shape).with_layout(checkpoint.layout)
    else:
        labels = HeadMap.from_pretrained(head_map)
        checkpoint.check_head_map(labels)
    budgets = {"full": 1.0, f"{budget:.0%}": budget}
    print(f"{model}, {dtype}, {rows} rows per image, prompts of {PROMPT} tokens, {memory:g} GB")
    for name, share in budgets.items():
        bytes_of = need(checkpoint, SSDCache(labels, share), kind, rows)
        print(
            f"{name:>6}: weights {bytes_of.weights / 1e9:.2f} GB, an image {bytes_of.image / 1e6:.1f} MB, "
            f"at most {bytes_of.images(1e9 * memory)} images at once"
        )
    where = resolve_device(device)
    if where.type != "cuda":
        return
    janus, cells = build(checkpoint, where, kind), checkpoint.num_visual_tokens
    total = torch.cuda.get_device_properties(where).total_memory
    print(f"measured by generating, on {torch.cuda.get_device_name(where)} with {total / 1e9:.0f} GB:")
    for name, share in budgets.items():

        def generate(number: int, share: float = share) -> None:
            cache = SSDCache(labels, share)  # `reset` would keep the memory of an earlier number
            prompts = torch.randint(10, 100, (number, PROMPT), device=where)
            janus.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_mode="image",
                **cache.as_kwargs(),
                guidance_scale=5.0,
                do_sample=True,
                generation_kwargs={"boi_token_id": int(prompts[0, -1])},
            )

        print(f"{name:>6}: {largest(generate)} images of {cells} tokens at once")


if __name__ == "__main__":
    typer.run(main)
