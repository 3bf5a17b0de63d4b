"""Zeros in huge pages: torch's own zeros to whoever uses them, and no more memory than they need."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from ssd_cache.kernels import huge_pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 3, 700, 512)])
def test_they_are_zeros_that_can_be_written(shape, dtype):
    zeros = huge_pages.zeros(shape, dtype, CPU)
    assert torch.equal(zeros, torch.zeros(shape, dtype=dtype))
    assert zeros.is_contiguous()
    zeros.fill_(3)
    assert torch.equal(zeros, torch.full(shape, 3, dtype=dtype))


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux gives huge pages to those who ask")
def test_memory_is_held_when_it_is_used_and_given_back():
    """40 huge pages and a half; what else this process holds moves by less than four of them."""
    gc.collect()
    nbytes, slack, before = huge_pages.PAGE * 81 // 2, 4 * huge_pages.PAGE, resident()
    zeros = huge_pages.zeros((nbytes,), torch.int8, CPU)
    assert zeros.data_ptr() % huge_pages.PAGE == 0
    assert resident() - before < slack, "nothing is held before it is used"
    row = zeros[huge_pages.PAGE :][:100].fill_(1)
    assert resident() - before < slack
    zeros.fill_(1)
    assert abs(resident() - before - nbytes) < slack
    del zeros
    assert abs(resident() - before - nbytes) < slack, "a view keeps it"
    assert row.sum() == 100
    del row
    gc.collect()
    assert resident() - before < slack


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux gives huge pages to those who ask")
def test_a_system_that_refuses_them_gives_torchs_zeros(monkeypatch):
    """A kernel built without huge pages refuses the advice; 99 is an advice that every kernel refuses."""
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 99)
    zeros = huge_pages.zeros((huge_pages.PAGE,), torch.float32, CPU)
    assert torch.equal(zeros, torch.zeros(huge_pages.PAGE))


def test_more_memory_than_there_is_gives_torchs_error():
    with pytest.raises(RuntimeError, match="memory"):
        huge_pages.zeros((1 << 60,), torch.int8, CPU)
