"""The conditions of a result: versions, weights, device, prompts, generation settings, and the settings of its cache.

Results of several policies may be compared only if `run_conditions` are equal. All are known before weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import ssd_cache
from ssd_cache.budget import Amount
from ssd_cache.cache.cache import SSDCache
from ssd_cache.evaluation.policies import SETTINGS
from ssd_cache.head_map.head_map import HeadMap
from ssd_cache.models import Checkpoint, ResolvedSampling


def hashed_seed(seed: int, batch: int) -> int:
    """torch's seed for a batch; it depends only on these two numbers, so every policy uses the same random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {batch}".encode()).digest()[:8], "big") >> 1


def run_conditions(
    checkpoint: Checkpoint,
    prompts: Sequence[tuple[str, str]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    sampling: ResolvedSampling,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The conditions of a run as JSON values; `prompts` are (kind, caption), `settings` those of every cache."""
    return {
        **checkpoint.layout.as_json(),
        "ssd_cache": ssd_cache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "model_sha256": model_sha256(checkpoint),
        "prompts_sha256": sha256_of_prompts(prompts),
        "batch_size": batch_size,
        "seeds": "first 63 bits of sha256('seed batch')",
        "guidance_scale": sampling.guidance_scale,
        "temperature": sampling.temperature,
        "settings": dict(settings),
    }


def sha256_of_prompts(prompts: Sequence[tuple[str, str]]) -> str:
    """Checksum of (kind, caption) pairs."""
    return hashlib.sha256("\n".join(f"{kind}\t{caption}" for kind, caption in prompts).encode()).hexdigest()


def image_settings(
    benchmark: str,
    cache: SSDCache,
    policy: str,
    budget: Amount,
    *,
    model: str,
    seed: int,
    num_prompts: int,
    num_samples: int,
    conditions: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings that a folder of a benchmark's images records, with everything that the images depend on.

    Args:
        benchmark: its name.
        cache: a cache of the policy.
        policy: exact name of the policy.
        budget: of the cache.
        model: name of the model.
        seed: of the run.
        num_prompts, num_samples: prompts, and images of each.
        conditions: as from `run_conditions`; the settings of the cache replace those in it.
    """
    facts = cache_facts(cache)
    return {
        "format": f"ssd-cache {benchmark} export 1",
        "model": model,
        "policy": policy,
        "budget": budget,
        "num_slots": facts["num_slots"],
        "slots": f"{facts['slots']} {facts['slots_sha256']}",
        "head_map": facts["head_map"],
        "seed": seed,
        "num_prompts": num_prompts,
        "num_samples": num_samples,
        **conditions,
        "settings": {name: facts[name] for name in SETTINGS if name != "slots"},
    }


def digest_of(head_map: HeadMap) -> str:
    """The identifier of a map's labels in results: its digest, or "online"."""
    return "online" if head_map.is_online else head_map.digest


def cache_facts(cache: SSDCache) -> dict[str, Any]:
    """The settings that determine which tokens a cache keeps, as JSON values."""
    slots = [list(layer) for layer in cache.num_slots]
    return {
        "head_map": digest_of(cache.head_map),
        "num_slots": cache.mean_slots,
        "slots_sha256": hashlib.sha256(json.dumps(slots).encode()).hexdigest()[:12],
        **{name: getattr(cache, name) for name in SETTINGS},
    }


def model_sha256(checkpoint: Checkpoint) -> str:
    """Checksum of the model: over weights and JSON files for a folder, over repository and commit for the Hub."""
    folder, found = Path(checkpoint.source), hashlib.sha256()
    if not folder.is_dir():
        found.update(f"{checkpoint.source}@{getattr(checkpoint.config, '_commit_hash', None)}".encode())
        return found.hexdigest()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json")):
        with path.open("rb") as file:
            found.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
