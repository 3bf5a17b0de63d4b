"""The plan of a `generate` call: policies, budget and head map become caches, and all options one checked job.

All checks use only the model's configuration and run before its weights are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ssd_cache.budget import Amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.cli.errors import WrongUse, refusing
from ssd_cache.cli.loading import load_generator
from ssd_cache.decode.fast_decode import fast_decode
from ssd_cache.evaluation.policies import DEFAULT, Policy, choose_head_map, resolve_policies
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint, Generator, ResolvedSampling
from ssd_cache.runs.batching import default_batch_size, image_nbytes
from ssd_cache.runs.processes import Processes

COMPARED = ("full", "ssd", "h2o", "streaming-llm")
"""Policies of `--compare`, as in the paper's tables. The head map with its default settings is added to them."""

ONLINE = "online"
"""Value of `--head-map` for no map: the cache ranks tokens by their keys alone."""


@dataclass(frozen=True)
class Job:
    """The checked options of a `generate` call; `texts` has the prompt of every image."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    texts: list[str]
    num_images: int  # of each prompt
    caches: Mapping[str, SSDCache]  # by the policies' exact names
    sampling: ResolvedSampling
    batch_size: int | None  # None means the one recorded in a folder, else the default
    fast: bool
    processes: Processes

    def load(self) -> Generator:
        """Load the model, and refuse a prompt that leaves no room for the image."""
        generator = load_generator(self.checkpoint, self.dtype, self.device)
        with refusing():
            generator.check_prompts(self.texts)
        return generator

    def default_batch_size(self, generator: Generator) -> int:
        """The default batch size for the cache that takes the most memory."""
        largest = max(self.caches.values(), key=lambda cache: image_nbytes(generator, 0, cache))
        return default_batch_size(generator, self.texts, cache=largest, processes=self.processes)

    def compiled(self, generator: Generator) -> AbstractContextManager:
        """Context in which decode steps are compiled if the user asked for it."""
        return fast_decode(generator.model) if self.fast else nullcontext()

    def words(self, batch_size: int) -> str:
        """The settings of the run, for messages."""
        batch = min(batch_size, len(self.texts))
        return f"batch {batch}, {words_of_run(self.checkpoint, self.dtype, self.device, self.sampling)}"


def words_of_run(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, sampling: ResolvedSampling) -> str:
    """The model and the settings of generation, for messages."""
    return (
        f"{checkpoint.name} on {device}, {str(dtype).removeprefix('torch.')}, guidance {sampling.guidance_scale:g}, "
        f"temperature {sampling.temperature:g}, seed {sampling.seed}"
    )


def parse_budget(text: str, option: str = "--budget", least: int = 2) -> Amount:
    """Parse a whole number from `least` up as tokens, else a fraction of the grid (`1` is all); raises WrongUse."""
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


def choose_policies(policy: str | None, compare: bool, slots: str | None) -> list[Policy]:
    """The policies in the order of the result table's rows; `slots` does not apply to those that `--compare` adds."""
    if compare and policy is not None:
        raise WrongUse(f"--compare generates with {', '.join(COMPARED)}: leave --policy out")
    if slots == "uniform" and policy in ("ssd", "margin"):  # the name already implies equal slots
        slots = None
    chosen = Policy(policy or DEFAULT, MappingProxyType({} if slots is None else {"slots": slots}))
    others = [Policy(name, MappingProxyType({})) for name in COMPARED]
    return [others[0], chosen, *others[1:]] if compare else [chosen]


def make_caches(
    checkpoint: Checkpoint,
    policies: list[Policy],
    head_map: str | None,
    budget: Amount | None,
    buffer: int | None,
    kv_dtype: str | None,
) -> dict[str, SSDCache]:
    """Create a cache for every policy, by its exact name; raises ValueError or WrongUse.

    `kv_dtype` quantises a full cache only if it is the only policy; in a comparison it keeps the model's dtype.
    """
    if head_map == ONLINE:
        labels = HeadMap.online(num_layers=checkpoint.num_layers, num_kv_heads=checkpoint.num_kv_heads)
        labels = labels.with_layout(checkpoint.layout)
    else:
        labels = choose_head_map(checkpoint, head_map, policies)
    return {
        policy.label: SSDCache.from_policy(
            policy.name,
            labels,
            budget,
            buffer=buffer,
            kv_dtype=None if policy.name == "full" and len(policies) > 1 else kv_dtype,
            **policy.settings,
        )
        for policy in resolve_policies(policies, labels)
    }
