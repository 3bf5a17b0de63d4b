"""The saving is real: peak memory of a process falls by what the cache no longer holds."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.children import Forked
from helpers.models import left_padded_prompts, tiny_janus

from ssd_cache import HeadMap, SSDCache
from ssd_cache._compat import CACHE
from ssd_cache.kernels import cpu_loops


def peak() -> int:
    """Bytes; not `ru_maxrss`, which starts from what the parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def generate() -> None:
    """Generate with the budget in `sys.argv`, and print peaks and bytes; in a process whose peak never falls."""
    warnings.simplefilter("ignore")
    model = tiny_janus(layers=4, hidden=256, heads=4, grid_side=12)
    head_map = HeadMap(torch.tensor([[True, False, True, False]] * 4), grid=(12, 12))
    cache = SSDCache(head_map, float(sys.argv[1]), buffer=6)  # holds as large a share as a row of a large image
    inputs = left_padded_prompts([6] * 96)
    cpu_loops.library()  # once for a process, 15 MB with what builds it; only the small cache uses it
    before = peak()
    model.generate(**inputs, generation_mode="image", guidance_scale=5.0, do_sample=True, **{CACHE: cache})
    print(json.dumps({"peak": peak(), "grown": peak() - before, "nbytes": cache.nbytes}))


def run_child(budget: float) -> dict:
    process = Forked(budget, program=generate)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_falls_with_the_cache():
    full, fifth = run_child(1.0), run_child(0.2)
    rows, heads, head_dim, itemsize = 192, 16, 64, 4
    assert full["nbytes"] == rows * heads * (6 + 144) * head_dim * itemsize * 2
    assert fifth["nbytes"] == rows * heads * (6 + 29) * head_dim * itemsize * 2
    saved = full["nbytes"] - fifth["nbytes"]
    # 181 MB less of K and V; a tenth is left for the held queries and for what the allocator does
    assert full["peak"] - fifth["peak"] > 0.9 * saved
    assert fifth["grown"] < 0.4 * full["grown"]
