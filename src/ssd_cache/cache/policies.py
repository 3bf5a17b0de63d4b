"""The one registry of cache policies: name, citation, and the map, budget and settings that each applies.

A policy is one function below. `SSDCache.from_policy`, the command line, the evaluation and the bench read the
registry. `evaluation/policies.py` adds the controls of experiments and reads settings in names (`ssd:buffer=8`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ssd_cache.budget import Budget, is_amount
from ssd_cache.cache.scorers import SCORES
from ssd_cache.cache.settings import equal_budget
from ssd_cache.head_map.head_map import HeadMap

Applied = tuple[HeadMap, Budget | None, dict[str, Any]]
"""Map, budget and settings, as arguments of `SSDCache`."""


@dataclass(frozen=True)
class NamedPolicy:
    """One entry of a registry.

    Attributes:
        name: the name, as users write it.
        apply: takes the user's head map and budget; returns the head map, budget and settings for `SSDCache`.
        needs_labels: whether the policy uses the labels of the user's head map, not only its shape.
        citation: paper of the method, or "".
    """

    name: str
    apply: Callable[[HeadMap, Budget | None], Applied]
    needs_labels: bool = True
    citation: str = ""

    @property
    def summary(self) -> str:
        """What the policy does, in one sentence."""
        return (self.apply.__doc__ or "").partition("\n")[0]


def _full(head_map: HeadMap, budget: Budget | None) -> Applied:
    """Keep every token, whatever the budget."""
    return head_map, 1.0, {}


def _ssd(head_map: HeadMap, budget: Budget | None) -> Applied:
    """The paper's policy: the map's labels, equal slots, tokens ranked by the sum of attention."""
    return head_map, budget, {"score": "sum", **_equal_slots(budget)}


def _learned(head_map: HeadMap, budget: Budget | None) -> Applied:
    """The map's labels and slots (equal slots if it carries none), tokens ranked by its learned score."""
    return head_map, budget, {"score": "learned"}


def _online(head_map: HeadMap, budget: Budget | None) -> Applied:
    """Every head semantic, tokens ranked by the leverage of their keys: no map, no queries."""
    online = HeadMap.online(num_layers=head_map.num_layers, num_kv_heads=head_map.num_kv_heads)
    budget = equal_budget(head_map) if budget is None else budget
    return online.with_layout(head_map.layout), budget, {"score": "leverage"}


def _h2o(head_map: HeadMap, budget: Budget | None) -> Applied:
    """Every head semantic, half of its slots for the newest tokens."""
    return *_uniform("semantic", head_map, budget), {"num_recent": 0.5}


def _streaming_llm(head_map: HeadMap, budget: Budget | None) -> Applied:
    """Every head spatial, with 4 sinks. The whole prompt is kept too, so the sinks are the first visual tokens."""
    return *_uniform("spatial", head_map, budget), {"num_sinks": 4}


def _linear(head_map: HeadMap, budget: Budget | None) -> Applied:
    """Every head semantic; at the end of a grid row, drop the tokens that its queries attended to least.

    It also keeps the first tokens and the most recent rows. Their numbers are not public: 4 tokens and one row are our
    choice. The whole prompt is kept too.
    """
    recent = head_map.grid[1]
    return *_uniform("semantic", head_map, budget), {"score": "last", "num_sinks": 4, "num_recent": recent}


def _margin(head_map: HeadMap, budget: Budget | None) -> Applied:
    """The map's labels, equal slots; semantic heads keep the margin columns by position only."""
    return head_map, budget, {"score": "margin", **_equal_slots(budget)}


REGISTRY: Mapping[str, NamedPolicy] = {
    policy.name: policy
    for policy in (
        NamedPolicy("full", _full, needs_labels=False),
        NamedPolicy("ssd", _ssd, citation="Jian and Wang, arXiv 2510.18716"),
        NamedPolicy("learned", _learned),
        NamedPolicy("online", _online, needs_labels=False),
        NamedPolicy("h2o", _h2o, needs_labels=False, citation="Zhang et al., arXiv 2306.14048"),
        NamedPolicy("streaming-llm", _streaming_llm, needs_labels=False, citation="Xiao et al., arXiv 2309.17453"),
        NamedPolicy("linear", _linear, needs_labels=False, citation="LineAR, arXiv 2512.04857"),
        NamedPolicy("margin", _margin),
    )
}

POLICIES = tuple(REGISTRY)
"""Names that `SSDCache.from_policy` accepts."""


def find_policy(name: str) -> NamedPolicy:
    """The policy of a name; raises ValueError for an unknown one."""
    if name not in REGISTRY:
        raise ValueError(f"unknown policy {name!r}; the policies are {', '.join(POLICIES)}")
    return REGISTRY[name]


def own_policy(head_map: HeadMap, *, slots: str | None = None, score: str | None = None) -> tuple[str, dict[str, str]]:
    """Name of the policy that `SSDCache(head_map)` applies, and the settings to add to it.

    Args:
        head_map: any map.
        slots: slots to use instead of the map's own.
        score: score to use instead of the map's own; the returned settings do not contain it.

    Example: a map that was fitted, and carries no learned score.

        >>> import torch
        >>> own_policy(HeadMap(torch.tensor([[True, False]]), budget=[[60, 170]]))
        ('ssd', {'slots': 'fitted'})
    """
    if head_map.is_online and score in (None, "leverage"):
        return "online", {} if slots is None else {"slots": slots}
    own = "uniform" if head_map.budget is None else "fitted"
    is_learned = head_map.learned is not None if score is None else score == "learned"
    name, usual = ("learned", own) if is_learned else ("ssd", "uniform")
    slots = own if slots is None else slots
    return name, {} if slots == usual else {"slots": slots}


def policy_label(name: str, settings: Mapping[str, Any]) -> str:
    """Format a policy's name and its settings, sorted by name: `ssd:buffer=8,slots=fitted`."""
    text = ",".join(f"{key}={settings[key]}" for key in sorted(settings))
    return f"{name}:{text}" if text else name


def words_of(slots: str, score: str) -> str:
    """Describe slots and score in words: "fitted slots, learned score"."""
    return f"{'equal' if slots == 'uniform' else slots} slots, {SCORES[score].words}"


def _equal_slots(budget: Budget | None) -> dict[str, str]:
    """Equal slots where the budget is one number to share."""
    return {"slots": "uniform"} if budget is None or is_amount(budget) else {}


def _uniform(
    kind: Literal["spatial", "semantic"], head_map: HeadMap, budget: Budget | None
) -> tuple[HeadMap, Budget | None]:
    """A map of the same shape in which every head is of one kind, and by default the map's own mean budget."""
    of_kind = HeadMap.uniform(kind, num_layers=head_map.num_layers, num_kv_heads=head_map.num_kv_heads)
    budget = equal_budget(head_map) if budget is None else budget
    return of_kind.with_layout(head_map.layout), budget
