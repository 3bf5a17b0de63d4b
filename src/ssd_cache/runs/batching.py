"""The default batch size: a fixed number of images, halved until the batch fits into free memory.

Images depend on the batch size, since the images of a batch share a seed. So the number is fixed while memory suffices,
and because it is halved, small changes of free memory do not change it. An explicit batch size is never changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ssd_cache.cache.cache import SSDCache
from ssd_cache.cache.quantized import slot_nbytes
from ssd_cache.models import Generator
from ssd_cache.runs.processes import Processes

MAX_IMAGES = 32
"""Maximum number of images in one batch of `ssd-cache generate` when no batch size is given."""

USABLE = 0.7
"""Fraction of the free memory that a batch's K and V may take; the rest is for activations and copies."""

CGROUP = Path("/sys/fs/cgroup")
"""The folder in which Linux (cgroup v2) reports the memory limit of this container."""


def default_batch_size(
    generator: Generator,
    prompts: Sequence[str],
    most: int = MAX_IMAGES,
    *,
    cache: SSDCache | None = None,
    processes: Processes | None = None,
) -> int:
    """Images per batch: `most`, halved until the batch takes at most `USABLE` of the free memory.

    Args:
        generator: a loaded generator, so that its weights are no longer part of the free memory.
        prompts: all prompts; the longest one determines the memory.
        most: the number to start from.
        cache: the cache that is used, with its budget; a full cache when not given.
        processes: the processes that share the run. All must call this function, and all get the smallest result.

    Warns:
        UserWarning: the number was reduced.
    """
    processes = Processes() if processes is None else processes
    device, size = generator.model.device, most
    free = free_memory(device)
    if free is not None:
        free //= processes.count if device.type == "cpu" else 1
        of_image = image_nbytes(generator, longest_prompt(prompts), cache)
        size = fitting_batch_size(most, of_image, free)
    size = min(processes.gather_all(size))
    if size < min(most, len(prompts)) and processes.is_main:
        warnings.warn(
            f"{size} image(s) are generated at once instead of {most}: the free memory of {device} holds no more; "
            "give a batch size to choose another number",
            stacklevel=2,
        )
    return size


def fitting_batch_size(most: int, of_image: int, free: int, unit: int = 1) -> int:
    """`most`, halved until that many images of `of_image` bytes take at most `USABLE` of `free` bytes.

    A reduced number is a multiple of `unit`, and at least `unit`.
    """
    size = most
    while size > unit and size * of_image > USABLE * free:
        size = max(unit, size // 2 // unit * unit)
    return size


def longest_prompt(prompts: Sequence[str]) -> int:
    """A high estimate of the longest prompt's tokens, including the chat template, without the tokenizer."""
    return max(len(prompt.encode()) for prompt in prompts) // 3 + 64


def image_nbytes(generator: Generator, num_prompt: int, cache: SSDCache | None = None) -> int:
    """Bytes of K and V of one image at its last token, in all batch rows that guidance uses for it.

    Args:
        num_prompt: tokens of the prompt.
        cache: the cache that is used; a full cache when not given.
    """
    checkpoint, itemsize = generator.checkpoint, generator.model.dtype.itemsize
    config = checkpoint.family.text_config_of(checkpoint.config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, cells = checkpoint.num_layers * checkpoint.num_kv_heads, checkpoint.num_visual_tokens
    of_token = slot_nbytes(head_dim, itemsize, None)
    of_row = heads * (num_prompt + cells) * of_token
    if cache is not None:
        slots = sum(min(held, cells) for layer in cache.layers for held in layer.plan.num_slots)
        of_row = heads * num_prompt * of_token + slots * slot_nbytes(head_dim, itemsize, cache.kv_dtype)
    return len(generator.is_unconditional(1)) * of_row


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on a device can take; None where the system does not report it.

    On a CPU: what Linux has available without swapping, and what a container's limit (cgroup v2) leaves. Page cache
    that can be dropped counts as free.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    found = []
    if device.type == "cpu":
        with suppress(OSError, ValueError):
            found.append(1024 * _entry(Path("/proc/meminfo"), "MemAvailable:"))
        with suppress(OSError, ValueError):
            limit = int((CGROUP / "memory.max").read_text("ascii"))  # without a limit this is "max", a ValueError
            used = int((CGROUP / "memory.current").read_text("ascii"))
            found.append(max(0, limit - used + _entry(CGROUP / "memory.stat", "inactive_file")))
    return min(found, default=None)


def _entry(path: Path, name: str) -> int:
    """The integer after `name` in a file with a name and an integer per line, such as /proc/meminfo."""
    [line] = [line for line in path.read_text("ascii").splitlines() if line.split()[:1] == [name]]
    return int(line.split()[1])
