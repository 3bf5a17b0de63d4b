"""The models of the demo: those that come with the package, and one that the operator names.

A visitor chooses among loaded models and names of policies. Folders and Hub ids are the operator's alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.policies import POLICIES
from ssd_cache.evaluation.policies import (
    DEFAULT,
    WITHOUT_LABELS,
    choose_head_map,
    parse_policy,
    resolve_policies,
)
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.io.showing import shown
from ssd_cache.models import Checkpoint, Generator
from ssd_cache.prompts import default_prompts


@dataclass(frozen=True)
class DemoModel:
    """A loaded model, its head map, and the policies that a visitor may choose, by their exact names."""

    generator: Generator
    head_map: HeadMap
    policies: tuple[str, ...]

    @property
    def example(self) -> str:
        """A prompt that the model knows."""
        return max(default_prompts(self.generator.checkpoint)[:8], key=len)

    def make_cache(self, policy: object, budget: object) -> SSDCache:
        """A fresh cache; raises ValueError for a policy that is not offered, or a budget out of range."""
        if not isinstance(policy, str) or policy not in self.policies:
            raise ValueError(f"unknown policy {shown(policy)}; the policies here are {', '.join(self.policies)}")
        if not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ValueError(f"budget={shown(budget)} is out of range: give a fraction above 0 and up to 1")
        return parse_policy(policy).make_cache(self.head_map, float(budget))


def offered_policies(checkpoint: Checkpoint, head_map: str | None = None) -> tuple[HeadMap, tuple[str, ...]]:
    """The head map of a model and the names of its policies, before weights are loaded.

    Args:
        checkpoint: the model, as `find_generator` finds it.
        head_map: as for `Checkpoint.head_map`. Without a map, only policies that need no labels are offered.

    Raises:
        GeneratorError: the model's tokens cannot be decoded to images.
        HeadMapError: the map cannot be read, or does not fit.
    """
    checkpoint.check_decodable()
    names = WITHOUT_LABELS if checkpoint.head_map(head_map) is None else (DEFAULT, *POLICIES)
    labels = choose_head_map(checkpoint, head_map, ())
    resolved = resolve_policies([parse_policy(name) for name in names if name != "full"], labels)
    return labels, tuple(policy.label for policy in resolved if policy.name != "learned" or labels.learned is not None)
