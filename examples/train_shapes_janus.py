"""Train shapes-janus, the small Janus that ssd-cache includes, from random weights.

    python examples/train_shapes_janus.py --output shapes-janus

Writes a checkpoint for `JanusForConditionalGeneration.from_pretrained` and `JanusProcessor.from_pretrained`.
Training starts on images of 8 rows, then 16, then the full 24. A low image uses as much of the prompt at a sixth of the
cost, and its rows have their final width. The model learns late which word belongs to which object. Most steps
are therefore low, and most captions hard. A stopped run resumes from `OUTPUT/training.pt` if started with the same
arguments. Use `--dtype float32` on a CPU without bf16 instructions. This is a recipe for toy data,
not a trainer for Janus.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from janus_training import (
    build_optimizers,
    encode_captions,
    load_state,
    save_checkpoint,
    save_state,
    small_janus,
    token_losses,
    train_step,
    trained_weights,
    word_processor,
)
from tqdm import tqdm
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_cache.shapes.scenes import COLORS, GRID, KINDS, NUMBERS, PALETTE, SHAPES, make_scene

PROMPT_LENGTH = 12
"""Tokens of the longest caption, with begin-of-sequence and begin-of-image; shorter ones are padded on the left."""

UNCONDITIONAL_SHARE = 0.1
"""Share of scenes with a blank caption, as in guidance (Ho and Salimans 2022)."""

EVEN = dict.fromkeys(KINDS, 1)
BINDING = {"single_object": 1, "two_object": 1, "counting": 4, "colors": 1, "position": 4, "color_attr": 4}
COUNTING = {"single_object": 1, "two_object": 1, "counting": 6, "colors": 1, "position": 4, "color_attr": 2}
"""Frequency of each kind while the model learns to generate objects, then the words of the caption, then numbers."""

WORDS = (
    *("a", "photo", "of", "and", "left", "right", "above", "below"),
    *COLORS,
    *NUMBERS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
)


def build_processor() -> JanusProcessor:
    """A word-level tokenizer over the captions' words, in Janus's own processor."""
    return word_processor(WORDS)


def build_model(
    processor: JanusProcessor, hidden_size: int = 192, num_layers: int = 6
) -> JanusForConditionalGeneration:
    """A Janus with 2.9 M trained parameters, whose VQ decoder decodes the palette."""
    vq_config = {
        "embed_dim": 32,
        "num_embeddings": len(PALETTE),
        "latent_channels": 64,
        "base_channels": 64,
        "channel_multiplier": [1, 1, 1, 1, 1],
        "num_res_blocks": 0,
    }
    model = small_janus(processor, hidden_size, num_layers, GRID[0] * GRID[1], vq_config)
    set_palette_decoder(model, processor)
    return model


@torch.no_grad()
def set_palette_decoder(model: JanusForConditionalGeneration, processor: JanusProcessor) -> None:
    """Set the VQ decoder's weights to decode each token to a 16 x 16 square of its palette colour, exactly.

    Nothing is trained. The channel pair (2 t, 2 t + 1) holds +-1 and its negative, and says whether the cell is token
    t. Such a pair has mean 0 and variance 1 at every position, and group normalisation leaves it unchanged. Because
    swish(x) - swish(-x) = x, the last convolution is a plain table of colours.
    """
    vqmodel = model.model.vqmodel
    decoder, num_tokens = vqmodel.decoder, len(PALETTE)

    def center(conv: torch.nn.Conv2d, weight: torch.Tensor) -> None:
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = weight

    vqmodel.quantize.embedding.weight.copy_(torch.eye(num_tokens, 32))
    to_pairs = torch.zeros(64, 32)
    for token in range(num_tokens):
        to_pairs[2 * token, token], to_pairs[2 * token + 1, token] = 2, -2
    center(vqmodel.post_quant_conv, to_pairs)
    signs = torch.tensor([-1.0, 1.0]).repeat(num_tokens)
    vqmodel.post_quant_conv.bias[: 2 * num_tokens] = signs
    center(decoder.conv_in, torch.eye(64))
    for name, module in decoder.named_modules():
        if name.endswith(("conv2", "proj_out")):  # the residual branches add zero
            center(module, torch.zeros(64, 64))
        if name.endswith("upsample.conv"):
            center(module, torch.eye(64))
    image_processor = processor.image_processor
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    # add half a level, since the image processor truncates decimals
    colors = ((torch.tensor(PALETTE) + 0.5) / 255 - mean) / std  # [tokens, 3]
    to_rgb = torch.zeros(3, 64)
    to_rgb[:, 0 : 2 * num_tokens : 2], to_rgb[:, 1 : 2 * num_tokens : 2] = colors.T / 2, -colors.T / 2
    center(decoder.conv_out, to_rgb)
    decoder.conv_out.bias.copy_(colors.sum(0) / 2)


@dataclass(frozen=True)
class Step:
    """Settings of one training step: height, number and kinds of the images, and the learning rate."""

    rows: int
    batch_size: int
    lr_factor: float
    shares: dict[str, int]


def schedule(draw: int, bind: int, middle: int, full: int, count: int, rounds: int, batch_size: int) -> list[Step]:
    """Learn objects, then which word belongs to which object, on low images; grow to the full height; learn to count.

    The learning rate rises for 100 steps, stays constant, and falls to zero over the last three quarters of the full
    images. Low images have no room for four objects and cannot teach counting. Counting has rounds of its own; in each,
    the rate restarts at a half and falls to zero.
    """
    low = [Step(8, 2 * batch_size, min(1.0, (step + 1) / 100), EVEN) for step in range(draw)]
    low += [Step(8, 2 * batch_size, 1.0, BINDING)] * bind
    grown = [Step(16, batch_size, 1.0, BINDING)] * middle
    falling = max(1, full * 3 // 4)
    grown += [Step(24, batch_size, min(1.0, (full - step) / falling), BINDING) for step in range(full)]
    counted = [Step(24, batch_size, 0.5 * (count - step) / count, COUNTING) for step in range(count)]
    return low + grown + counted * rounds


def make_batch(processor: JanusProcessor, batch_size: int, rows: int, seed: str, shares: dict[str, int]):
    """Prompts `[batch, 12]`, mask of their visible tokens `[batch, 12]`, visual tokens `[batch, rows * 24]`, kinds.

    A scene whose caption is blanked has the kind "unconditional".
    """
    rng = random.Random(seed)
    kinds = (
        [None] * batch_size if shares is EVEN else rng.choices(KINDS, [shares[kind] for kind in KINDS], k=batch_size)
    )
    scenes = [make_scene(rng, kind, rows) for kind in kinds]
    captions = [scene.caption for scene in scenes]
    prompts, seen, blank = encode_captions(processor, captions, PROMPT_LENGTH, rng, UNCONDITIONAL_SHARE)
    shown = ["unconditional" if alone else scene.kind for scene, alone in zip(scenes, blank, strict=True)]
    return prompts, seen, torch.stack([torch.from_numpy(scene.tokens) for scene in scenes]), shown


def main(
    output: Path = Path("shapes-janus"),
    start: Path | None = None,
    draw_steps: int = 500,
    bind_steps: int = 2700,
    middle_steps: int = 900,
    full_steps: int = 1700,
    count_steps: int = 700,
    count_rounds: int = 2,
    batch_size: int = 16,
    lr: float = 4e-3,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "bfloat16",
    compiled: bool = True,
    save_every: int = 200,
    hidden_size: int = 192,
    num_layers: int = 6,
) -> None:
    """Train shapes-janus, from random weights or from those in START, and write it to OUTPUT."""
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model = build_model(processor, hidden_size, num_layers).to(device)
    decoder = model.model.language_model
    if start is not None:
        model.load_state_dict(JanusForConditionalGeneration.from_pretrained(start).state_dict())
    decoder.config._attn_implementation = "blockwise" if dtype == "bfloat16" else "sdpa"
    optimizers = build_optimizers(model, lr, getattr(torch, dtype))
    trained = trained_weights(optimizers)
    forward = torch.compile(decoder, dynamic=False) if compiled else decoder

    steps = schedule(draw_steps, bind_steps, middle_steps, full_steps, count_steps, count_rounds, batch_size)
    state_file = output / "training.pt"
    step = load_state(state_file, model, optimizers, device)

    nats, started = defaultdict(list), time.time()
    with tqdm(total=len(steps), initial=step, unit="step", smoothing=0.02) as progress:
        while step < len(steps):
            now = steps[step]
            *batch, kinds = make_batch(processor, now.batch_size, now.rows, f"{seed}-{step}", now.shares)
            with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
                losses = token_losses(model, forward, *(part.to(device) for part in batch))
            train_step(losses, optimizers, trained, lr * now.lr_factor)
            step += 1
            progress.update()
            for kind, loss in zip(kinds, losses.sum(1).tolist(), strict=True):
                nats[kind].append(loss)
            if step % 50 == 0:
                means = " ".join(f"{kind} {sum(nats[kind]) / len(nats[kind]):.2f}" for kind in sorted(nats))
                nats.clear()
                with open(output / "training.log", "a") as log:
                    log.write(f"step {step} rows {now.rows} seconds {time.time() - started:.0f} nats: {means}\n")
            if step % save_every == 0 or step == len(steps):
                save_state(state_file, model, optimizers, step)

    save_checkpoint(output, model, processor)
    typer.echo(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
