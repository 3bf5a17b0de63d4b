"""The compared caches: transformers' full caches in their best configuration, and cache policies by budget.

Both run eager and compiled. A case holds a name and settings in plain values, so that it can be sent to another
process. It makes a new cache for every use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache, cache_utils

from ssd_cache.bench.subject import Subject
from ssd_cache.budget import Amount
from ssd_cache.cache.attention import NAME
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.policies import own_policy, policy_label
from ssd_cache.decode.fast_decode import fast_decode
from ssd_cache.evaluation.policies import Policy, parse_policy
from ssd_cache.head_map.head_map import HeadMap

FULL_CACHES = ("DynamicCache", "StaticCache", "QuantizedCache")
RIVALS = ("DynamicCache", "StaticCache")
"""Caches that serve as baselines in the speed tables."""

QUANTIZED_BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}
"""Four-bit backends of `QuantizedCache`, and the module that each needs; "fp8" needs none."""


@dataclass(frozen=True)
class Case:
    """A cache to measure.

    Attributes:
        cache: one of `FULL_CACHES`, or a policy with settings in the format of `evaluation.policies`: `ssd:buffer=1`.
        budget: visual tokens per head, for a policy.
        backend: backend of the QuantizedCache.
        is_compiled: whether the decoder's one-token steps run through `torch.compile`.
    """

    cache: str
    budget: Amount | None = None
    backend: str | None = None
    is_compiled: bool = False

    @property
    def name(self) -> str:
        words = [self.cache]
        if isinstance(self.budget, float):
            words.append(f"{100 * self.budget:g}%")
        elif self.budget is not None:
            words.append(str(self.budget))
        if self.backend is not None:
            words.append(self.backend)
        compiled = ", compiled" if self.is_full else ", fast_decode"
        return " ".join(words) + (compiled if self.is_compiled else "")

    @property
    def is_full(self) -> bool:
        """Whether it is one of transformers' own caches."""
        return self.cache in FULL_CACHES

    def make_cache(self, subject: Subject) -> Cache:
        """Make a new cache, long enough for a whole image; raises ValueError for policy settings out of range."""
        if self.cache == "DynamicCache":
            return DynamicCache()
        if self.cache == "StaticCache":
            return StaticCache(config=subject.config, max_cache_len=subject.length)
        if self.cache == "QuantizedCache":
            return QuantizedCache(self.backend, subject.config)
        return self.make_ssd(subject.head_map)

    def make_ssd(self, head_map: HeadMap) -> SSDCache:
        """Make the cache of a policy."""
        return parse_policy(self.cache).make_cache(head_map, 1.0 if self.budget is None else self.budget)

    @contextmanager
    def running(self, subject: Subject) -> Iterator[None]:
        """Set the best attention for this cache, and compiled steps if `is_compiled`; restore the model at the end."""
        before = subject.config._attn_implementation
        subject.set_attention("sdpa" if self.is_full else NAME)
        try:
            if not self.is_compiled:
                yield
            else:
                with compiled_steps(subject.model) if self.is_full else fast_decode(subject.model):
                    yield
        finally:
            subject.set_attention(before)


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


def rivals(is_compiled: bool = True) -> tuple[list[Case], list[str]]:
    """The full caches that work in this environment, and a line on each that does not."""
    cases, left_out = [Case("DynamicCache"), Case("StaticCache")], []
    if is_compiled:
        cases.append(Case("StaticCache", is_compiled=True))
    if hasattr(cache_utils, "Fp8QuantizedLayer"):
        cases.append(Case("QuantizedCache", backend="fp8"))
    else:
        left_out.append("QuantizedCache of fp8: this version of transformers has none (pip install -U transformers)")
    found = [name for name, module in QUANTIZED_BACKENDS.items() if _can_import(module)]
    cases += [Case("QuantizedCache", backend=name) for name in found[:1]]
    if not found:
        left_out.append("QuantizedCache of 4 bits: no optimum-quanto or hqq here (pip install optimum-quanto)")
    return cases, left_out


def default_cases(is_compiled: bool = True, head_map: HeadMap | None = None) -> list[Case]:
    """The head map's own policy at three budgets, compiled, and with buffer 1; SSD and the baselines at 20%.

    Without a map, or with a map that has neither slots nor a learned score, the own policy is SSD with equal slots.
    """
    name, settings = ("ssd", {}) if head_map is None else own_policy(head_map)
    own = policy_label(name, settings)
    return [
        Case(own, 1.0),
        Case(own, 0.5),
        Case(own, 0.2),
        *([Case(own, 0.2, is_compiled=True)] if is_compiled else []),
        Case(policy_label(name, settings | {"buffer": 1}), 0.2),
        *([] if own == "ssd" else [Case("ssd", 0.2)]),
        Case("h2o", 0.2),
        Case("streaming-llm", 0.2),
    ]


def product_cases(policies: Sequence[Policy], budgets: Sequence[Amount], is_compiled: bool = True) -> list[Case]:
    """Every policy at every budget, eager and, if `is_compiled`, also compiled; "full" has one budget."""
    cases = []
    for policy in policies:
        for budget in policy.budgets(budgets):
            cases.append(Case(policy.label, budget))
            if is_compiled:
                cases.append(Case(policy.label, budget, is_compiled=True))
    return cases


def choose(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Select cases by name, in the order of `cases`.

    Raises:
        ValueError: a name that no case has.
    """
    known = [case.name for case in cases]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no cache {unknown[0]!r}: give names of {'; '.join(known)}")
    return [case for case in cases if case.name in names]


def _can_import(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
