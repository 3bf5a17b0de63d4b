"""Zero tensors in CPU memory backed by huge pages where available, so that a step reads large tensors faster.

The processor translates addresses page by page and prefetches only within a page. With 4 KB pages, a step's weights, K
and V span tens of thousands of pages. Linux provides 2 MB pages on request (`madvise`). On other systems, and for small
tensors, `torch.zeros` is used.
"""

from __future__ import annotations

import math
import mmap

import torch

PAGE = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with base pages of 4 KB. Larger huge pages do no harm."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.zeros`; on a CPU, the whole huge pages that fit are requested, so no additional memory is used."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // PAGE * PAGE)
    except (OSError, OverflowError):  # a kernel without huge pages, or not enough memory
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
