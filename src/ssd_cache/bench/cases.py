"""The compared caches: full caches in their best configurations, and cache policies by budget.

A case is a name and settings in plain values; it makes a new cache for every use. A rival that runs its steps in
another way is one entry in `STEPS` and one `Case`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from ssd_cache.bench.subject import Subject
from ssd_cache.budget import Amount
from ssd_cache.cache.attention import NAME
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.policies import own_policy, policy_label
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.decode.fast_decode import fast_decode
from ssd_cache.evaluation.policies import DEFAULT, parse_policies, parse_policy, resolve_policies
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.kernels.packed_linears import packed_linears

RIVALS = ("DynamicCache", "StaticCache")
"""transformers' full caches."""

VARLEN = "StaticCache, varlen"
"""A `StaticCache` whose steps read stored tokens only, by torch's `varlen_attn`; see `bench/varlen.py`. For GPUs."""

VALID_TOKENS = "full cache, valid tokens only"
"""Our own store with a slot for every token, under `fast_decode`. It reads stored tokens only and computes no scores,
so its speed shows what eviction alone gains."""


@contextmanager
def compiled_steps(model: PreTrainedModel) -> Iterator[None]:
    """Compile the decoder's one-token steps over a StaticCache, with the settings of transformers' own `generate`.

    `generate` of a causal language model does this by itself on a GPU; `generate` of Janus does not.
    """
    decoder = model.get_decoder()
    eager = decoder.forward
    compiled = torch.compile(eager, **CompileConfig().to_dict())

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        new = inputs_embeds if input_ids is None else input_ids
        step = compiled if new.shape[1] == 1 else eager
        return step(input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward


@contextmanager
def compiled_packed_steps(model: PreTrainedModel) -> Iterator[None]:
    """Compile the steps as `compiled_steps` does, over the packed linear layers of `fast_decode`."""
    with packed_linears(model), compiled_steps(model):
        yield


STEPS: Mapping[str, Callable[[PreTrainedModel], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "packed": packed_linears,
    "compiled": compiled_steps,
    "compiled, packed": compiled_packed_steps,
    "fast_decode": fast_decode,
}
"""Ways to run the decoder's steps, by the word that a case's name ends with: a context manager around the model."""


@dataclass(frozen=True)
class Case:
    """A cache to measure.

    Attributes:
        cache: one of `RIVALS`, `VARLEN`, `VALID_TOKENS`, or a policy with settings in the format of
            `evaluation.policies`: `ssd:buffer=1`.
        budget: visual tokens per head, for a policy.
        steps: a key of `STEPS`; "" runs eager steps.
    """

    cache: str
    budget: Amount | None = None
    steps: str = ""

    @property
    def name(self) -> str:
        """The cache, the budget and the steps: "StaticCache, compiled", "ssd 20%, fast_decode"."""
        if self.cache == VALID_TOKENS:
            return self.cache
        amount = f"{100 * self.budget:g}%" if isinstance(self.budget, float) else str(self.budget or "")
        return ", ".join(filter(None, (f"{self.cache} {amount}".strip(), self.steps)))

    @property
    def is_full(self) -> bool:
        """Whether the cache is a full cache of transformers."""
        return self.cache in (*RIVALS, VARLEN)

    @property
    def is_rival(self) -> bool:
        """Whether the cache is a full cache: the policies are compared with the fastest of these."""
        return self.is_full or self.cache == VALID_TOKENS

    def make_cache(self, subject: Subject) -> Cache:
        """Make a new cache, long enough for a whole image; raises ValueError for policy settings out of range."""
        if self.cache == "DynamicCache":
            return DynamicCache()
        if self.cache == "StaticCache":
            return StaticCache(config=subject.config, max_cache_len=subject.length)
        if self.cache == VARLEN:
            from ssd_cache.bench.varlen import varlen_cache  # not in every supported torch

            return varlen_cache(subject.config, subject.length)
        return self.make_ssd(subject.head_map)

    def make_ssd(self, head_map: HeadMap) -> SSDCache:
        """Make the cache of a policy, or of `VALID_TOKENS`."""
        if self.cache == VALID_TOKENS:
            num_layers, num_kv_heads = head_map.num_layers, head_map.num_kv_heads
            spatial = HeadMap.uniform("spatial", num_layers=num_layers, num_kv_heads=num_kv_heads)
            return SSDCache(spatial.with_layout(head_map.layout), 1.0)
        return parse_policy(self.cache).make_cache(head_map, 1.0 if self.budget is None else self.budget)

    @contextmanager
    def running(self, subject: Subject) -> Iterator[None]:
        """Set the best attention for this cache and run its kind of steps; restore the model at the end."""
        name = "varlen" if self.cache == VARLEN else "sdpa" if self.is_full else NAME
        attention = ssd_attention(subject.model, name, needs_queries=not self.is_full)
        with attention, STEPS[self.steps](subject.model):
            yield


def choose_cases(
    head_map: HeadMap,
    *,
    policies: str | None = None,
    budgets: Sequence[Amount] | None = None,
    names: Sequence[str] | None = None,
    is_compiled: bool = True,
    on_gpu: bool = False,
) -> list[Case]:
    """The full caches, then policies at budgets; each policy's settings are checked on the head map.

    Args:
        head_map: the map of the measured model.
        policies: names and settings, as for `parse_policies`. Without policies and budgets: the map's own policy at
            three budgets, and with buffer 1; SSD and the baselines at 20%.
        budgets: budgets of every policy; "full" has only 1.0.
        names: names of the cases to keep.
        is_compiled: also the cases of `STEPS` that need a compiler.
        on_gpu: also those that run only on a GPU.

    Raises:
        ValueError: an unknown policy or name, or settings out of range.
    """
    cases = [Case(rival, steps=steps) for steps in ("", "packed") for rival in RIVALS]
    cases += [Case("StaticCache", steps=steps) for steps in ("compiled", "compiled, packed")]
    cases += [Case(VARLEN, steps="compiled")] if on_gpu else []
    cases.append(Case(VALID_TOKENS, steps="fast_decode"))
    if policies is None and budgets is None:
        name, settings = own_policy(head_map)
        own = policy_label(name, settings)
        cases += [Case(own, 1.0), Case(own, 0.5), Case(own, 0.2), Case(own, 0.2, "fast_decode")]
        others = (policy_label(name, settings | {"buffer": 1}), "ssd", "h2o", "streaming-llm")
        cases += [Case(other, 0.2) for other in others if other != own]
    else:
        for policy in resolve_policies(parse_policies(policies or DEFAULT), head_map):
            for budget in policy.budgets(budgets or [0.2]):
                cases += [Case(policy.label, budget), Case(policy.label, budget, "fast_decode")]
    cases = [case for case in cases if is_compiled or not case.steps]
    if names is not None:
        known = {case.name: case for case in cases}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no cache {unknown[0]!r}: give names of {'; '.join(known)}")
        cases = [case for name, case in known.items() if name in names]
    for case in cases:
        if not case.is_full:
            case.make_ssd(head_map)
    return cases
