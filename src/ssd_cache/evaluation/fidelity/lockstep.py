"""Runs a full cache and compressed caches in lockstep: each input of the full cache also goes through the others.

It puts hooks on the decoder, on its attention outputs and on the head that scores visual tokens. The model's own
`generate` runs the loop. Only a few numbers per step are stored, not the attention weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ssd_cache._compat import CACHE, take_cache
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.layer import SSDLayer
from ssd_cache.models import Generator, GeneratorError
from ssd_cache.profiling.recorder import RecordingCache
from ssd_cache.training.likelihood import certain_scores, kl_divergence, log_probabilities


class Trace:
    """The measurements of one compressed cache; the tensors are those of `Fidelity`, not yet on the CPU."""

    def __init__(self, cache: SSDCache, pictures: int, steps: int, device: torch.device, home: torch.device):
        shape = steps, cache.head_map.num_layers
        self.cache = cache
        self.kl = torch.zeros(pictures, steps, dtype=torch.float64, device=home)
        self.agrees = torch.zeros(pictures, steps, dtype=torch.bool, device=home)
        self.attention_error = torch.zeros(shape, device=device)
        self.retained = torch.zeros(*shape, cache.head_map.num_kv_heads, device=device)
        self.hidden: torch.Tensor | None = None  # of the newest token, `[rows, 1, hidden]`


class Lockstep:
    """Runs compressed caches beside a full one, inside `with lockstep.hooked():`; the caller generates with `full`.

    Args:
        generator: its attention implementation must be "ssd".
        caches: fresh caches.
        num_pictures: number of prompts that will be generated.
        guidance_scale, temperature: settings of the compared distribution.
        tokens: `[images, cells]`, the tokens that the model is forced to generate; None to let it sample.

    Attributes:
        full: the cache to generate with.
        traces: one per cache, in order.
        num_compared: number of steps whose distributions were compared.
    """

    def __init__(
        self,
        generator: Generator,
        caches: Sequence[SSDCache],
        num_pictures: int,
        guidance_scale: float,
        temperature: float,
        tokens: torch.Tensor | None = None,
    ):
        checkpoint = generator.checkpoint
        cells = checkpoint.num_visual_tokens
        self.generator, self.guidance_scale, self.temperature = generator, guidance_scale, temperature
        device = generator.model.device
        self.home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.is_unconditional = generator.is_unconditional(num_pictures).to(self.home)
        self.tokens = tokens
        shape = checkpoint.layout, checkpoint.num_layers, checkpoint.num_kv_heads
        self.full = RecordingCache(*shape, self, num_queries=1)
        self.traces = [Trace(cache, num_pictures, cells - 1, device, self.home) for cache in caches]
        self.num_compared = 0
        self._running: Trace | None = None  # None while the full cache runs
        self._weights: dict[int, list[torch.Tensor]] = {}
        self._outputs: dict[int, torch.Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Put the hooks on the model; they are removed at the end, also after an exception."""
        decoder, head, projections = parts_of(self.generator)
        handles = []
        try:
            handles.append(decoder.register_forward_hook(self._after_decoder, with_kwargs=True))
            handles.append(head.register_forward_hook(self._after_head))
            for layer, projection in projections.items():
                handles.append(projection.register_forward_pre_hook(partial(self._before_projection, layer)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def release(self) -> None:
        """Free all K and V now; the full cache and its observer form a reference cycle, which Python frees late."""
        self.full.reset()
        self.traces.clear()

    @property
    def step(self) -> int:
        """Index of the visual token that was fed last; -1 after the prompt."""
        return self.full.layers[0].num_visual - 1

    def observe(self, layer_idx: int, weights: torch.Tensor, num_prompt: int, rows: slice) -> None:
        """See `recorder.Observer.observe`. One step arrives at a time; its weights are kept until the next step."""
        parts = self._weights.setdefault(layer_idx, [])
        if rows.start == 0:
            parts.clear()
        parts.append(weights[:, :, :, 0].mean(2))

    def _after_decoder(self, decoder: torch.nn.Module, args: tuple, kwargs: dict, output) -> None:
        """After a step of the full cache: run the same step with the other caches and read which tokens they hold."""
        others = dict(kwargs)
        if take_cache(others) is not self.full:
            return
        for layer in self.full.layers:
            layer.report()  # passes pending queries to the observer now instead of at the next token
        for trace in self.traces:
            self._running = trace
            try:
                states = decoder(*args, **others, **{CACHE: trace.cache}).last_hidden_state
            finally:
                self._running = None
            trace.hidden = states[:, -1:]
            if self.step < 0:
                continue
            for layer_idx, layer in enumerate(trace.cache.layers):
                share = retained_share(torch.cat(self._weights[layer_idx]), layer)
                trace.retained[self.step, layer_idx] = share.mean(0)

    def _before_projection(self, layer_idx: int, projection: torch.nn.Module, args: tuple) -> None:
        """Receive an attention output, `[rows, new, heads * head_dim]`, and compare it with the full cache's."""
        if self.step < 0:
            return
        output = args[0].float()
        if self._running is None:
            self._outputs[layer_idx] = output
            return
        full = self._outputs[layer_idx]
        error = (output - full).norm(dim=-1) / full.norm(dim=-1).clamp_min(torch.finfo(full.dtype).tiny)
        self._running.attention_error[self.step, layer_idx] = error.mean()

    def _after_head(self, head: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """After the full cache's token scores: compute those of the other caches, and compare."""
        if self.step >= 0:
            log_p = self._log_probabilities(output)
            for trace in self.traces:
                assert trace.hidden is not None
                log_q = self._log_probabilities(head.forward(trace.hidden.reshape(args[0].shape)))
                trace.kl[:, self.step] = kl_divergence(log_p, log_q)
                trace.agrees[:, self.step] = log_p.argmax(-1) == log_q.argmax(-1)
            self.num_compared += 1
        return None if self.tokens is None else self._forced(output, self.tokens)

    def _log_probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of sampling, float64 `[images, vocabulary]`, from the head's scores, one token per row."""
        scores = scores.reshape(len(scores), -1).to(self.home, torch.float64)
        return log_probabilities(scores, self.is_unconditional, self.guidance_scale, self.temperature)

    def _forced(self, output: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores in the shape of `output` that make the given token the most likely one, with or without guidance."""
        if (limit := output.shape[-1]) <= tokens.max():
            raise GeneratorError(
                f"tokens hold {int(tokens.max())}, but {self.generator.checkpoint.name} has {limit} visual tokens, "
                "counted from 0"
            )
        return certain_scores(output, tokens[:, self.step + 1], self.is_unconditional)


def retained_share(weights: torch.Tensor, layer: SSDLayer) -> torch.Tensor:
    """Share of a full cache's attention on the tokens that a layer of another cache holds, `[rows, kv_heads]`.

    Args:
        weights: `[rows, kv_heads, num_prompt + seen]`, softmax of the newest query over every token in order.
        layer: a layer that has seen the same tokens.
    """
    prompt, visual = weights[..., : layer.num_prompt].sum(-1), weights[..., layer.num_prompt :]
    share = torch.empty_like(prompt)
    for store in layer.stores:
        heads, held = list(store.plan.heads), store.positions[:, :, : store.num_stored].long()
        share[:, heads] = prompt[:, heads] + visual[:, heads].gather(-1, held).sum(-1)
    return share


def parts_of(
    generator: Generator,
) -> tuple[torch.nn.Module, torch.nn.Module, dict[int, torch.nn.Module]]:
    """The decoder, the head that scores visual tokens, and the output projection of each layer's attention.

    Raises:
        GeneratorError: the model lacks one of these parts.
    """
    decoder, head = generator.language_model.get_decoder(), generator.visual_head
    projections = {
        module.layer_idx: module.o_proj
        for module in decoder.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj")
    }
    num_layers = generator.checkpoint.num_layers
    if head is None or sorted(projections) != list(range(num_layers)):
        raise GeneratorError(
            f"{generator.checkpoint.name} can not be watched: its decoder has {num_layers} layers, and "
            f"{len(projections)} attention outputs (o_proj) were found in it, {'no' if head is None else 'a'} head "
            "that scores tokens"
        )
    return decoder, head, projections
