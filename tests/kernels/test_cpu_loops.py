"""The C++ loops as built: their exponential, fused multiply-add, and the number of threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.compiling import needs_compiler

from ssd_cache.kernels import cpu_library
from ssd_cache.kernels import cpu_loops as cpu_kernels

pytestmark = needs_compiler

SOURCE = Path(cpu_kernels.__file__).with_suffix(".cpp")


@pytest.fixture(scope="module")
def exponential(tmp_path_factory):
    """`exponential` of the C++ source, over an array of float32, by a library that includes the source."""
    folder = tmp_path_factory.mktemp("exponential")
    source = folder / "exponential.cpp"
    source.write_text(
        f'#include "{SOURCE}"  // {hashlib.sha256(SOURCE.read_bytes()).hexdigest()}\n'
        'extern "C" void exponentials(const float* of, float* to, int64_t size) {\n'
        "  for (int64_t at = 0; at < size; at += LANES) *(Lanes*)(to + at) = exponential(load_lanes(of + at));\n"
        "}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        library = cpu_library.load(source)

    def run(numbers):
        numbers, results = np.ascontiguousarray(numbers, np.float32), np.empty(len(numbers), np.float32)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (numbers, results))
        library.exponentials(*pointers, ctypes.c_int64(len(numbers)))
        return results

    return run


def test_exponential_keeps_its_bound(exponential):
    """One in 997 of all float32 from -0.0 to -87.3, the exponents in order; every one was measured once: 8.4e-8."""
    bits = np.arange(0x80000000, int(np.float32(-87.3).view(np.uint32)), 997, dtype=np.uint32)
    numbers = bits[: len(bits) // 16 * 16].view(np.float32)
    errors = np.abs(exponential(numbers) / np.exp(numbers.astype(np.float64)) - 1)
    assert errors.max() < 1.2e-7


def test_exponential_at_the_ends(exponential):
    numbers = np.full(16, -1.0)
    numbers[:6] = 0, -87.2, -87.4, -1e4, -np.inf, np.nan
    result = exponential(numbers)
    assert result[0] == 1
    assert result[1] == pytest.approx(np.exp(-87.2), rel=1e-5)  # -87.2 itself was rounded to float32
    assert (result[2:5] == 0).all()
    assert np.isnan(result[5])
    assert result[6:] == pytest.approx(np.exp(-1), rel=1.2e-7)


def _has_fma():
    cpus = Path("/proc/cpuinfo")
    return platform.machine() in ("x86_64", "AMD64") and cpus.exists() and " fma " in cpus.read_text()


@pytest.mark.skipif(not _has_fma(), reason="the processor has no such instructions of x86")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_the_built_library_multiplies_and_adds_in_one_instruction():
    """torch's own flags forbid it. A product of 16 rows has 16 sums, each with its instruction."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", cpu_kernels.library()._name]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.count("vfmadd") > 100


THREADS = """
import os, threading, torch
from ssd_cache.kernels import cpu_loops, dispatch

def count():
    return len(os.listdir("/proc/self/task"))

def run():
    weight, states = torch.randn(64, 64), torch.randn(4, 64)
    place = cpu_loops.pack(weight, None, 4)
    before = count()
    cpu_loops.linear(states, weight, place, None)
    new, keys = torch.randn(4, 2, 1, 8), torch.randn(4, 2, 9, 8)
    store = [keys], [keys.clone()], [torch.zeros(4, 2, 6)], [torch.tensor([0, 1])], [], [torch.tensor(3)]
    dispatch.decode(new, new, new, *store, 0.3, torch.empty(4, 2, 1, 8))
    print(count() - before)

torch.set_num_threads({threads})
run()
other = threading.Thread(target=run)
other.start()
other.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
@pytest.mark.parametrize(("threads", "others"), [(1, "8"), (3, "1")])
def test_threads_are_those_of_torch(threads, others):
    """Also in another Python thread, where OpenMP would go by its environment; the calling thread is one of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": others}
    command = [sys.executable, "-c", THREADS.format(threads=threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(threads - 1)] * 2, done.stderr


def test_results_do_not_depend_on_the_number_of_threads():
    weight, states = torch.randn(96, 64), torch.randn(5, 64)
    place = cpu_kernels.pack(weight, None, 5)
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(cpu_kernels.linear(states, weight, place, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
