"""The default batch size: a fixed number of images, halved until the batch fits into free memory.

Images depend on the batch size, since the images of a batch share a seed. So the number is fixed while memory suffices,
and because it is halved, small changes of free memory do not change it. An explicit batch size is never changed.
"""

from __future__ import annotations

import os
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


def default_batch_size(
    generator: Generator,
    prompts: Sequence[str],
    most: int = MAX_IMAGES,
    *,
    cache: SSDCache | None = None,
    unit: int = 1,
    processes: Processes | None = None,
) -> int:
    """Images per batch: `most`, halved until the batch fits into free memory.

    Args:
        generator: a loaded generator, so that its weights are no longer part of the free memory.
        prompts: all prompts; the longest one determines the memory.
        most: the number to start from.
        cache: the cache that is used, with its budget; a full cache when not given.
        unit: the result is a multiple of this number.
        processes: the processes that share the run. All must call this function, and all get the smallest result.

    Warns:
        UserWarning: the number was reduced.
    """
    processes = Processes() if processes is None else processes
    device, size = generator.model.device, most
    free = free_memory(device)
    if free is not None:
        free //= processes.count if device.type == "cpu" else 1
        of_image = image_nbytes(generator, max(map(_num_tokens, prompts)), cache)
        size = fitting_batch_size(most, of_image, free, unit)
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


def image_nbytes(generator: Generator, num_prompt: int, cache: SSDCache | None = None) -> int:
    """Bytes of K and V of one image at its last token, in all batch rows that guidance uses for it.

    Args:
        generator: the generator; only its configuration is read.
        num_prompt: tokens of the prompt.
        cache: the cache that is used; a full cache when not given.
    """
    checkpoint = generator.checkpoint
    config = checkpoint.family.text_config_of(checkpoint.config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_token = slot_nbytes(head_dim, generator.model.dtype.itemsize, None)
    heads, cells = checkpoint.num_layers * checkpoint.num_kv_heads, checkpoint.num_visual_tokens
    if cache is None:
        of_row = heads * (num_prompt + cells) * of_token
    else:
        slots = sum(min(held, cells) for layer in cache.layers for held in layer.plan.num_slots)
        of_slot = slot_nbytes(head_dim, generator.model.dtype.itemsize, cache.kv_dtype)
        of_row = heads * num_prompt * of_token + slots * of_slot
    return len(generator.is_unconditional(1)) * of_row


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on a device can take; None where the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    found = [_available(), _left_in_group()]
    return min((number for number in found if number is not None), default=None)


def _available() -> int | None:
    """Bytes available without swapping on Linux; elsewhere the free pages, if the system reports them."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        [line] = [line for line in lines if line.startswith("MemAvailable:")]
        return 1024 * int(line.split()[1])
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left_in_group() -> int | None:
    """Bytes left under a container's limit (cgroup v2); page cache that can be dropped counts as free."""
    with suppress(OSError, ValueError, IndexError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text("ascii"))  # without a limit this is "max", a ValueError
        used = int((group / "memory.current").read_text("ascii"))
        lines = (group / "memory.stat").read_text("ascii").splitlines()
        [dropped] = [int(line.split()[1]) for line in lines if line.startswith("inactive_file ")]
        return max(0, limit - used + dropped)
    return None


def _num_tokens(prompt: str) -> int:
    """A high estimate of a prompt's tokens, including the chat template, made without the tokenizer."""
    return len(prompt.encode()) // 3 + 64
