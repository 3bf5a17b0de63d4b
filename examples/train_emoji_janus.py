"""Train emoji-janus, a small Janus that generates emoji from captions, from random weights.

    python examples/train_emoji_janus.py tokens --output emoji-janus
    python examples/train_emoji_janus.py pixels emoji-data/icons_144.npy --output emoji-janus
    python examples/train_emoji_janus.py export --output emoji-janus

`tokens` trains the decoder of visual tokens at a constant rate; `--steps` and `--decay-steps` end it with a decay.
`pixels` trains the VQ decoder, from tokens to 96 x 96 pixels, on icons that prepare_emoji_data.py wrote. Both resume
from OUTPUT if started again, also with other numbers of steps. `export` writes the folder OUTPUT/checkpoint for
`from_pretrained`, which is complete: copied to src/ssd_cache/emoji/checkpoint, it is the model of the package.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
from transformers import JanusForConditionalGeneration, JanusProcessor

from ssd_cache.emoji.captions import (
    BACKGROUNDS,
    COMBINATIONS,
    PROMPT_LENGTH,
    STYLES,
    SUBJECTS,
    TRAINED,
    WORDS,
    make_caption,
)
from ssd_cache.emoji.icons import BACKGROUND_RGB, CELL, GRID, ICON_SIDE, load_icons, make_image, place
from ssd_cache.evaluation.exact import EMOJI
from ssd_cache.preparing.stages import NUM_CHECKED
from ssd_cache.prompts import PROMPTS_FILE

UNCONDITIONAL_SHARE = 0.05
"""Share of images with a blank caption, as in guidance (Ho and Salimans 2022)."""
TEMPERATURE = 0.5
"""Of sampling: on 200 images of other captions .89 are correct at 0.4, .88 at 0.5, .85 at 0.6, .81 at 0.7, .65 at 1."""

LOW_ROWS = 20
"""Height in cells of the first images. A low image costs less, and has the icon's full size."""

FIRST_TOKENS, FIRST_WEIGHT = 30, 10
"""Weight in the loss of each icon's first tokens. They decide subject and style, which the caption names, and the
later tokens follow from them. With equal weights, 2,300 steps did not learn to read the style from the caption."""

TOP_ROWS, TOP_FACTOR = 6, 4
"""Batches of `top_batches` hold only the top rows of low images, and so more of them: they decide which icon it is."""

WARMUP = 100
"""Steps over which the learning rate rises."""

PIXELS, RENDERED = 4, 8
"""Side of a cell in pixels in a decoded image, and in the file of rendered icons."""

app = typer.Typer(add_completion=False)


def build_processor() -> JanusProcessor:
    """A word-level tokenizer over the captions' words, in Janus's own processor; decoded pixels are from -1 to 1."""
    processor = word_processor(WORDS)
    processor.image_processor.image_mean = processor.image_processor.image_std = [0.5, 0.5, 0.5]
    return processor


def build_model(
    processor: JanusProcessor, hidden_size: int = 192, num_layers: int = 6
) -> JanusForConditionalGeneration:
    """A Janus with 3.3 M weights for tokens, and a VQ decoder that enlarges 24 x 24 tokens to 96 x 96 pixels."""
    vq_config = {
        "embed_dim": CELL * CELL * 4,
        "num_embeddings": load_icons().num_tokens,
        "latent_channels": 64,
        "base_channels": 32,
        "channel_multiplier": [3, 2, 2],
        "num_res_blocks": 0,
    }
    model = small_janus(processor, hidden_size, num_layers, GRID[0] * GRID[1], vq_config)
    model.generation_config.temperature = TEMPERATURE
    set_codebook(model)
    set_references(model)
    return model


@torch.no_grad()
def set_codebook(model: JanusForConditionalGeneration) -> None:
    """Start the VQ model's codebook with the RGBA values of every token's cell, from -1 to 1."""
    flat = np.concatenate([BACKGROUND_RGB, np.ones((len(BACKGROUNDS), 1), dtype=np.float32)], 1)
    flat = np.broadcast_to(flat[:, None, None], (len(BACKGROUNDS), CELL, CELL, 4))
    cells = np.concatenate([flat, load_icons().codes]).reshape(-1, CELL * CELL * 4)
    model.model.vqmodel.quantize.embedding.weight.copy_(torch.from_numpy(2 * cells - 1))


@torch.no_grad()
def set_references(model: JanusForConditionalGeneration) -> None:
    """Let the VQ decoder's last normalization see the colours of a whole image.

    Each of its 32 groups has three channels, and it removes a group's mean and scale. Two channels start as the
    constants 2 and -2, so that mean and scale of the third one remain visible. With one channel in a group, a
    background's colour was not learned in 350 steps.
    """
    vqmodel = model.model.vqmodel
    vqmodel.post_quant_conv.weight.mul_(8)  # the VQ model scales codes to a norm of 1, so numbers to about 1/8
    block = vqmodel.decoder.up[-1].block[-1]
    for sign, first in ((1, 1), (-1, 2)):
        for layer, value in ((block.nin_shortcut, 2.0 * sign), (block.conv2, 0.0)):
            layer.weight[first::3] = 0.0
            layer.bias[first::3] = value


def make_batch(processor: JanusProcessor, batch_size: int, rows: int, seed: str):
    """Prompts `[batch, 16]`, mask of their visible tokens `[batch, 16]`, visual tokens `[batch, rows * 24]`."""
    rng = random.Random(seed)
    combinations = [rng.choice(TRAINED) for _ in range(batch_size)]
    captions = [make_caption(rng, combination)[1] for combination in combinations]
    images = np.stack([make_image(rng, combination, rows).reshape(-1) for combination in combinations])
    prompts, seen, _ = encode_captions(processor, captions, PROMPT_LENGTH, rng, UNCONDITIONAL_SHARE)
    return prompts, seen, torch.from_numpy(images)


def token_weights(images: torch.Tensor) -> torch.Tensor:
    """Weights of visual tokens `[batch, cells]` in the loss; their mean is 1."""
    is_icon = images >= len(BACKGROUNDS)
    is_first = is_icon & (is_icon.cumsum(1) <= FIRST_TOKENS)
    weights = 1 + (FIRST_WEIGHT - 1) * is_first.float()
    return weights / weights.mean()


def lr_factor(step: int, steps: int, decay_steps: int) -> float:
    """Linear warm-up, a constant rate, and a linear decay to zero over the last `decay_steps`."""
    rising = min(1.0, (step + 1) / WARMUP)
    return rising if decay_steps == 0 else min(rising, (steps - step) / decay_steps)


class Clock:
    """Says when to save, and writes lines with the time to a log file."""

    def __init__(self, log: Path, save_seconds: float):
        self.log, self.save_seconds = log, save_seconds
        self.started = self.saved = time.monotonic()

    def is_time_to_save(self) -> bool:
        now = time.monotonic()
        if now - self.saved < self.save_seconds:
            return False
        self.saved = now
        return True

    def write(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{line} seconds {time.monotonic() - self.started:.0f}\n")


@app.command()
def tokens(
    output: Path = Path("emoji-janus"),
    steps: int = 1_000_000,
    low_steps: int = 1500,
    decay_steps: int = 0,
    top_batches: int = 1,
    batch_size: int = 8,
    lr: float = 3e-3,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "bfloat16",
    save_seconds: float = 300,
    hidden_size: int = 192,
    num_layers: int = 6,
) -> None:
    """Train the decoder of visual tokens; its state is OUTPUT/training.pt, its log OUTPUT/training.log.

    After each batch of whole images come `top_batches` of their top rows alone.
    """
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model = build_model(processor, hidden_size, num_layers).to(device)
    decoder = model.model.language_model
    decoder.config._attn_implementation = "blockwise" if dtype == "bfloat16" else "sdpa"
    optimizers = build_optimizers(model, lr, getattr(torch, dtype))
    trained = trained_weights(optimizers)
    state_file = output / "training.pt"
    step = load_state(state_file, model, optimizers, device)
    clock, image_nats, icon_nats = Clock(output / "training.log", save_seconds), [], []
    while step < steps:
        only_top = step % (1 + top_batches) > 0
        rows = LOW_ROWS if step < low_steps or only_top else GRID[0]
        size = TOP_FACTOR * batch_size if only_top else batch_size
        prompts, seen, images = make_batch(processor, size, rows, f"{seed}-{step}")
        batch = [part.to(device) for part in (prompts, seen, images[:, : TOP_ROWS * GRID[1]] if only_top else images)]
        with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
            losses = token_losses(model, decoder, *batch)
        rate = lr * lr_factor(step, steps, decay_steps)
        train_step(losses * token_weights(batch[-1]), optimizers, trained, rate)
        step += 1
        if not only_top:
            image_nats.append(losses.sum(1).mean().item())
            icon_nats.append(losses[batch[-1] >= len(BACKGROUNDS)].mean().item())
        if step % 50 == 0:
            nats = f"nats: image {np.mean(image_nats):.1f} icon token {np.mean(icon_nats):.3f}"
            clock.write(f"step {step} lr {rate:.2g} {nats}")
            image_nats.clear(), icon_nats.clear()
        if clock.is_time_to_save() or step == steps:
            save_state(state_file, model, optimizers, step)


def read_rendered(path: Path) -> np.ndarray:
    """The icons that prepare_emoji_data.py rendered, in the size of decoded images: premultiplied RGBA, 0 to 255."""
    rgba = np.load(path)
    expected = (len(SUBJECTS), len(STYLES), ICON_SIDE * RENDERED, ICON_SIDE * RENDERED, 4)
    if rgba.shape != expected:
        raise typer.BadParameter(f"{path} holds {rgba.shape}; expected {expected}, as prepare_emoji_data.py writes")
    side, ratio = ICON_SIDE * PIXELS, RENDERED // PIXELS
    return rgba.reshape(*expected[:2], side, ratio, side, ratio, 4).mean((3, 5))


def make_images(rng: random.Random, icons: np.ndarray, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[batch, 576]` and the images that they stand for, RGB in [-1, 1], `[batch, 3, 96, 96]`."""
    grids, codes, images = load_icons().grids, [], []
    for _ in range(batch_size):
        subject, style, background = rng.choice(COMBINATIONS)
        number = tuple(SUBJECTS).index(subject), STYLES.index(style)
        flip, color = rng.randrange(2), tuple(BACKGROUNDS).index(background)
        row, column = (rng.randrange(side - ICON_SIDE + 1) for side in GRID)
        codes.append(place(grids[(*number, flip)], color, row, column).reshape(-1))
        rgba = icons[number].astype(np.float32) / 255
        rgba = rgba[:, ::-1] if flip else rgba
        image = np.broadcast_to(BACKGROUND_RGB[color], (GRID[0] * PIXELS, GRID[1] * PIXELS, 3)).copy()
        part = image[row * PIXELS :, column * PIXELS :][: ICON_SIDE * PIXELS, : ICON_SIDE * PIXELS]
        part[:] = rgba[..., :3] + part * (1 - rgba[..., 3:])
        images.append(2 * image.transpose(2, 0, 1) - 1)
    return torch.from_numpy(np.stack(codes)), torch.from_numpy(np.stack(images))


@app.command()
def pixels(
    icons: Path,
    output: Path = Path("emoji-janus"),
    steps: int = 4000,
    decay_steps: int = 2000,
    batch_size: int = 4,
    lr: float = 2e-3,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "bfloat16",
    save_seconds: float = 300,
) -> None:
    """Train the VQ decoder on ICONS (icons_144.npy); its state is OUTPUT/pixels.pt, its log OUTPUT/pixels.log."""
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    rgba = read_rendered(icons)
    vqmodel = build_model(build_processor()).model.vqmodel.to(device)
    vqmodel.encoder = vqmodel.quant_conv = None  # not trained: nothing here reads images
    optimizers = [torch.optim.AdamW(vqmodel.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]
    trained = trained_weights(optimizers)
    state_file = output / "pixels.pt"
    step = load_state(state_file, vqmodel, optimizers, device)
    clock, errors = Clock(output / "pixels.log", save_seconds), []
    while step < steps:
        codes, images = (part.to(device) for part in make_images(random.Random(f"{seed}-{step}"), rgba, batch_size))
        with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
            decoded = vqmodel.decode(codes).float()
        losses = F.l1_loss(decoded, images, reduction="none") + F.mse_loss(decoded, images, reduction="none")
        rate = lr * lr_factor(step, steps, decay_steps)
        train_step(losses, optimizers, trained, rate)
        step += 1
        errors.append(F.mse_loss(decoded.detach(), images).item() / 4)  # of RGB in [0, 1]
        if step % 50 == 0:
            clock.write(f"step {step} lr {rate:.2g} PSNR {-10 * np.log10(np.mean(errors)):.2f}")
            errors.clear()
        if clock.is_time_to_save() or step == steps:
            save_state(state_file, vqmodel, optimizers, step)


def own_prompts() -> list[str]:
    """600 captions to measure the model by; the last ones, on which `prepare` checks a map, are of held-out images."""
    prompts = EMOJI.prompts(150, seed=777)
    trained = [caption for kind, caption in prompts if kind != "unseen"]
    held_out = [caption for kind, caption in prompts if kind == "unseen"]
    return trained[: 600 - NUM_CHECKED] + held_out[:NUM_CHECKED]


@app.command()
def export(output: Path = Path("emoji-janus"), hidden_size: int = 192, num_layers: int = 6) -> None:
    """Write OUTPUT/checkpoint in float16, from OUTPUT's training.pt and, if it exists, pixels.pt."""
    processor = build_processor()
    model = build_model(processor, hidden_size, num_layers)
    model.load_state_dict(torch.load(output / "training.pt", map_location="cpu", weights_only=True)["model"])
    if (output / "pixels.pt").exists():
        state = torch.load(output / "pixels.pt", map_location="cpu", weights_only=True)["model"]
        model.model.vqmodel.load_state_dict(state, strict=False)  # without the encoder
    folder = output / "checkpoint"
    save_checkpoint(folder, model, processor)
    (folder / PROMPTS_FILE).write_text("".join(f"{prompt}\n" for prompt in own_prompts()), "utf-8")
    typer.echo(f"wrote {folder}")


if __name__ == "__main__":
    app()
