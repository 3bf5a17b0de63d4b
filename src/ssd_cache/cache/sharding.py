"""Tensor parallel models: the KV heads of every layer that this process holds, and a check that all have the same map.

transformers splits a layer's heads over the processes into equal parts, in order, when it loads the model
(`DistributedConfig(tp_plan="auto")`). The cache of each process uses the part of head map and budget for its heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed
from transformers import PreTrainedModel

from ssd_cache.head_map.head_map import HeadMap, HeadMapError

if TYPE_CHECKING:  # torch may be built without its distributed part
    from torch.distributed.device_mesh import DeviceMesh


def shard_of(model: PreTrainedModel) -> tuple[int, int]:
    """Index of this process (from 0) among those that share the model's heads, and the number of these processes."""
    mesh = _mesh(model)
    return (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())


def is_distributed() -> bool:
    """Whether this process is one of a group; False if torch was built without its distributed part."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def own_heads(head_map: HeadMap, shard: tuple[int, int]) -> slice:
    """The KV heads that one process holds in every layer; `shard` is (index of the process, number of processes).

    Raises ValueError for an index out of range, and HeadMapError if the heads cannot be split evenly.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard={shard}: give (number of this process, number of processes), counting from 0")
    held, rest = divmod(head_map.num_kv_heads, count)
    if rest:
        raise HeadMapError(
            f"{count} processes cannot share the {head_map.num_kv_heads} KV heads of the head map "
            f"({head_map.origin}) evenly: use a number of processes that divides {head_map.num_kv_heads}"
        )
    return slice(index * held, (index + 1) * held)


def check_whole(model: PreTrainedModel) -> None:
    """Raise ValueError for a tensor parallel model, for work that needs all heads in one process."""
    index, count = shard_of(model)
    if count > 1:
        raise ValueError(
            f"this {type(model).__name__} is tensor parallel, and process {index} of {count} has only its own heads, "
            "but heads are measured on a whole model. Load it without tp_plan, with device_map='auto' if one device "
            "is too small for it. Several processes can share the images (`accelerate launch`)"
        )


def check_agreement(model: PreTrainedModel, head_map: HeadMap, settings: Mapping[str, Any]) -> None:
    """Raise HeadMapError in every process of a tensor parallel model if their maps or settings differ.

    With different maps, the processes would keep different tokens. Every process must call this function. For a model
    in one process it does nothing.
    """
    mesh = _mesh(model)
    if mesh is None:
        return
    mine = f"head map {head_map.digest} ({head_map.origin}) and settings {dict(settings)}"
    same = f"{head_map.digest} {head_map.is_online} {head_map.budget} {dict(settings)}"
    told: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(told, (same, mine), group=mesh.get_group())
    for number, (other, words) in enumerate(told):
        if other != told[0][0]:
            raise HeadMapError(
                f"the processes of this tensor parallel model do not agree: process 0 has {told[0][1]}, process "
                f"{number} has {words}; give all of them the same"
            )


def _mesh(model: PreTrainedModel) -> DeviceMesh | None:
    """The processes over which the model's heads are split; None for a model in one process."""
    if (getattr(model, "tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh
