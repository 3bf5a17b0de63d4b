"""The saving is real: peak memory of a process falls by what the cache no longer holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Runs in a process of its own, since a process's peak never falls. Nothing but the cache differs between the runs.
CHILD = """
import json, sys, warnings
import torch
from helpers.models import left_padded_prompts, tiny_janus
from ssd_cache import HeadMap, SSDCache
from ssd_cache._compat import CACHE
warnings.simplefilter("ignore")

def peak():  # not ru_maxrss, which starts from what the parent held
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])

model = tiny_janus(layers=4, hidden=256, heads=4)
cache = SSDCache(HeadMap(torch.tensor([[True, False, True, False]] * 4)), float(sys.argv[1]))
inputs = left_padded_prompts([6] * 24)
before = peak()
model.generate(**inputs, generation_mode="image", guidance_scale=5.0, do_sample=True, **{CACHE: cache})
print(json.dumps({"peak": peak(), "grown": peak() - before, "nbytes": cache.nbytes}))
"""


def run_child(budget: float) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(budget)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_falls_with_the_cache():
    full, fifth = run_child(1.0), run_child(0.2)
    rows, heads, head_dim, itemsize = 48, 16, 64, 4
    assert full["nbytes"] == rows * heads * (6 + 576) * head_dim * itemsize * 2
    assert fifth["nbytes"] == rows * heads * (6 + 115) * head_dim * itemsize * 2
    saved = full["nbytes"] - fifth["nbytes"]
    # 181 MB less of K and V; a tenth is left for the held queries and for what the allocator does
    assert full["peak"] - fifth["peak"] > 0.9 * saved
    assert fifth["grown"] < 0.4 * full["grown"]
