"""Memory that is returned to the system when it is freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Runs in a process of its own: gaps in the heap of a long one hold blocks of any size.
CHILD = """
import re
from pathlib import Path
import torch
from ssd_cache.runs.metering import large_blocks_mapped

def resident():
    return 1024 * int(re.search(r"^VmRSS:\\s*(\\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

torch.ones(30 << 20, dtype=torch.uint8)  # glibc keeps freed blocks up to this size from now on
with large_blocks_mapped():
    blocks = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(8)]
    above = torch.ones(1 << 16, dtype=torch.uint8)  # without it, glibc would return the end of its heap
    before = resident()
    del blocks
    print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries keep freed memory in other ways")
def test_freed_blocks_return_to_the_system_at_once():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 7 * (20 << 20)
