"""Turns policy names such as `ssd`, `random-1` or `ssd:buffer=8,num_recent=0.5` into fresh caches.

It adds to the registry of `cache/policies.py`: fitted slots, two controls, and head maps in folders. The rules of
retention are in `cache/`; nothing is generated here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ssd_cache.budget import Amount, Budget, is_amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.policies import POLICIES, REGISTRY, Applied, NamedPolicy, own_policy, policy_label
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.io.showing import suggestion
from ssd_cache.models import Checkpoint
from ssd_cache.profiling.allocation import fit_heads

RANDOM = re.compile(r"random-(\d{1,9})")
DEFAULT = "default"
"""Name for the head map's default settings; `resolve_policies` replaces it by the policy that these settings make."""


def _fitted(head_map: HeadMap, budget: Budget | None) -> Applied:
    """Kinds and slots of each head from `fit_heads`, at every budget."""
    assert is_amount(budget)
    return fit_heads(head_map, budget), None, {"score": "sum"}


def _inverted(head_map: HeadMap, budget: Budget | None) -> Applied:
    """A control: spatial heads treated as semantic, and semantic heads as spatial."""
    return ~head_map, budget, {"slots": "uniform"}


EXPERIMENTS = {
    policy.name: policy
    for policy in (
        NamedPolicy("fitted", _fitted),
        NamedPolicy("inverted", _inverted),
    )
}
"""Policies in addition to the registry of `cache/policies.py`."""

OWN = (DEFAULT, *EXPERIMENTS, "random-N")
"""Names in addition to `POLICIES`. `random-N` is a control: as many spatial heads, placed at random with seed N."""

WITHOUT_LABELS = tuple(name for name, policy in {**REGISTRY, **EXPERIMENTS}.items() if not policy.needs_labels)
"""Policies that use only the shape of a head map."""


def _find(name: str) -> NamedPolicy | None:
    """The policy of a name, with `random-N`; None for an unknown name, which may be a folder."""
    if match := RANDOM.fullmatch(name):
        seed = int(match[1])
        return NamedPolicy(name, lambda head_map, budget: (random_map(head_map, seed), budget, {}))
    return REGISTRY.get(name) or EXPERIMENTS.get(name)


SETTINGS = ("buffer", "num_recent", "num_sinks", "score", "slots", "kv_dtype")
"""Settings of `SSDCache` that a policy name may contain. A value is a count, a fraction or a name."""


def _value(text: str) -> Any:
    if text.isdecimal():
        return int(text)
    if re.fullmatch(r"\d*\.\d+", text):
        return float(text)
    if re.fullmatch(r"[A-Za-z][\w-]*", text):
        return text
    raise ValueError("give a whole number (8), a fraction (0.5) or a name")


@dataclass(frozen=True)
class Policy:
    """One of the policies to compare: a name and the settings in it.

    Attributes:
        name: one of `POLICIES`, one of `OWN`, or a folder with a head map, which is used with its default settings.
        settings: settings of `SSDCache` for this policy; they take precedence over those of the whole run.
    """

    name: str
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The name with its settings in canonical spelling, used in results."""
        return policy_label(self.name, self.settings)

    @property
    def needs_labels(self) -> bool:
        """Whether the policy uses the labels of the run's head map; a folder has its own map."""
        return self.name not in WITHOUT_LABELS and _is_known(self.name)

    def budgets(self, budgets: Sequence[Amount]) -> list[Amount]:
        """The budgets of the run without duplicates; for the full cache, only 1.0."""
        return [1.0] if self.name == "full" else list(dict.fromkeys(budgets))

    def make_cache(self, head_map: HeadMap, budget: Amount, **settings) -> SSDCache:
        """A fresh cache.

        Args:
            head_map: the run's map; every policy uses its shape, and those with `needs_labels` its labels.
            budget: visual tokens a head may hold, as for `SSDCache`; `fitted` distributes its bytes over the heads.
            settings: settings of the whole run, as for `SSDCache`; the full cache ignores them.

        Raises:
            ValueError: a setting or budget is out of range, or a map does not fit.
        """
        if self.name == DEFAULT:
            return _resolved(self, head_map, settings).make_cache(head_map, budget, **settings)
        if self.name == "full":
            return SSDCache.from_policy("full", head_map)
        policy = _find(self.name)
        if policy is None:
            own_map = HeadMap.from_pretrained(self.name)
            shape = head_map.num_layers, head_map.num_kv_heads
            own_map.check_fits("the model", *shape, layout=head_map.layout)
            own: dict[str, Any] = {}
        else:
            own_map, budget, own = policy.apply(head_map, budget)  # type: ignore[assignment]
        return SSDCache(own_map, budget, **{**own, **settings, **self.settings})


def random_map(head_map: HeadMap, seed: int) -> HeadMap:
    """A control for the value of labels: a map with the same shape and number of spatial heads, placed at random."""
    labels = head_map.is_spatial.flatten()
    order = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(seed))
    labels = labels[order].view_as(head_map.is_spatial)
    return HeadMap(labels, method=f"random, seed {seed}").with_layout(head_map.layout)


def resolve_policies(
    policies: Sequence[Policy], head_map: HeadMap, settings: Mapping[str, Any] = MappingProxyType({})
) -> list[Policy]:
    """The policies without duplicates, with `default` replaced by the policy that the head map uses by default.

    The name in a table then says which policy ran: `learned`, `ssd:slots=fitted` or `ssd`. A score in `settings`, those
    of the whole run, takes precedence over the map's own.
    """
    resolved = [_resolved(policy, head_map, settings) for policy in policies]
    return list({policy.label: policy for policy in resolved}.values())


def _resolved(policy: Policy, head_map: HeadMap, run: Mapping[str, Any]) -> Policy:
    if policy.name != DEFAULT:
        return policy
    own = {name: value for name, value in policy.settings.items() if name != "slots"}
    score = own.get("score", run.get("score"))
    name, settings = own_policy(head_map, slots=policy.settings.get("slots"), score=score)
    implied = {"learned": "learned", "online": "leverage", "ssd": "sum"}
    if own.get("score") == implied[name]:
        del own["score"]
    return Policy(name, MappingProxyType(own | settings))


def choose_head_map(checkpoint: Checkpoint, name: str | None, policies: Sequence[Policy]) -> HeadMap:
    """The head map of a run: the named one, or the checkpoint's, or one with the right shape if no policy needs labels.

    Raises:
        ValueError: a policy needs labels and there is no map, the map cannot be read, or its shape does not fit.
    """
    if name == "online":
        raise ValueError("--head-map online: online labels are a policy here: give the policy online")
    head_map = checkpoint.head_map(name)
    wanting = [policy.label for policy in policies if policy.needs_labels]
    if head_map is None and wanting:
        raise ValueError(
            f"{', '.join(wanting)} needs a head map, and {checkpoint.name} has none in its folder: give --head-map, or "
            f"other policies ({', '.join(WITHOUT_LABELS)})"
        )
    if head_map is None:
        num_layers, num_kv_heads = checkpoint.num_layers, checkpoint.num_kv_heads
        head_map = HeadMap.uniform("semantic", num_layers=num_layers, num_kv_heads=num_kv_heads)
        head_map = head_map.with_layout(checkpoint.layout)
    checkpoint.check_head_map(head_map)
    return head_map


def parse_policies(text: str) -> list[Policy]:
    """The policies of a comma-separated list, without duplicates: `full,ssd:score=mean,num_recent=0.5,h2o` has three.

    Raises:
        ValueError: the list is empty, a name is unknown (the nearest one is suggested), or a setting cannot be read.
    """
    parts: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if re.match(r"\w+\s*=", part) and not Path(part).is_dir():  # another setting of the previous policy
            if not parts or ":" not in parts[-1]:
                raise ValueError(f"{part!r} is a setting without a policy: write it as ssd:{part}")
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    policies = [parse_policy(part) for part in parts]
    return list({policy.label: policy for policy in policies}.values())


def parse_policy(text: str) -> Policy:
    """One policy: a name, or a name, a colon and settings; raises ValueError as `parse_policies` does."""
    name, colon, rest = text.strip().rpartition(":")
    if not colon or "=" not in rest:  # no settings; the name of a folder may contain a colon
        name, rest = text.strip(), ""
    if not name or (not _is_known(name) and not Path(name).expanduser().is_dir()):
        known = [*POLICIES, *OWN]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown policy {name!r}; {hint}The policies are {', '.join(known)}, and any folder with a head map"
        )
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in SETTINGS:
            raise ValueError(
                f"policy {text!r}: unknown setting {key!r}{suggestion(key, SETTINGS)}; the settings are "
                f"{', '.join(SETTINGS)}"
            )
        if key in settings:
            raise ValueError(f"policy {text!r}: {key} is given twice; give it once")
        try:
            settings[key] = _value(value)
        except ValueError as error:
            raise ValueError(f"policy {text!r}: {key}={value!r} cannot be read: {error}") from error
    if name == "full" and settings:
        raise ValueError(f"policy {text!r}: the full cache keeps everything, so it takes no settings; write full")
    return Policy(name, MappingProxyType(settings))


def budget_name(budget: Amount) -> str:
    """`20%`, or `115 tokens`."""
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:g}%"


def _is_known(name: str) -> bool:
    return name == DEFAULT or _find(name) is not None
