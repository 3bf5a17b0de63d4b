"""`measure_fidelity`: generate a few images with a full cache, and compare compressed caches at every step.

It checks the settings and assembles the results. The comparison itself is in `lockstep.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.sharding import check_whole
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.evaluation.fidelity.lockstep import Lockstep, Trace
from ssd_cache.evaluation.fidelity.result import Fidelity
from ssd_cache.evaluation.policies import mean_slots
from ssd_cache.models import Checkpoint, Generator, GeneratorError, Sampling


def measure_fidelity(
    generator: Generator,
    prompts: Sequence[str],
    caches: Mapping[str, Callable[[], SSDCache]],
    *,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    tokens: torch.Tensor | None = None,
    progress: bool = False,
) -> dict[str, Fidelity]:
    """Measure how much compressed caches change a model's next-token distribution and attention.

    The images are generated with a full cache, all in one batch. At every step the same token is also fed through
    every other cache. All caches see the same tokens, so any difference is caused by the caches. The compared
    distribution is the one that is sampled from, with guidance and temperature, over all visual tokens (a
    checkpoint's `top_k` is not applied).

    Memory: the K and V of the full cache and of all other caches at once, one step's attention weights, and
    `layers * (kv_heads + 1)` numbers per step and cache.

    Args:
        generator: the model.
        prompts: one image is generated for each.
        caches: by name, a function that makes a fresh cache; called once.
        seed: seed of the batch; `Generator.generate` with this seed generates the same tokens.
        guidance_scale: as for `Generator.generate`.
        temperature: above 0.
        tokens: integers `[images, cells]`: visual tokens to feed instead of generated ones (teacher forcing).
        progress: show a bar over visual tokens.

    Raises:
        GeneratorError: a setting is out of range, there is no prompt, or the tokens do not fit.
        HeadMapError: a cache's map does not fit the model.
        ValueError: there is no cache, one is used or not an `SSDCache`, or the model's outputs are not finite.
    """
    checkpoint = generator.checkpoint
    check_whole(generator.language_model)
    cells = checkpoint.num_visual_tokens
    check_settings(None if generator.default_guidance is None else guidance_scale, temperature, seed)
    guidance_scale = generator.guidance_scale if guidance_scale is None else guidance_scale
    made = _fresh(checkpoint, caches)
    if tokens is not None:
        _check_tokens(tokens, len(prompts), cells)
    lockstep = Lockstep(generator, list(made.values()), len(prompts), guidance_scale, temperature, tokens)
    with (
        ssd_attention(generator.language_model),
        lockstep.hooked(),
        tqdm(
            total=len(prompts) * cells,
            unit=" visual tokens",
            desc=f"full and {len(made)} more",
            mininterval=0.1 if sys.stderr.isatty() else 10,  # few lines in a log file
            disable=not progress,
        ) as bar,
    ):
        try:
            drawn = generator.generate(
                prompts,
                lockstep.full,
                guidance_scale=guidance_scale,
                temperature=temperature if tokens is None else 0.0,  # given tokens are made the most likely ones
                seed=seed,
                on_tokens=bar.update,
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            lockstep.full.finish()  # raises an error that names the head, where the attention shows it
            raise ValueError(_not_finite(checkpoint)) from error
    lockstep.full.finish()
    if lockstep.num_compared != cells - 1 or (tokens is not None and not torch.equal(drawn.cpu(), tokens.cpu().long())):
        raise GeneratorError(
            f"{checkpoint.name} can not be watched: {lockstep.num_compared} of its {cells - 1} steps were compared, or "
            "it did not take the tokens given; its decoder or its head works otherwise than those known"
        )
    results = {name: _result(checkpoint, trace, drawn) for name, trace in zip(made, lockstep.traces, strict=True)}
    lockstep.release()
    if not all(result.kl.isfinite().all() and result.retained.isfinite().all() for result in results.values()):
        raise ValueError(_not_finite(checkpoint))
    return results


def check_settings(guidance_scale: float | None = None, temperature: float = 1.0, seed: int = 0) -> None:
    """Refuse settings that give no divergence to measure; raises GeneratorError."""
    Sampling(guidance_scale, temperature, seed)
    if temperature == 0:
        raise GeneratorError(
            "temperature=0 leaves one token that is certain, and no divergence to measure: give a number above 0; "
            "1 is usual"
        )


def _fresh(checkpoint: Checkpoint, caches: Mapping[str, Callable[[], SSDCache]]) -> dict[str, SSDCache]:
    if not caches:
        raise ValueError("caches is empty: give at least one, as {'ssd 20%': lambda: SSDCache(head_map, 0.2)}")
    made = {name: make_cache() for name, make_cache in caches.items()}
    for name, cache in made.items():
        if not isinstance(cache, SSDCache):
            raise ValueError(
                f"caches[{name!r}] makes a {type(cache).__name__}, which does not tell what it holds: make an SSDCache"
            )
        checkpoint.check_head_map(cache.head_map)
    if len({id(cache) for cache in made.values()}) < len(made) or any(
        cache.get_seq_length() for cache in made.values()
    ):
        raise ValueError("caches give one cache twice, or one that was used: each must make a new SSDCache when called")
    return made


def _check_tokens(tokens: torch.Tensor, pictures: int, cells: int) -> None:
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool or tokens.shape != (pictures, cells):
        raise GeneratorError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}: give integers [{pictures}, {cells}], one row a prompt "
            "and one entry a cell of the grid"
        )
    if tokens.min() < 0:
        raise GeneratorError(f"tokens hold {int(tokens.min())}: visual tokens are counted from 0")


def _result(checkpoint: Checkpoint, trace: Trace, tokens: torch.Tensor) -> Fidelity:
    return Fidelity(
        layout=checkpoint.layout,
        tokens=tokens.cpu(),
        budget=mean_slots(trace.cache) / checkpoint.num_visual_tokens,
        is_spatial=torch.tensor([layer.labels or layer.plan.is_spatial for layer in trace.cache.layers]),
        kl=trace.kl.cpu(),
        agrees=trace.agrees.cpu(),
        attention_error=trace.attention_error.cpu(),
        retained=trace.retained.cpu(),
    )


def _not_finite(checkpoint: Checkpoint) -> str:
    return (
        f"{checkpoint.name} gives NaN or infinite numbers: its numbers overflow, as they may in float16; load it in "
        "bfloat16 or float32"
    )
