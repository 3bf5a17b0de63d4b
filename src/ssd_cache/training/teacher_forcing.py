"""Recordings: images generated with a full cache, fed to the decoder again, all tokens at once and with gradients.

This module runs the decoder with an attention function given by the caller, and bounds the memory of the backward pass:
every layer, and within it every block of attention weights, is computed again there instead of being kept.
`recording.py` makes recordings; nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.models import Generator
from ssd_cache.runs.metering import large_blocks_mapped
from ssd_cache.training.likelihood import kl_divergence, log_probabilities

NAME = "ssd-training"

BLOCK_BYTES = 1 << 26
"""Bytes of a float32 tensor of attention weights or of log-probabilities; larger ones are computed in blocks."""

WeighBlock = Callable[..., torch.Tensor]
"""A function that computes the attention weights of a block of queries, of the shape of the logits.

Its arguments are the logits `[rows, kv_heads, groups, queries, tokens]`, float32, minus infinity where a full cache
masks a token; the numbers of the visual tokens among the queries, which are the last ones of the block; and the tensors
that came with the function.
"""

Weigh = Callable[[int, torch.Tensor, torch.Tensor], tuple[WeighBlock, Sequence[torch.Tensor]]]
"""A function from a layer's index, and K and V of the visual tokens `[rows, kv_heads, visual tokens, head_dim]`, to the
function that computes the layer's attention weights, and the tensors that it needs.

The function itself must not hold these tensors: `recomputed` keeps a function of every layer until the backward pass,
but not its arguments.
"""


@dataclass(frozen=True)
class Recording:
    """The decoder inputs of some images, prompts included, in the memory of the CPU.

    Attributes:
        inputs: the decoder's inputs, `[rows, num_prompt + cells - 1, ...]` each: token ids or embeddings, positions.
        seen: `[rows, num_prompt]`, False on padding.
        is_unconditional: `[rows]`, True for guidance's rows without a prompt, which are in the order of the others.
    """

    inputs: dict[str, torch.Tensor]
    seen: torch.Tensor
    is_unconditional: torch.Tensor

    def split(self, num_images: int) -> list[Recording]:
        """Recordings of this many images each, with their unconditional rows; the last may be smaller."""
        return [self.of_rows(rows) for rows in self.parts(num_images)]

    def parts(self, num_images: int) -> list[torch.Tensor]:
        """The numbers of the rows of each recording that `split` makes, `[rows]`."""
        kinds = [kind.nonzero()[:, 0].split(num_images) for kind in (~self.is_unconditional, self.is_unconditional)]
        return [torch.cat(rows) for rows in zip_longest(*kinds, fillvalue=kinds[1][0][:0])]

    def conditional(self) -> Recording:
        """The recording without unconditional rows, for a guidance scale at which they have no effect."""
        return self.of_rows((~self.is_unconditional).nonzero()[:, 0])

    def of_rows(self, rows: torch.Tensor) -> Recording:
        """A copy of some rows, given by their numbers, `[rows]`."""
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return Recording(inputs, self.seen[rows], self.is_unconditional[rows])


def attend_recording(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' attention function for the name "ssd-training"; works only inside `teacher_forced`."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.ssd_attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


@contextmanager
def teacher_forced(generator: Generator, recording: Recording) -> Iterator[Callable[[Weigh], torch.Tensor]]:
    """Inside the block, the decoder can be run on a recording with other attention weights.

    The function that the block gets runs it with the weights of a `Weigh`. It returns the states from which the head
    predicts each visual token, `[rows, cells, hidden_size]`. Model parameters require no gradients.

    With gradients, it keeps the input of each layer, `[rows, tokens, hidden_size]` in the model's dtype. The backward
    pass runs each layer again, and must also be inside the block, before the decoder is run again.
    """
    device, num_prompt = generator.model.device, recording.seen.shape[1]
    masked = ~_allowed_tokens(recording).to(device)
    inputs = {name: tensor.to(device) for name, tensor in recording.inputs.items()}
    decoder = generator.language_model.get_decoder()

    def attend(weigh: Weigh, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling):
        weigh_block, tensors = weigh(layer_idx, key[:, :, num_prompt:], value[:, :, num_prompt:])
        query = query.unflatten(1, (key.shape[1], -1)) * scaling
        length = query.shape[-2]
        nbytes = query[..., 0].numel() * length * torch.float32.itemsize
        blocks = in_blocks(partial(attend_block, weigh_block), length, nbytes, query, key, value, *tensors)
        return torch.cat(blocks, -2).flatten(1, 2)

    def attend_block(weigh_block: WeighBlock, block: slice, query, key, value, *tensors: torch.Tensor) -> torch.Tensor:
        logits = (query[..., block, :] @ key[:, :, None].mT).float()
        logits = logits.masked_fill(masked[..., block, :], -torch.inf)
        arriving = slice(max(0, block.start - num_prompt), max(0, block.stop - num_prompt))
        return weigh_block(logits, arriving, *tensors).to(value.dtype) @ value[:, :, None]

    def run(weigh: Weigh) -> torch.Tensor:
        for module in attention:
            module.ssd_attend = partial(attend, weigh)
        return decoder(**inputs, use_cache=False).last_hidden_state[:, num_prompt - 1 :]

    attention: list[Any] = [module for module in decoder.modules() if hasattr(module, "layer_idx")]
    weights = [parameter for parameter in generator.model.parameters() if parameter.requires_grad]
    with large_blocks_mapped(), ssd_attention(generator.language_model, NAME), _layers_recomputed(decoder):
        try:
            for parameter in weights:
                parameter.requires_grad_(False)
            yield run
        finally:
            for parameter in weights:
                parameter.requires_grad_(True)
            for module in attention:
                vars(module).pop("ssd_attend", None)


@contextmanager
def _layers_recomputed(decoder: torch.nn.Module) -> Iterator[None]:
    """Inside the block, a layer keeps its input only; transformers' own switch works in training mode only."""
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(recomputed, layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def recomputed(function: Callable, *args, **kwargs) -> Any:
    """Call a function; the backward pass calls it again, instead of keeping the results between input and output.

    Inside another such call, the arguments are not kept either, but made again. What the function itself holds is kept.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def in_blocks(
    function: Callable[..., torch.Tensor], length: int, nbytes: int, *tensors: torch.Tensor
) -> list[torch.Tensor]:
    """The results of a function for the parts of `range(length)`, as few as keep each within `BLOCK_BYTES`.

    All of it takes `nbytes`. The function gets a part, then the tensors. Where there is more than one part, the
    backward pass computes each of them again.
    """
    number = min(length, -(-nbytes // BLOCK_BYTES))
    if number <= 1:
        return [function(slice(0, length), *tensors)]
    size = -(-length // number)
    parts = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    return [recomputed(function, part, *tensors) for part in parts]


def _allowed_tokens(recording: Recording) -> torch.Tensor:
    """The attention mask of a full cache, `[rows, 1, 1, tokens, tokens]`; padding attends to itself."""
    length = next(tensor for name, tensor in recording.inputs.items() if name != "position_ids").shape[1]
    seen = torch.nn.functional.pad(recording.seen, (0, length - recording.seen.shape[1]), value=True)
    causal = torch.ones(length, length, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=seen.device)
    return (causal & seen[:, None] | itself)[:, None, None]


def divergence_of_states(
    generator: Generator,
    is_unconditional: torch.Tensor,
    full: torch.Tensor,
    evicted: torch.Tensor,
    guidance_scale: float,
    temperature: float,
) -> torch.Tensor:
    """KL divergence of the next visual token, `[images, cells]`, with gradients for the second states only.

    Args:
        generator: its `visual_head` gives the distributions.
        is_unconditional: `[rows]`, as for `Recording`.
        full: states of the full cache, `[rows, cells, hidden_size]`.
        evicted: states of the evicted cache, of the same shape.
        guidance_scale: as for `Generator.generate`.
        temperature: as for `Generator.generate`, above 0.
    """
    head = generator.visual_head
    assert head is not None
    is_unconditional = is_unconditional.to(full.device)

    def log_probabilities_of(states: torch.Tensor) -> torch.Tensor:
        return log_probabilities(head(states).float(), is_unconditional, guidance_scale, temperature)

    def divergence_of(cells: slice, full: torch.Tensor, evicted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = log_probabilities_of(full[:, cells])
        return kl_divergence(expected, log_probabilities_of(evicted[:, cells]))

    with torch.no_grad():
        num_codes = head(full[:1, :1]).shape[-1]
    nbytes = full[..., 0].numel() * num_codes * torch.float32.itemsize
    return torch.cat(in_blocks(divergence_of, full.shape[1], nbytes, full, evicted), 1)


AttentionInterface.register(NAME, attend_recording)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
