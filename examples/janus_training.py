"""Parts that train_shapes_janus.py and train_emoji_janus.py share: processor, model, loss, optimizers, saved files.

It is imported by these scripts and is not run itself. It trains small Janus models on tokens that are known exactly,
and is not a trainer for Janus.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AttentionInterface,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from ssd_cache.models.bundled import write_checksums

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>")


def word_processor(words: Sequence[str]) -> JanusProcessor:
    """A word-level tokenizer over `words`, in Janus's own processor."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
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


def small_janus(
    processor: JanusProcessor,
    hidden_size: int,
    num_layers: int,
    num_cells: int,
    vq_config: dict[str, object],
) -> JanusForConditionalGeneration:
    """A Janus with random weights and heads of 32; its vision tower is tiny, since nothing here reads images.

    Args:
        processor: the processor, whose vocabulary sets the number of text tokens.
        hidden_size: width of the decoder of tokens, a multiple of 32.
        num_layers: its layers.
        num_cells: visual tokens of an image.
        vq_config: settings of the VQ model, without those that the decoder's width determines.
    """
    tokenizer = processor.tokenizer
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": -(-len(tokenizer) // 32) * 32,
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
            "num_image_tokens": num_cells,
        },
        vq_config=vq_config | {"projection_dim": hidden_size, "image_token_embed_dim": hidden_size},
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=True,
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        guidance_scale=1.001,  # almost none: more makes such a small model's images worse; exactly 1 fails in Janus
        temperature=1.0,
        generation_kwargs={"boi_token_id": tokenizer.boi_token_id},
    )
    return model


def encode_captions(
    processor: JanusProcessor, captions: Sequence[str], length: int, rng: random.Random, unconditional_share: float
) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """Encode captions as Janus's `generate` does, and blank a share of them, as in guidance (Ho and Salimans 2022).

    Returns:
        Prompts `[batch, length]`, mask of their visible tokens `[batch, length]`, and whether each caption is blank.
    """
    tokenizer = processor.tokenizer
    encoded = tokenizer(
        [caption + "<begin_of_image>" for caption in captions],
        padding="max_length",
        max_length=length,
        return_tensors="pt",
    )
    prompts = encoded.input_ids
    keep = (prompts == tokenizer.bos_token_id) | (prompts == tokenizer.boi_token_id)
    blank = [rng.random() < unconditional_share for _ in captions]
    prompts = prompts.masked_fill(torch.tensor(blank)[:, None] & ~keep, tokenizer.pad_token_id)
    return prompts, encoded.attention_mask.bool(), blank


def blockwise_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Causal attention in four blocks of queries; `attention_mask` is additive, `[batch, 1, length, length]`.

    No block reads the columns to its right. On a CPU with bf16 products, training with it is faster than with torch's
    own attention.
    """
    length = query.shape[2]
    block = -(-length // 4)
    query = query * scaling
    outputs = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = query[:, :, start:end] @ key[:, :, :end].transpose(2, 3)
        scores = scores + attention_mask[:, :, start:end, :end]
        outputs.append(scores.softmax(-1).to(value.dtype) @ value[:, :, :end])
    return torch.cat(outputs, 2).transpose(1, 2), None


AttentionInterface.register("blockwise", blockwise_attention)


def attention_mask(decoder, seen: torch.Tensor, length: int) -> torch.Tensor:
    """Mask of the visible ones of `length` tokens, in the format of the decoder's attention."""
    seen = F.pad(seen, (0, length - seen.shape[1]), value=True)
    if decoder.config._attn_implementation != "blockwise":
        return seen
    allowed = seen[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    return torch.zeros(allowed.shape, dtype=torch.bfloat16, device=seen.device).masked_fill_(~allowed, -1e30)


def token_losses(model, decoder, prompts, seen, images) -> torch.Tensor:
    """Cross-entropy of every visual token, in nats `[batch, cells]`."""
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
    logits = parts.generation_head(hidden[:, seen.shape[1] - 1 :]).float()
    return F.cross_entropy(logits.flatten(0, 1), images.flatten(), reduction="none").view(images.shape)


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


def trained_weights(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.nn.Parameter]:
    """All weights that the optimizers train."""
    return [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]


def train_step(
    losses: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer], trained: Sequence[torch.nn.Parameter], lr: float
) -> None:
    """One step at the learning rate `lr` on the mean of `losses`; gradients are clipped to a norm of 1."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    losses.mean().backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write through a temporary name; an interrupted run leaves the older file intact."""
    temporary = path.with_name(path.name + ".part")
    save(temporary)
    os.replace(temporary, path)


def save_state(path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """Write what a stopped run needs to go on."""
    state = {"model": model.state_dict(), "optimizers": [each.state_dict() for each in optimizers], "step": step}
    write(path, lambda place: torch.save(state, place))


def load_state(path: Path, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], device: str) -> int:
    """Load what `save_state` wrote, and return its step; 0 if there is no file."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def save_checkpoint(folder: Path, model: JanusForConditionalGeneration, processor: JanusProcessor) -> None:
    """Write the trained model in float16, its processor, and the checksums of its weights."""
    model.model.language_model.config._attn_implementation = "sdpa"
    model.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    write_checksums(folder)
