"""The compared caches: transformers' full caches, and cache policies by budget, both eager and compiled.

A case holds a name and settings in plain values, so that it can be sent to another process. It makes a new cache for
every use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

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

RIVALS = ("DynamicCache", "StaticCache")
"""transformers' full caches, the baselines of the speed tables."""


@dataclass(frozen=True)
class Case:
    """A cache to measure.

    Attributes:
        cache: one of `RIVALS`, or a policy with settings in the format of `evaluation.policies`: `ssd:buffer=1`.
        budget: visual tokens per head, for a policy.
        is_compiled: whether the decoder's one-token steps run through `torch.compile`.
    """

    cache: str
    budget: Amount | None = None
    is_compiled: bool = False

    @property
    def name(self) -> str:
        """The cache, the budget and the way of decoding: "StaticCache, compiled", "ssd 20%, fast_decode"."""
        amount = f"{100 * self.budget:g}%" if isinstance(self.budget, float) else str(self.budget or "")
        compiled = (", compiled" if self.is_full else ", fast_decode") if self.is_compiled else ""
        return f"{self.cache} {amount}".strip() + compiled

    @property
    def is_full(self) -> bool:
        """Whether it is one of transformers' own caches."""
        return self.cache in RIVALS

    def make_cache(self, subject: Subject) -> Cache:
        """Make a new cache, long enough for a whole image; raises ValueError for policy settings out of range."""
        if self.cache == "DynamicCache":
            return DynamicCache()
        if self.cache == "StaticCache":
            return StaticCache(config=subject.config, max_cache_len=subject.length)
        return self.make_ssd(subject.head_map)

    def make_ssd(self, head_map: HeadMap) -> SSDCache:
        """Make the cache of a policy."""
        return parse_policy(self.cache).make_cache(head_map, 1.0 if self.budget is None else self.budget)

    @contextmanager
    def running(self, subject: Subject) -> Iterator[None]:
        """Set the best attention for this cache, and compiled steps if `is_compiled`; restore the model at the end."""
        steps = (compiled_steps if self.is_full else fast_decode) if self.is_compiled else nullcontext
        with ssd_attention(subject.model, "sdpa" if self.is_full else NAME), steps(subject.model):
            yield


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


def choose_cases(
    head_map: HeadMap,
    *,
    policies: str | None = None,
    budgets: Sequence[Amount] | None = None,
    names: Sequence[str] | None = None,
    is_compiled: bool = True,
) -> list[Case]:
    """The full caches, then policies at budgets; each policy's settings are checked on the head map.

    Args:
        head_map: the map of the measured model.
        policies: names and settings, as for `parse_policies`. Without policies and budgets: the map's own policy at
            three budgets, and with buffer 1; SSD and the baselines at 20%.
        budgets: budgets of every policy; "full" has only 1.0.
        names: names of the cases to keep.
        is_compiled: also with compiled steps.

    Raises:
        ValueError: an unknown policy or name, or settings out of range.
    """
    cases = [Case(name) for name in RIVALS] + ([Case("StaticCache", is_compiled=True)] if is_compiled else [])
    if policies is None and budgets is None:
        cases += _default_cases(head_map, is_compiled)
    else:
        for policy in resolve_policies(parse_policies(policies or DEFAULT), head_map):
            for budget in policy.budgets(budgets or [0.2]):
                cases += [Case(policy.label, budget)]
                cases += [Case(policy.label, budget, is_compiled=True)] if is_compiled else []
    if names is not None:
        known = [case.name for case in cases]
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no cache {unknown[0]!r}: give names of {'; '.join(known)}")
        cases = [case for case in cases if case.name in names]
    for case in cases:
        if not case.is_full:
            case.make_ssd(head_map)
    return cases


def _default_cases(head_map: HeadMap, is_compiled: bool) -> list[Case]:
    name, settings = own_policy(head_map)
    own = policy_label(name, settings)
    return [
        *(Case(own, budget) for budget in (1.0, 0.5, 0.2)),
        *([Case(own, 0.2, is_compiled=True)] if is_compiled else []),
        Case(policy_label(name, settings | {"buffer": 1}), 0.2),
        *([] if own == "ssd" else [Case("ssd", 0.2)]),
        Case("h2o", 0.2),
        Case("streaming-llm", 0.2),
    ]
