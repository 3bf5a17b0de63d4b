"""Turn command-line arguments into caches: policies, budget and head map.

All checks use only the model's configuration and run before its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.policies import POLICIES, words_of
from ssd_cache.cache.settings import SLOTS
from ssd_cache.cli.errors import WrongUse
from ssd_cache.evaluation.policies import DEFAULT, Policy, resolve_policies
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint

COMPARED = ("full", "ssd", "h2o", "streaming-llm")
"""Policies of `--compare`, as in the paper's tables. The head map's own settings are added to them."""

LABELLED = ("ssd", "learned", "margin")
"""Policies that need a head map's labels."""

ONLINE = "online"
"""Value of `--head-map` for no map: the cache labels the heads during generation."""


def parse_budget(text: str, option: str = "--budget", least: int = 2) -> int | float:
    """Parse a whole number from `least` up as tokens, any other number as a fraction of the grid (`1` is all).

    Raises:
        WrongUse: the text is neither.
    """
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if text.strip().isdecimal() and int(text) >= least:
        return int(text)
    if 0 < amount <= 1:
        return amount
    raise WrongUse(
        f"{option} {text}: give a fraction of the grid above 0 and up to 1 (0.2), or a whole number of visual tokens "
        f"from {least} up (115)"
    )


def choose_policies(policy: str | None, compare: bool) -> tuple[str, ...]:
    """The policies in the order of the rows; empty means the head map's own settings. Raises WrongUse."""
    if compare and policy is not None:
        raise WrongUse(f"--compare draws with {', '.join(COMPARED)}: leave --policy out")
    if policy is not None and policy not in POLICIES:
        raise WrongUse(f"--policy {policy}: the policies are {', '.join(POLICIES)}")
    return COMPARED if compare else () if policy is None else (policy,)


def make_caches(
    checkpoint: Checkpoint,
    policies: tuple[str, ...],
    head_map: str | None,
    budget: int | float | None,
    buffer: int | None,
    kv_dtype: str | None = None,
    slots: str | None = None,
) -> dict[str, SSDCache]:
    """Create a cache for every policy, by its exact name, and check budget and map; raises ValueError or WrongUse.

    Without policies, the map's own settings are used; `--compare` also includes them. `slots` applies only to policies
    that use a map's slots. A full cache beside other policies keeps the model's dtype. A full cache alone is quantised
    by `kv_dtype`.
    """
    if slots is not None and slots not in SLOTS:
        raise WrongUse(f"--slots {slots}: give {' or '.join(SLOTS)}")
    if slots is not None and policies not in ((), COMPARED) and policies[0] not in LABELLED:
        raise WrongUse(f"--slots {slots}: policy {policies[0]} takes no slots of a head map; leave --slots out")
    if isinstance(budget, int) and budget > (cells := checkpoint.num_visual_tokens):
        raise WrongUse(
            f"--budget {budget}: {checkpoint.name} draws {checkpoint.layout.text()} = {cells} visual "
            f"tokens; give at most {cells}, or a fraction up to 1"
        )
    shape: dict[str, Any] = {"num_layers": checkpoint.num_layers, "num_kv_heads": checkpoint.num_kv_heads}
    if head_map == ONLINE:
        labels: HeadMap | None = HeadMap.online(**shape).with_layout(checkpoint.layout)
    else:
        labels = checkpoint.head_map(head_map)
    needy = next((name for name in policies or ("ssd",) if name in LABELLED), None)
    if labels is None and needy is not None:
        online = f", or {ONLINE!r} to label heads while drawing" if needy == "ssd" else ""
        others = ", ".join(name for name in POLICIES if name not in LABELLED)
        raise WrongUse(
            f"policy {needy} needs a head map, and {checkpoint.name} has none in its folder: give --head-map "
            f"(a map{online}), or another --policy: {others}"
        )
    if labels is None:  # the other policies need only the shape
        labels = HeadMap.uniform("semantic", **shape).with_layout(checkpoint.layout)
    checkpoint.check_head_map(labels)
    return {
        policy.label: SSDCache.from_policy(
            policy.name,
            labels,
            budget,
            buffer=buffer,
            kv_dtype=None if policy.name == "full" and len(policies) > 1 else kv_dtype,
            **policy.settings,
        )
        for policy in _named(policies, labels, slots)
    }


def described(caches: Mapping[str, SSDCache]) -> str:
    """Slots and score of the policies that use a map's labels, in words, each after a semicolon."""
    own = {label: cache for label, cache in caches.items() if label.partition(":")[0] in LABELLED}
    return "".join(f"; {label}: {words_of(cache.slots, cache.score)}" for label, cache in own.items())


def _named(policies: tuple[str, ...], labels: HeadMap, slots: str | None) -> list[Policy]:
    """The policies by their exact names, each once. `slots` applies to the chosen policy, not to those beside it."""
    asked = MappingProxyType({} if slots is None else {"slots": slots})
    nothing: MappingProxyType = MappingProxyType({})
    if len(policies) == 1:
        usual = slots == "uniform" and policies[0] in ("ssd", "margin")  # the name already implies equal slots
        return [Policy(policies[0], nothing if usual else asked)]
    default = Policy(DEFAULT, asked)
    chosen = [Policy(name, nothing) for name in policies]
    return resolve_policies([*chosen[:1], default, *chosen[1:]], labels)
