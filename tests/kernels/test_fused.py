"""The fused kernels: their cases run in Triton's interpreter and on the CPU, and Triton's compiles for real GPUs.

The interpreter has to be asked for before Triton is imported, so `fused_cases.py` runs in a process of its own. On a
GPU every test that generates uses the kernel by default; the last test holds it to the torch path there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.compiling import has_compiler
from helpers.models import left_padded_prompts, tiny_janus

from ssd_cache import HeadMap, SSDCache, fast_decode
from ssd_cache._compat import CACHE
from ssd_cache.cache import fused_eviction
from ssd_cache.kernels import dispatch as fused
from ssd_cache.kernels.eight_bits import dequantize, quantize

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


COMPILED = [  # capability, dtype, groups, slots, splits; then the most registers, and the most barriers
    (80, "bf16", 1, None, 1, 104, 6),
    (90, "bf16", 1, None, 1, 104, 6),
    (90, "bf16", 1, None, 8, 128, 6),
    (90, "fp16", 4, None, 1, 208, 10),
    (80, "fp32", 4, None, 1, 128, 26),
    (90, "bf16", 1, "int8", 1, 192, 8),
    (90, "bf16", 1, "int8", 8, 208, 8),
    (80, "bf16", 4, "int8", 1, 160, 38),
    (80, "fp16", 4, "fp8", 1, 224, 38),
    (80, "fp16", 4, "fp8", 8, 224, 38),
]


@pytest.mark.parametrize(("capability", "dtype", "groups", "kv_dtype", "splits", "registers", "barriers"), COMPILED)
def test_kernel_compiles_for_a_gpu(
    capability, dtype, groups, kv_dtype, splits, registers, barriers, tmp_path, monkeypatch
):
    """As it is launched, to machine code, by Triton's own ptxas.

    Every GPU since 2018 can share 64 KB. Limits of registers and barriers are what Triton 3.7, the pinned
    one, needs and a little more.
    """
    triton = pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed here")
    from ssd_cache.kernels.checks import LayerSizes
    from ssd_cache.kernels.triton_decode import decode_kernel, launch_options

    constants = {"GROUPS": groups, "HEAD_DIM": 128, "VALUE_DIM": 128, "HAS_MASK": True, "UPCAST": False}
    constants |= {"KV_DTYPE": kv_dtype, "NUM_SPLITS": splits}
    layer = LayerSizes(batch=256, kv_heads=16, groups=groups, head_dim=128, value_dim=128)
    launched = launch_options(layer, 4 if dtype == "fp32" else 2, kv_dtype)
    options = {name: launched.pop(name) for name in ("num_warps", "num_stages")}
    constants |= launched
    states = dict.fromkeys(("query", "new_key", "new_value", "keys", "values", "output"), f"*{dtype}")
    pointers = {**states, "key_codes": "*i8", "value_codes": "*i8", "key_scales": "*fp32", "value_scales": "*fp32"}
    pointers |= {
        "scores": "*fp32",
        "logits": "*fp32",
        "parts": "*fp32",
        "mask": "*i1",
        "heads": "*i64",
        "slot_pointer": "*i64",
    }
    types = {**pointers, "scaling": "fp32"}
    compiled = _compile(decode_kernel, types, constants, tmp_path, monkeypatch, capability, options)
    assert compiled.metadata.shared <= 64 << 10
    program = tmp_path / "kernel.cubin"
    program.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(tool, option):
        return subprocess.run([tools / tool, option, program], capture_output=True, text=True, check=True).stdout

    usage, code = run("cuobjdump", "--dump-resource-usage"), run("nvdisasm", "-c")
    found = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}
    assert found["STACK"] == 0, "registers are spilled"
    if triton.__version__.startswith("3.7."):  # 3.4 and 3.9 take a few more
        assert found["REG"] <= registers
        assert code.count("BAR.SYNC") <= barriers
    wide = len(re.findall(r"(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128", code))
    assert wide >= 12, "K and V are not read by 16 bytes a thread"


def _compile(kernel, given, constants, folder, monkeypatch, capability=90, options=None):
    """A kernel's machine code for a GPU; all pointers but a slot's in memory are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    names = kernel.arg_names
    types = {**dict.fromkeys(names, "i32"), **given, **dict.fromkeys(constants, "constexpr")}
    values = {(names.index(name),): value for name, value in constants.items()}
    pointers = {name for name, type_ in given.items() if type_.startswith("*")} - {"slot_pointer"}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source, target = ASTSource(kernel, types, values, aligned), GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("kind", ["plain", "codes", "learned"])
def test_the_kernel_of_evictions_compiles_for_a_gpu(kind, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed here")
    from ssd_cache.kernels.triton_evict import TILE, evict_kernel

    constants = {"HEAD_DIM": 128, "VALUE_DIM": 128, "BLOCK_HEAD": 128, "BLOCK_VALUE": 128}
    has_scales, side = kind == "codes", 24 if kind == "learned" else 0
    constants |= {"HAS_SCALES": has_scales, "GRID_ROWS": side, "GRID_COLUMNS": side, "TILE": TILE}
    pointers = {"positions": "*i32", "places": "*i32", "is_kept": "*i32", "ranks": "*fp32", "received": "*fp32"}
    pointers |= dict.fromkeys(("keys", "values"), "*i8" if has_scales else "*bf16")
    pointers |= dict.fromkeys(("key_scales", "value_scales", "key_weights", "value_weights"), "*fp32")
    pointers |= {"row_table": "*fp32", "column_table": "*fp32"}
    assert _compile(evict_kernel, pointers, constants, tmp_path, monkeypatch).metadata.shared <= 48 << 10


@pytest.mark.parametrize("groups", [1, 4])
def test_the_kernel_that_joins_splits_compiles_for_a_gpu(groups, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed here")
    from ssd_cache.kernels.triton_decode import join_kernel

    constants = {"GROUPS": groups, "VALUE_DIM": 128, "NUM_SPLITS": 8}
    constants |= {"BLOCK_GROUPS": 1 if groups == 1 else 16, "BLOCK_VALUE": 128, "BLOCK_COLUMNS": 16}
    pointers = {**dict.fromkeys(("scores", "logits", "parts"), "*fp32"), "output": "*bf16"}
    pointers |= {"heads": "*i64", "slot_pointer": "*i64"}
    assert _compile(join_kernel, pointers, constants, tmp_path, monkeypatch).metadata.shared <= 48 << 10


def test_tokens_are_split_only_where_heads_do_not_occupy_a_gpu(monkeypatch):
    """A GPU of 132 multiprocessors, of which only the number is asked for."""
    pytest.importorskip("triton", reason="the kernel is written in Triton, which is not installed here")
    from ssd_cache.kernels import triton_decode

    monkeypatch.setattr(triton_decode, "num_multiprocessors", lambda device: 132)

    class OnGPU:
        is_cuda, device = True, None

    found = [triton_decode.num_splits(*sizes, OnGPU()) for sizes in ((4096, 8), (264, 8), (32, 8), (32, 1), (2, 999))]
    assert found == [1, 1, 8, 1, triton_decode.MAX_SPLITS]
    assert triton_decode.num_splits(1, 999, torch.zeros(1)) == 1


def test_without_triton_and_without_a_gpu_the_torch_path_is_taken():
    states = torch.randn(1, 2, 1, 8)
    with torch.no_grad():
        assert not fused.can_serve(states, states, states)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel itself needs a CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("is_fast", [False, True])
def test_kernel_generates_the_tokens_of_the_torch_path_on_a_gpu(is_fast, monkeypatch):
    """With `fast_decode`, all but the first steps replay a CUDA graph, which the second image uses too."""
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(24, 24))
    model = tiny_janus(grid_side=24).cuda()
    inputs = {name: tensor.cuda() for name, tensor in left_padded_prompts((5, 9, 3)).items()}

    def generate(cache):
        return model.generate(**inputs, generation_mode="image", **{CACHE: cache}, do_sample=False)

    cache, images, served = SSDCache(labels, 0.4), [], []
    with fast_decode(model) if is_fast else torch.no_grad():
        for _ in range(2):
            cache.reset()
            images.append(generate(cache))
            served.append(cache.served_by)
    assert {found.attention for found in served} == {"Triton kernel"}
    # of 576 tokens the last one is not fed; one runs before the graph, and WARM_UP of the first image
    assert [found.replayed for found in served] == ([572, 573] if is_fast else [0, 0])
    assert fused_eviction.has_kernel(torch.device("cuda", torch.cuda.current_device()))
    monkeypatch.setattr(fused, "can_serve", lambda *states, **options: False)
    monkeypatch.setattr(fused_eviction, "has_kernel", lambda device: False)
    for tokens in images:
        assert torch.equal(tokens, generate(SSDCache(labels, 0.4)))


@pytest.mark.gpu
@on_gpu
def test_no_step_waits_for_the_gpu():
    """A later image of a cache, prompt and evictions included."""
    labels = HeadMap(torch.tensor([[True, False], [False, True]]), grid=(12, 12))
    model, cache = tiny_janus(grid_side=12).cuda(), SSDCache(labels, 0.4)
    decoder, states = model.get_decoder(), torch.randn(4, 150, 32, device="cuda")
    with torch.no_grad():
        for image in range(2):
            cache.reset()
            torch.cuda.set_sync_debug_mode("error" if image else "default")
            try:
                decoder(inputs_embeds=states[:, :6], **{CACHE: cache})
                for step in range(6, 150):
                    decoder(inputs_embeds=states[:, step : step + 1], **{CACHE: cache})
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_kernel_in_real_sizes_on_a_gpu(kv_dtype):
    """Janus-Pro-1B at a batch of 128 with guidance, in bfloat16: 256 rows, two stores, padding, scores."""
    torch.manual_seed(0)
    batch, num_prompt, options = 256, 16, {"device": "cuda", "dtype": torch.bfloat16}
    query, new_key, new_value = (torch.randn(batch, 16, 1, 128, **options) for _ in range(3))
    output, stores = torch.full_like(query, float("nan")), []
    for heads, num_slots, slot in ((range(10), 140, 139), (range(10, 16), 90, 40)):
        heads = torch.tensor(heads, device="cuda")
        states = [torch.randn(batch, len(heads), num_prompt + num_slots, 128, **options) for _ in range(2)]
        mask = torch.ones(batch, num_prompt + num_slots, dtype=torch.bool, device="cuda")
        mask[::2, :7] = False
        scores = torch.zeros(batch, len(heads) // 2, num_slots, device="cuda")
        stores.append((*states, scores, heads, mask, torch.tensor(slot, device="cuda")))
    codes = []
    if kv_dtype is not None:
        for at, (keys, values, *others) in enumerate(stores):
            for states in (keys, values):
                codes += quantize(states[:, :, num_prompt:].contiguous(), kv_dtype)
            stores[at] = (keys[:, :, :num_prompt].contiguous(), values[:, :, :num_prompt].contiguous(), *others)
    fused.decode(query, new_key, new_value, *map(list, zip(*stores, strict=True)), 128**-0.5, output, codes, kv_dtype)
    for at, (keys, values, scores, heads, mask, slot) in enumerate(stores):
        if kv_dtype is not None:
            parts = codes[4 * at : 4 * at + 4]
            keys, values = (
                torch.cat([prompt.float(), dequantize(*part, kv_dtype, torch.float32)], 2)
                for prompt, part in ((keys, parts[:2]), (values, parts[2:]))
            )
        end = num_prompt + int(slot) + 1
        if kv_dtype is None:
            assert torch.equal(keys[:, :, end - 1], new_key[:, heads, 0])
            assert torch.equal(values[:, :, end - 1], new_value[:, heads, 0])
        logits = 128**-0.5 * query[:, heads].double() @ keys[:, :, :end].double().mT
        weights = logits.masked_fill(~mask[:, None, None, :end], float("-inf")).softmax(-1)
        attended = weights @ values[:, :, :end].double()
        # a few roundings of bfloat16; sums of float32
        limit = 8 * torch.finfo(torch.bfloat16).eps * values.abs().max()
        assert (output[:, heads].double() - attended).abs().max() <= limit
        received = weights[:, : scores.shape[1], 0, num_prompt:]
        assert (scores[:, :, : end - num_prompt].double() - received).abs().max() <= 1e-5
        assert not scores[:, :, end - num_prompt :].any()
