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

import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from ssd_cache.shapes.scenes import COLORS, GRID, KINDS, NUMBERS, PALETTE, SHAPES, make_scene

PROMPT_LENGTH = 12
"""Tokens of the longest caption, with begin-of-sequence and begin-of-image; shorter ones are padded on the left."""

UNCONDITIONAL_SHARE = 0.1
"""Share of scenes with a blank caption, as in guidance (Ho and Salimans 2022)."""

EVEN = dict.fromkeys(KINDS, 1)
BINDING = {"single_object": 1, "two_object": 1, "counting": 4, "colors": 1, "position": 4, "color_attr": 4}
COUNTING = {"single_object": 1, "two_object": 1, "counting": 6, "colors": 1, "position": 4, "color_attr": 2}
"""Frequency of each kind while the model learns to generate objects, then the words of the caption, then numbers."""

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>")
WORDS = (
    *("a", "photo", "of", "and", "left", "right", "above", "below"),
    *COLORS,
    *NUMBERS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
)


def build_processor() -> JanusProcessor:
    """A word-level tokenizer over the captions' words, in Janus's own processor."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_placeholder>",
        },
    )
    return JanusProcessor(JanusImageProcessorPil(), tokenizer)


def build_model(
    processor: JanusProcessor, hidden_size: int = 192, num_layers: int = 6
) -> JanusForConditionalGeneration:
    """A Janus with 2.9 M trained parameters; its vision tower is tiny, since nothing here reads images."""
    tokenizer = processor.tokenizer
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 32,
            "num_key_value_heads": hidden_size // 32,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "mlp_ratio": 1.0,
            "projection_dim": hidden_size,
            "depth": 1,
            "image_size": 384,
            "patch_size": 16,
            "num_image_tokens": GRID[0] * GRID[1],
        },
        vq_config={
            "embed_dim": 32,
            "num_embeddings": len(PALETTE),
            "latent_channels": 64,
            "base_channels": 64,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 0,
            "projection_dim": hidden_size,
            "image_token_embed_dim": hidden_size,
        },
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=True,
    )
    model = JanusForConditionalGeneration(config)
    set_palette_decoder(model, processor)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        guidance_scale=1.001,  # almost none: more makes this small model's images worse; exactly 1 fails in Janus
        temperature=1.0,
        generation_kwargs={"boi_token_id": tokenizer.boi_token_id},
    )
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
    tokenizer = processor.tokenizer
    kinds = (
        [None] * batch_size if shares is EVEN else rng.choices(KINDS, [shares[kind] for kind in KINDS], k=batch_size)
    )
    scenes = [make_scene(rng, kind, rows) for kind in kinds]
    encoded = tokenizer(
        [scene.caption + "<begin_of_image>" for scene in scenes],
        padding="max_length",
        max_length=PROMPT_LENGTH,
        return_tensors="pt",
    )
    prompts, seen = encoded.input_ids, encoded.attention_mask.bool()
    keep = (prompts == tokenizer.bos_token_id) | (prompts == tokenizer.boi_token_id)
    blank = torch.tensor([rng.random() < UNCONDITIONAL_SHARE for _ in scenes])[:, None]
    prompts = prompts.masked_fill(blank & ~keep, tokenizer.pad_token_id)
    shown = ["unconditional" if alone else scene.kind for scene, alone in zip(scenes, blank[:, 0], strict=True)]
    return prompts, seen, torch.stack([torch.from_numpy(scene.tokens) for scene in scenes]), shown


def blockwise_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Causal attention in three blocks of queries; `attention_mask` is an additive row `[batch, 1, 1, length]`.

    On a CPU with bf16 products, training with it is a third faster than with torch's own attention.
    """
    length = query.shape[2]
    block = -(-length // 3)
    above = torch.ones(block, block, dtype=torch.bool, device=query.device).triu(1)
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = (query[:, :, start:end] * scaling) @ key[:, :, :end].transpose(2, 3)
        hidden = F.pad(above[: end - start, : end - start], (start, 0))
        scores = (scores.float() + attention_mask[..., :end]).masked_fill(hidden, -1e30)
        outputs.append(scores.softmax(-1).to(value.dtype) @ value[:, :, :end])
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register("blockwise", blockwise_attention)


def attention_mask(decoder, seen: torch.Tensor, length: int) -> torch.Tensor:
    """Mask of the visible ones of `length` tokens, in the format of the decoder's attention."""
    seen = F.pad(seen, (0, length - seen.shape[1]), value=True)
    if decoder.config._attn_implementation != "blockwise":
        return seen
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -1e30)[:, None, None]


def loss_of(model, decoder, prompts, seen, images) -> torch.Tensor:
    """Cross-entropy of every image, in nats `[batch]`; the part that its caption does not determine cannot vanish."""
    parts = model.model
    inputs = torch.cat(
        [
            parts.language_model.embed_tokens(prompts),
            parts.generation_aligner(parts.generation_embeddings(images[:, :-1])),
        ],
        dim=1,
    )
    mask = attention_mask(parts.language_model, seen, inputs.shape[1])
    hidden = decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    logits = parts.generation_head(hidden[:, seen.shape[1] - 1 :])
    return F.cross_entropy(logits.float().transpose(1, 2), images, reduction="none").sum(1)


class Muon(torch.optim.Optimizer):
    """torch's Muon (Jordan 2024), with the step size of AdamW (Liu et al. 2025) and products in a given `dtype`.

    torch's own always multiplies in bf16. A CPU without bf16 instructions emulates it at a twentieth of the speed.
    """

    def __init__(self, matrices, lr: float, weight_decay: float, dtype: torch.dtype, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                gradient, state = weight.grad, self.state[weight]
                mean = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = self._orthogonalize(gradient.lerp(mean, group["momentum"]))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-0.2 * group["lr"] * max(weight.shape) ** 0.5)

    def _orthogonalize(self, matrix: torch.Tensor) -> torch.Tensor:
        """The nearest matrix with singular values of about 1, by five steps of a Newton-Schulz iteration."""
        is_tall = matrix.shape[0] > matrix.shape[1]
        near = (matrix.T if is_tall else matrix).to(self.dtype)
        near = near / near.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = near @ near.T
            near = torch.addmm(near, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), near, beta=3.4445)
        return near.T if is_tall else near


def build_optimizers(
    model: JanusForConditionalGeneration, lr: float, dtype: torch.dtype = torch.bfloat16
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder's layers, AdamW for everything else that is trained."""
    parts = model.model
    matrices = [weight for weight in parts.language_model.layers.parameters() if weight.ndim == 2]
    rest = [weight for weight in parts.language_model.parameters() if all(weight is not other for other in matrices)]
    for module in (parts.generation_embeddings, parts.generation_aligner, parts.generation_head):
        rest += list(module.parameters())
    return [
        Muon(matrices, lr=lr, weight_decay=0.01, dtype=dtype),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def write(path: Path, save) -> None:
    """Write through a temporary name; an interrupted run leaves the older file intact."""
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    os.replace(temporary, path)


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
    trained = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    forward = torch.compile(decoder, dynamic=False) if compiled else decoder

    steps = schedule(draw_steps, bind_steps, middle_steps, full_steps, count_steps, count_rounds, batch_size)
    step, state_file = 0, output / "training.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
        write(state_file, lambda path: torch.save(state, path))

    nats, started = defaultdict(list), time.time()
    with tqdm(total=len(steps), initial=step, unit="step", smoothing=0.02) as progress:
        while step < len(steps):
            now = steps[step]
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * now.lr_factor
            *batch, kinds = make_batch(processor, now.batch_size, now.rows, f"{seed}-{step}", now.shares)
            with torch.autocast(torch.device(device).type, getattr(torch, dtype), enabled=dtype != "float32"):
                losses = loss_of(model, forward, *(part.to(device) for part in batch))
            (losses.mean() / (now.rows * GRID[1])).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            progress.update()
            for kind, loss in zip(kinds, losses.tolist(), strict=True):
                nats[kind].append(loss)
            if step % 50 == 0:
                means = " ".join(f"{kind} {sum(nats[kind]) / len(nats[kind]):.2f}" for kind in sorted(nats))
                nats.clear()
                with open(output / "training.log", "a") as log:
                    log.write(f"step {step} rows {now.rows} seconds {time.time() - started:.0f} nats: {means}\n")
            if step % save_every == 0 or step == len(steps):
                save()

    decoder.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(output)
    processor.save_pretrained(output)
    typer.echo(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
