"""From the words of the command line to caches: which policies, which budget, which head map.

All of it is checked on the model's configuration, before its weights are loaded.
"""

from __future__ import annotations

from ssd_cache.cache import POLICIES, SSDCache
from ssd_cache.cli.errors import WrongUse
from ssd_cache.head_map import HeadMap
from ssd_cache.models import Checkpoint
from ssd_cache.rasters import format_rasters

COMPARED = ("full", "ssd", "h2o", "streaming-llm")
"""Rows of the sheet of `--compare`: the policies of the paper's tables; where the map carries it, "learned" as well."""

LABELLED = ("ssd", "learned", "margin")
"""Policies that need to know which head is which."""

ONLINE = "online"
"""In place of a head map: no map; the cache labels the heads."""


def parse_budget(text: str, option: str = "--budget", least: int = 2) -> int | float:
    """A count of tokens from digits alone, `least` or more, else a fraction of the grid: `1` is the whole grid.

    Raises:
        WrongUse: neither.
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
    """The policies to draw with, in the order of the rows; none: by the head map. Raises WrongUse."""
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
) -> dict[str, SSDCache]:
    """A cache for every policy, which checks budget and map; raises ValueError or WrongUse.

    Where the map carries a learned score, "learned" is drawn when no policy was asked for, and compared too.
    The full cache that others are compared with stays in the model's dtype; alone it is quantised as asked.
    """
    rasters = checkpoint.grid, checkpoint.previews
    if isinstance(budget, int) and budget > (cells := checkpoint.num_visual_tokens):
        raise WrongUse(
            f"--budget {budget}: {checkpoint.name} draws {format_rasters(*rasters[::-1], ' x ')} = {cells} visual "
            f"tokens; give at most {cells}, or a fraction up to 1"
        )
    num_layers, num_kv_heads = checkpoint.num_layers, checkpoint.num_kv_heads
    if head_map == ONLINE:
        labels: HeadMap | None = HeadMap.online(num_layers=num_layers, num_kv_heads=num_kv_heads).with_grid(*rasters)
    else:
        labels = checkpoint.head_map(head_map)
    carries = labels is not None and labels.learned is not None
    if not policies:
        policies = ("learned" if carries else "ssd",)
    elif policies == COMPARED and carries:
        policies = ("full", "learned", *COMPARED[1:])
    needy = next((name for name in policies if name in LABELLED), None)
    if labels is None and needy is not None:
        online = f", or {ONLINE!r} to label heads while drawing" if needy == "ssd" else ""
        others = ", ".join(name for name in POLICIES if name not in LABELLED)
        raise WrongUse(
            f"policy {needy} needs a head map, and {checkpoint.name} has none in its folder: give --head-map "
            f"(a map{online}), or another --policy: {others}"
        )
    if labels is None:  # the other policies need the shape alone
        uniform = HeadMap.uniform("semantic", num_layers=num_layers, num_kv_heads=num_kv_heads)
        labels = uniform.with_grid(*rasters)
    checkpoint.check_head_map(labels)
    kinds = {name: None if name == "full" and len(policies) > 1 else kv_dtype for name in policies}
    return {name: SSDCache.from_policy(name, labels, budget, buffer=buffer, kv_dtype=kinds[name]) for name in policies}
