"""Recordings of training images: generated with a full cache, then replayed to get the inputs of the decoder.

`teacher_forcing.py` uses the recordings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ssd_cache._compat import CACHE, take_cache
from ssd_cache.cache.attention import prompt_columns
from ssd_cache.models import Generator, GeneratorError
from ssd_cache.runs.batching import fitting_batch_size, image_nbytes, longest_prompt
from ssd_cache.runs.metering import release_memory
from ssd_cache.runs.processes import Processes
from ssd_cache.runs.progress import progress_bar
from ssd_cache.training.learning_state import HELD_OUT, LearningRun
from ssd_cache.training.likelihood import certain_scores
from ssd_cache.training.memory import MEMORY
from ssd_cache.training.teacher_forcing import Recording

BATCHES_AT_ONCE = 4
"""Batches generated together if they fit, since a few images take almost as long to generate as many."""

NO_GUIDANCE = 0.01
"""Within this distance of 1, guidance has no effect and the unconditional rows are skipped."""


def check_trainable(generator: Generator) -> None:
    """Refuse, before anything is generated, a model without a head that scores visual tokens; raises GeneratorError."""
    if generator.visual_head is None:
        raise GeneratorError(
            f"{generator.checkpoint.name} cannot be trained on: it has no head for visual tokens (its "
            "get_output_embeddings() is None)"
        )


def generated_together(generator: Generator, prompts: Sequence[str], batch_size: int) -> int:
    """Images that are generated at once, for steps of `batch_size` images."""
    of_image = image_nbytes(generator, longest_prompt(prompts))
    return fitting_batch_size(BATCHES_AT_ONCE * batch_size, of_image, MEMORY, batch_size)


def make_recordings(
    generator: Generator,
    prompts: Sequence[str],
    batch_size: int,
    seed: int,
    sampling: dict[str, Any],
    run: LearningRun,
    processes: Processes,
    progress: bool,
) -> list[Recording]:
    """A recording for each batch, then the held-out one; images that the run does not hold are generated and added.

    The processes generate batches in turn, each with the seed of its number. Where guidance has no effect, recordings
    have no unconditional rows.
    """
    num_together = generated_together(generator, prompts, batch_size)
    batches = [list(prompts[start : start + num_together]) for start in range(0, len(prompts), num_together)]
    batches.append([prompts[index * len(prompts) // HELD_OUT] for index in range(HELD_OUT)])
    recordings: list[Recording] = []
    bar = progress_bar(enumerate(batches), total=len(batches), unit=" batches", desc="images", disable=not progress)
    for index, batch in bar:
        if index == len(run.images):
            own, tokens = index + processes.index, None
            if own < len(batches):
                tokens = generator.generate(batches[own], **sampling, seed=seed + own).cpu()
            run.images += [found for found in processes.gather_all(tokens) if found is not None]
            run.save()
        recording = replay_images(generator, batch, run.images[index], **sampling, seed=seed + index)
        recordings.append(without_idle_rows(recording, sampling["guidance_scale"]))
        # gaps between the kept inputs, which the next batch does not always fit into; and a step then needs less
        release_memory()
    return recordings


def without_idle_rows(recording: Recording, guidance_scale: float) -> Recording:
    """The recording, without its unconditional rows where guidance has no effect."""
    return recording.conditional() if abs(guidance_scale - 1) < NO_GUIDANCE else recording


def training_batches(recordings: Sequence[Recording], batch_size: int, seed: int) -> Iterator[Recording]:
    """Endless training batches; their order depends only on the seed. Images of a batch were generated together.

    A batch is copied from the recordings when it is used, since a copy of all would take as much memory as they do.
    """
    parts = [(recording, rows) for recording in recordings for rows in recording.parts(batch_size)]
    order = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(parts), generator=order).tolist():
            recording, rows = parts[index]
            yield recording.of_rows(rows)


def replay_images(generator: Generator, prompts: Sequence[str], tokens: torch.Tensor, **settings) -> Recording:
    """The inputs that the decoder got when it generated these images, bit for bit.

    The model's own `generate` runs again on the given tokens, with a decoder that returns zeros. The inputs of the
    decoder depend only on the tokens, and its layers would take almost all the time.

    Args:
        generator: the generator of the images.
        prompts: one for each image, in the order in which they were generated together.
        tokens: visual tokens, int64 `[images, cells]`.
        settings: as for `Generator.generate`.

    Raises:
        GeneratorError: tokens that do not fit the model, or a decoder that does not get the prompt at once and then one
            token at a time.
    """
    name, cells = generator.checkpoint.name, generator.checkpoint.num_visual_tokens
    if tokens.dtype != torch.int64 or tokens.shape != (len(prompts), cells) or tokens.min() < 0:
        raise GeneratorError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}: give int64 {[len(prompts), cells]}, all from 0 up"
        )
    calls: list[dict[str, torch.Tensor]] = []

    def remember(decoder: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        named = {"input_ids": args[0]} if args else {}
        named |= {name: kwargs.get(name) for name in ("input_ids", "inputs_embeds", "position_ids", "attention_mask")}
        calls.append({name: tensor.clone() for name, tensor in named.items() if isinstance(tensor, torch.Tensor)})

    handle = generator.language_model.get_decoder().register_forward_pre_hook(remember, with_kwargs=True)
    try:
        with _empty_decoder(generator, tokens):
            taken = generator.generate(prompts, DynamicCache(), **{**settings, "temperature": 0.0})
    finally:
        handle.remove()
    if not torch.equal(taken.cpu(), tokens):
        raise GeneratorError(f"{name} did not take the tokens given: they are of other images")
    names = calls[0].keys() - {"attention_mask"}
    length = {name: 1 if name != "position_ids" else -1 for name in names}
    if len(calls) != cells or any(call[name].shape[length[name]] != 1 for call in calls[1:] for name in names):
        raise GeneratorError(
            f"{name} cannot be trained on: its decoder ran {len(calls)} times for {cells} visual tokens, and it has to "
            "be given the prompt at once and then one token at a time"
        )
    inputs = {name: torch.cat([call[name] for call in calls], length[name]).cpu() for name in names}
    rows, num_prompt = next(calls[0][name] for name in names if name != "position_ids").shape[:2]
    mask = calls[0].get("attention_mask")
    seen = mask.bool() if mask is not None and mask.ndim == 2 else prompt_columns(mask, num_prompt)
    seen = torch.ones(rows, num_prompt, dtype=torch.bool) if seen is None else seen.cpu()
    return Recording(inputs, seen, generator.is_unconditional(len(prompts)))


@contextmanager
def _empty_decoder(generator: Generator, tokens: torch.Tensor) -> Iterator[None]:
    """Inside the block, the decoder only counts tokens in its cache, and the model generates the given tokens."""
    decoder, head = generator.language_model.get_decoder(), generator.visual_head
    assert head is not None
    weights, steps = next(decoder.parameters()), iter(tokens.unbind(1))

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        rows, new = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        cache = take_cache(kwargs)
        states = torch.zeros(rows, 1, new, 1, dtype=weights.dtype, device=weights.device)
        cache.update(states, states, 0)
        hidden = weights.new_zeros(rows, new, decoder.config.hidden_size)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})

    def force(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if tokens.max() >= output.shape[-1]:
            raise GeneratorError(f"tokens hold {int(tokens.max())}; the model has {output.shape[-1]}, counted from 0")
        return certain_scores(output, next(steps), generator.is_unconditional(len(tokens)))

    handle = head.register_forward_hook(force)
    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
        handle.remove()
