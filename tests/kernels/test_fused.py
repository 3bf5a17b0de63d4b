"""The fused kernels: their cases run in Triton's interpreter and on the CPU, and Triton's compiles for real GPUs.

The interpreter has to be asked for before Triton is imported, so `fused_cases.py` runs in a process of its own. On a
GPU every test that generates uses the kernel by default; the last test holds it to the torch path there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.compiling import has_compiler
from helpers.models import left_padded_prompts, tiny_janus

from ssd_cache import HeadMap, SSDCache, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.kernels import dispatch as fused

CASES = Path(__file__).with_name("fused_cases.py")


@pytest.mark.parametrize("interprets", ["1", "0"], ids=["triton", "cpu"])
def test_cases_pass(interprets):
    if interprets == "1":
        pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed here")
    elif not has_compiler():
        pytest.skip("the CPU kernels need a C++ compiler")
    # one thread: what takes time is Python, and idle threads of torch would only get in its way
    environment = {**os.environ, "TRITON_INTERPRET": interprets, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("capability", "dtype", "groups", "kv_dtype"),
    [
        *((80, "bf16", 1, None), (80, "fp32", 4, None), (90, "bf16", 1, None), (90, "fp16", 4, None)),
        *((80, "bf16", 4, "int8"), (90, "bf16", 1, "int8"), (80, "fp16", 4, "fp8")),
    ],
)
def test_kernel_compiles_for_a_gpu(capability, dtype, groups, kv_dtype, tmp_path, monkeypatch):
    """As far as machine code, which Triton's own ptxas makes without a GPU. 48 KB is what every GPU can share."""
    triton = pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed here")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssd_cache.kernels.triton_decode import block_sizes, decode_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"GROUPS": groups, "HEAD_DIM": 128, "VALUE_DIM": 128, "HAS_MASK": True, "UPCAST": False}
    constants["KV_DTYPE"] = kv_dtype
    constants |= block_sizes(groups, 128, 128, 4 if dtype == "fp32" else 2)
    states = dict.fromkeys(("query", "new_key", "new_value", "keys", "values", "output"), f"*{dtype}")
    pointers = {**states, "key_codes": "*i8", "value_codes": "*i8", "key_scales": "*fp32", "value_scales": "*fp32"}
    pointers |= {"scores": "*fp32", "logits": "*fp32", "mask": "*i1", "heads": "*i64", "slot_pointer": "*i64"}
    names = decode_kernel.arg_names
    types = {**dict.fromkeys(names, "i32"), **pointers, "scaling": "fp32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(decode_kernel, types, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": 2})
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 48 << 10


def test_without_triton_and_without_a_gpu_the_torch_path_is_taken():
    states = torch.randn(1, 2, 1, 8)
    with torch.no_grad():
        assert not fused.can_serve(states, states, states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel itself, not its interpreter, needs a CUDA device")
@pytest.mark.parametrize("is_fast", [False, True])
def test_kernel_generates_the_tokens_of_the_torch_path_on_a_gpu(is_fast, monkeypatch):
    """With `fast_decode` as a recorded CUDA graph, for two images in a row."""
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(12, 12))
    model = tiny_janus(grid_side=12).cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded_prompts((5, 9, 3)).items()}

    def generate(cache):
        return model.generate(**inputs, generation_mode="image", **{CACHE: cache}, do_sample=False)

    caches = [SSDCache(labels, 0.4) for _ in range(2)]
    with fast_decode(model) if is_fast else torch.no_grad():
        tokens = [generate(cache) for cache in caches]
    assert all(layer.has_kernel for layer in caches[1].layers)
    monkeypatch.setattr(fused, "can_serve", lambda *states, **options: False)
    for generated in tokens:
        assert torch.equal(generated, generate(SSDCache(labels, 0.4)))
