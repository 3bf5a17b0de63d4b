"""Time the first images of a process with a cache; `ssd-cache bench` warms up before it measures.

    python examples/first_images.py "ssd 20%"            # whole images, by generate
    python examples/first_images.py "ssd 20%" --steps    # only the decoder's steps, on random embeddings

Run it once for each cache, to give each its own process. The compilation time is not counted.
"""

from __future__ import annotations

import time

import torch
import typer

from ssd_cache._compat import CACHE
from ssd_cache.bench import choose_cases, load_subject
from ssd_cache.bench.roofline import synchronize


@torch.no_grad()
def main(cache: str, steps: bool = False, model: str = "small-cpu", batch_size: int = 8, device: str = "cpu") -> None:
    """Print the seconds, and the tokens per second, of BATCH_SIZE images with guidance."""
    subject = load_subject(model, torch.float32, torch.device(device))
    (case,) = choose_cases(subject.head_map, names=[cache])
    rows, number = subject.rows_per_image * batch_size, subject.head_map.num_visual_tokens - steps
    with case.running(subject):
        if case.steps:
            subject.generate(case.make_cache(subject), batch_size, 3, lambda: None)
        held = case.make_cache(subject)
        if steps:
            decoder = subject.model.get_decoder()
            prompt = torch.randn(rows, subject.num_prompt, subject.config.hidden_size, device=device)
            step = prompt[:, :1].contiguous()  # contiguous, as generate passes them, to avoid a recompilation
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=device)
            decoder(inputs_embeds=prompt, attention_mask=mask, use_cache=True, **{CACHE: held})
        synchronize(subject.model.device)
        start = time.perf_counter()
        if steps:
            for _ in range(number):
                decoder(inputs_embeds=step, use_cache=True, **{CACHE: held})
        else:
            subject.generate(held, batch_size, number, lambda: None)
        synchronize(subject.model.device)
        seconds = time.perf_counter() - start
    what = f"{number} steps" if steps else f"{batch_size} images"
    print(f"{case.name}: {what} of {rows} rows in {seconds:.1f} s, {batch_size * number / seconds:.0f} tokens/s")


if __name__ == "__main__":
    typer.run(main)
