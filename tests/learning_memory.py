"""Peak memory of a training step of a learned score, for Janus-Pro's width with random weights.

    python tests/learning_memory.py --layers 2 4 8
    python tests/learning_memory.py --layers 2 4 --keep        # nothing is computed again in the backward pass

Prints the peak of all tensors but the weights and the image, what the process held at most, and the formula's bound.
"""

from __future__ import annotations

import argparse
import resource
import time
from contextlib import ExitStack
from unittest.mock import patch

import torch
from helpers.peak_bytes import PeakBytes
from helpers.tiny_checkpoint import load_example
from transformers import JanusForConditionalGeneration

from ssd_cache import HeadMap
from ssd_cache.bench.subject import TINY_TOWERS, janus_config
from ssd_cache.models import Generator, generator_of
from ssd_cache.runs.processes import Processes
from ssd_cache.training import teacher_forcing
from ssd_cache.training.learning import check_learning
from ssd_cache.training.learning_state import LearningState
from ssd_cache.training.memory import step_nbytes
from ssd_cache.training.teacher_forcing import Recording
from ssd_cache.training.trainer import Trainer, mean_attention

WIDTHS = {"1b": (2048, 5632, 16), "7b": (4096, 11008, 32), "tiny": (128, 352, 8)}
"""Hidden size, inner size of the MLP and heads."""


def make_generator(width: str, layers: int, dtype: torch.dtype, side: int = 24) -> Generator:
    """A Janus with random weights and 16,384 visual codes."""
    hidden, inner, heads = WIDTHS[width]
    config = janus_config(hidden, inner, layers, heads, vocab_size=64, length=1024, **TINY_TOWERS)
    config.vision_config.image_size = config.vision_config.patch_size * side
    config.vision_config.num_image_tokens = side**2
    torch.manual_seed(0)
    model = JanusForConditionalGeneration._from_config(config, dtype=dtype).eval()
    return generator_of(model, load_example().build_processor())


def measure_step(generator: Generator, *, num_prompt: int = 20, images: int = 1) -> tuple[int, float]:
    """Peak bytes of one step on images of random embeddings, with guidance, without weights and images; CPU seconds."""
    checkpoint, model, rows = generator.checkpoint, generator.model, 2 * images
    heads = {"num_layers": checkpoint.num_layers, "num_kv_heads": checkpoint.num_kv_heads}
    head_map = HeadMap.uniform("semantic", **heads, grid=checkpoint.grid)
    plans = check_learning(head_map, num_steps=1, learning_rate=0.02, batch_size=images)
    shape = rows, num_prompt + checkpoint.num_visual_tokens - 1, model.get_decoder().config.hidden_size
    inputs = {"inputs_embeds": torch.randn(shape, dtype=model.dtype)}
    seen = torch.ones(rows, num_prompt, dtype=torch.bool)
    recording = Recording(inputs, seen, torch.arange(rows) >= images)
    trainer = Trainer(generator, plans, 5.0, 1.0, 0.02, 1, images, Processes())
    state = LearningState.beginning(mean_attention(generator, recording, head_map, images))
    with PeakBytes([*model.parameters(), *model.buffers(), *inputs.values(), *state.tensors.values()]) as found:
        start = time.process_time()
        trainer.step(state, recording)
    return found.peak, time.process_time() - start


def call(function, *args, **kwargs):
    """Run a function and keep what its backward pass needs."""
    return function(*args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="1b")
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--side", type=int, default=24, help="rows and columns of visual tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--keep", action="store_true", help="compute nothing again in the backward pass")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    for layers in options.layers:
        generator = make_generator(options.width, layers, dtype, options.side)
        weights = sum(parameter.nbytes for parameter in generator.model.parameters())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with ExitStack() as stack:
            if options.keep:
                stack.enter_context(patch.object(teacher_forcing, "recomputed", call))
                stack.enter_context(patch.object(teacher_forcing, "BLOCK_BYTES", 1 << 62))
            peak, seconds = measure_step(generator, images=options.images)
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        bound = step_nbytes(generator.checkpoint, dtype, 2 * options.images, 20)
        print(
            f"{layers} layers, weights {weights / 1e9:.2f} GB: peak {peak / 1e9:.3f} GB, formula {bound / 1e9:.3f} GB, "
            f"process +{process / 1e9:.3f} GB, {seconds:.0f} CPU seconds",
            flush=True,
        )


if __name__ == "__main__":
    main()
