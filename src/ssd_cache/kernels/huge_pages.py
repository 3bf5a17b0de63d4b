"""Zeros in huge pages of a CPU's memory, where the system has them: what every step reads whole is read faster so.

The processor looks up an address for each page that it enters, and prefetches within one. With 4 KB pages the weights
and the K and V of a step are tens of thousands of them. Linux gives pages of 2 MB to those who ask; elsewhere, and for
little memory, these are torch's own zeros.
"""

from __future__ import annotations

import math
import mmap

import torch

PAGE = 2 << 20
"""Bytes of a huge page on x86-64, and on ARM with base pages of 4 KB; where pages are larger, nothing is lost."""


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`torch.zeros`; on a CPU from huge pages, as far as whole ones fit in, so that no byte more is held."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // PAGE * PAGE)
    except (OSError, OverflowError):  # a kernel built without huge pages, or more memory than there is
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
