"""Runs a full cache and compressed caches on the same inputs at every step, and measures how they differ.

The model's own `generate` runs the loop. Hooks on the decoder, on its attention outputs and on the head that scores
visual tokens run and compare the other caches. Only a few values per step are stored, not the attention weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch

from ssd_cache._compat import CACHE, take_cache
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.layer import SSDLayer
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.evaluation.fidelity.result import MEASURED, Fidelity
from ssd_cache.models import Generator, GeneratorError, ResolvedSampling
from ssd_cache.profiling.measuring import generate_recorded
from ssd_cache.profiling.recorder import RecordingCache
from ssd_cache.runs.progress import progress_bar
from ssd_cache.training.likelihood import certain_scores, kl_divergence, log_probabilities


def compare_caches(
    generator: Generator,
    prompts: Sequence[str],
    caches: Mapping[str, SSDCache],
    sampling: ResolvedSampling,
    tokens: torch.Tensor | None = None,
    progress: bool = False,
) -> dict[str, Fidelity]:
    """Measure fresh caches in one batch. `measure_fidelity` describes and checks the arguments.

    Raises:
        GeneratorError: the tokens do not fit, or the hooks did not see every step.
        ValueError: the model's outputs are not finite.
    """
    name, cells = generator.checkpoint.name, generator.checkpoint.num_visual_tokens
    lockstep = _Lockstep(generator, caches, len(prompts), sampling, tokens)
    if tokens is not None:
        sampling = replace(sampling, temperature=0.0)  # the given tokens are made the most likely ones
    with (
        ssd_attention(generator.language_model),
        lockstep.hooked(),
        progress_bar(
            total=len(prompts) * cells,
            unit=" visual tokens",
            desc=f"full and {len(caches)} more",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # few lines in a log file
            disable=not progress,
        ) as bar,
    ):
        generated = generate_recorded(generator, prompts, lockstep.full, on_tokens=bar.update, **vars(sampling)).cpu()
    if lockstep.num_compared != cells - 1 or not (tokens is None or torch.equal(generated, tokens.cpu().long())):
        raise GeneratorError(
            f"{name} cannot be compared: {lockstep.num_compared} of its {cells - 1} steps were seen, or it did not "
            "take the given tokens; its decoder or its head works in an unknown way"
        )
    results = lockstep.finish(generated)
    if not all(result.kl.isfinite().all() and result.retained.isfinite().all() for result in results.values()):
        raise ValueError(
            f"{name} gives NaN or infinite numbers: its numbers overflow, as they may in float16; load it in "
            "bfloat16 or float32"
        )
    return results


class _Lockstep:
    """Runs `caches` after each step of `full`, the cache that generates, while `hooked()` is open.

    The generator's attention implementation must be "ssd". `num_compared` counts the compared distributions.
    """

    def __init__(
        self,
        generator: Generator,
        caches: Mapping[str, SSDCache],
        num_images: int,
        sampling: ResolvedSampling,
        tokens: torch.Tensor | None,
    ):
        checkpoint, device = generator.checkpoint, generator.model.device
        self.generator, self.tokens = generator, tokens
        self.guidance_scale = sampling.guidance_scale
        self.temperature = sampling.temperature
        self.home = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        self.is_unconditional = generator.is_unconditional(num_images).to(self.home)
        cells = checkpoint.num_visual_tokens
        shape = checkpoint.layout, checkpoint.num_layers, checkpoint.num_kv_heads
        self.full = RecordingCache(*shape, self, num_queries=1)
        self.caches = dict(caches)
        blank = torch.zeros(num_images, cells, dtype=torch.int64, device=self.home)
        self.results = {name: Fidelity.empty(checkpoint, cache, blank) for name, cache in caches.items()}
        self.num_compared = 0
        self._running: str | None = None  # None while the full cache runs
        self._weights: dict[int, list[torch.Tensor]] = {}
        self._outputs: dict[int, torch.Tensor] = {}
        self._hidden: dict[str, torch.Tensor] = {}  # of the newest token, `[rows, 1, hidden]`

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Put the hooks on the model; they are removed at the end, also after an exception."""
        decoder, head, projections = parts_of(self.generator)
        with ExitStack() as hooks:
            hooks.enter_context(decoder.register_forward_hook(self._after_decoder, with_kwargs=True))
            hooks.enter_context(head.register_forward_hook(self._after_head))
            for layer, projection in projections.items():
                hooks.enter_context(projection.register_forward_pre_hook(partial(self._before_projection, layer)))
            yield

    def finish(self, tokens: torch.Tensor) -> dict[str, Fidelity]:
        """The results for the generated tokens, on the CPU; frees all K and V."""
        results = {
            name: replace(
                result,
                tokens=tokens,
                is_spatial=self.caches[name].head_map.window_heads(self.caches[name].score),
                **{part: getattr(result, part).cpu() for part in MEASURED},
            )
            for name, result in self.results.items()
        }
        self.full.reset()  # it and its observer form a reference cycle, which Python frees late
        self.caches.clear()
        return results

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
        for name, cache in self.caches.items():
            self._running = name
            try:
                self._hidden[name] = decoder(*args, **others, **{CACHE: cache}).last_hidden_state[:, -1:]
            finally:
                self._running = None
            if self.step >= 0:
                for layer_idx, layer in enumerate(cache.layers):
                    share = retained_share(torch.cat(self._weights[layer_idx]), layer)
                    self.results[name].retained[self.step, layer_idx] = share.mean(0)

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
        self.results[self._running].attention_error[self.step, layer_idx] = error.mean()

    def _after_head(self, head: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """After the full cache's logits: compute those of the other caches, and compare."""
        if self.step >= 0:
            log_p = self._log_probabilities(output)
            for name, result in self.results.items():
                log_q = self._log_probabilities(head.forward(self._hidden[name].reshape(args[0].shape)))
                result.kl[:, self.step] = kl_divergence(log_p, log_q)
                result.agrees[:, self.step] = log_p.argmax(-1) == log_q.argmax(-1)
            self.num_compared += 1
        if self.tokens is None:
            return None
        if self.step < 0:
            low, high, limit = int(self.tokens.min()), int(self.tokens.max()), output.shape[-1]
            if low < 0 or high >= limit:
                raise GeneratorError(f"tokens range from {low} to {high}: the visual tokens are 0 to {limit - 1}")
        return certain_scores(output, self.tokens[:, self.step + 1], self.is_unconditional)

    def _log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of sampling, float64 `[images, vocabulary]`, from the head's logits, one token per row."""
        logits = logits.reshape(len(logits), -1).to(self.home, torch.float64)
        return log_probabilities(logits, self.is_unconditional, self.guidance_scale, self.temperature)


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


def parts_of(generator: Generator) -> tuple[torch.nn.Module, torch.nn.Module, dict[int, torch.nn.Module]]:
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
            f"{generator.checkpoint.name} cannot be compared: its decoder has {num_layers} layers, and "
            f"{len(projections)} attention outputs (o_proj) and {'no' if head is None else 'a'} head that scores "
            "tokens were found"
        )
    return decoder, head, projections
