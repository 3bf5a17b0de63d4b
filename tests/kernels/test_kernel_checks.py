"""The operators that enter C++ or Triton check what they are given.

They give torch's answer, raise torch's error, or refuse in clear words; memory is neither read nor written wrongly.
"""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.compiling import has_compiler, needs_compiler

from ssd_cache.kernels import cpu_loops as cpu_kernels
from ssd_cache.kernels import dispatch as fused
from ssd_cache.kernels.packed_linears import COPY, packed_linears

FUZZ = Path(__file__).with_name("kernel_fuzz.py")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def fuzz(seed, cases, *options, **environment):
    """Run `kernel_fuzz.py`, in a process that may end by a wrong access."""
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", str(FUZZ), str(seed), str(cases), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-10000:]
    assert "'answered'" in done.stdout
    assert "'refused'" in done.stdout


@needs_compiler
def test_random_calls_give_torchs_numbers_or_are_refused():
    fuzz(0, 400)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler() or not sys.platform.startswith("linux"), reason="AddressSanitizer by GCC")
@pytest.mark.parametrize("seed", range(1, 4))
def test_random_calls_under_address_sanitizer(seed):
    names = ("libasan.so", "libstdc++.so")
    find = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    paths = [found.stdout.strip() for found in find]
    if not all(map(os.path.isabs, paths)):
        pytest.skip("GCC has no AddressSanitizer here")
    # refusing to allocate what is huge is torch's to report
    options = "detect_leaks=0:allocator_may_return_null=1"
    fuzz(seed, 5000, "--asan", LD_PRELOAD=" ".join(paths), ASAN_OPTIONS=options)


# Linear layers


@needs_compiler
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, 64), (torch.float16, 64), (torch.float64, 64), (torch.int32, 64)]
    + [(torch.float32, width) for width in (0, 63, 65, 128)],
    ids=str,
)
def test_states_that_torch_refuses_are_refused_with_its_error(dtype, width, is_compiled):
    linear, states = torch.nn.Linear(64, 64), torch.ones(2, width).to(dtype)
    with pytest.raises(RuntimeError) as expected:
        linear(states)
    with packed_linears(linear):
        linear(torch.randn(2, 64))
        for run in (linear, lambda states: torch.ops.ssd_cache.packed_linear(states, linear.weight, linear.bias)):
            with pytest.raises(RuntimeError) as error:
                (torch.compile(run) if is_compiled else run)(states)
            if not is_compiled:  # the compiler has words of its own
                assert str(error.value) == str(expected.value)


@needs_compiler
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch._inductor.config.patch(force_disable_caches=True)  # torch 2.8 takes code of another autocast dtype from them
def test_products_under_autocast_are_torchs_own(dtype, is_compiled):
    torch._dynamo.reset()
    linear, states = torch.nn.Linear(64, 64), torch.randn(2, 64)
    run = torch.compile(linear, fullgraph=True) if is_compiled else linear
    with torch.autocast("cpu", dtype):
        expected = linear(states)
    with packed_linears(linear):
        for is_cast in (True, False, True):
            with torch.autocast("cpu", dtype, enabled=is_cast):
                result = run(states)
            assert result.dtype == (dtype if is_cast else torch.float32)
            assert torch.equal(result, expected) if is_cast else getattr(linear.weight, COPY).made_of


@needs_compiler
def test_layouts_that_the_loop_cannot_read_take_torchs_way():
    linear = torch.nn.Linear(64, 48)
    linear.bias = torch.nn.Parameter(torch.randn(96)[::2])
    states = torch.randn(64, 6).mT
    expected = linear(states)
    assert not linear.bias.is_contiguous()
    run = torch.compile(linear, fullgraph=True)
    with packed_linears(linear):
        torch.testing.assert_close(linear(states), expected)
        torch.testing.assert_close(run(states), expected)
        # of three dimensions that lie in another order in memory
        turned = torch.randn(1, 3, 64).transpose(0, 1)
        torch.testing.assert_close(linear(turned), F.linear(turned, linear.weight, linear.bias))


# A step over a store


LISTS = {"keys": "keys", "values": "values", "scores": "scores", "heads": "heads", "mask": "masks", "slot": "slots"}
"""The arguments with a tensor for each store, by their names for one store."""


def step(**changes):
    """Arguments of `fused.decode` for two rows, three KV heads, two heads in the store, one scored; some replaced."""
    arguments = {
        "query": torch.randn(2, 3, 2, 8),
        "new_key": torch.randn(2, 3, 1, 8),
        "new_value": torch.randn(2, 3, 1, 4),
        "keys": torch.randn(2, 2, 9, 8),
        "values": torch.randn(2, 2, 9, 4),
        "scores": torch.zeros(2, 1, 6),
        "heads": torch.tensor([2, 0]),
        "mask": torch.ones(2, 9, dtype=torch.bool),
        "slot": torch.tensor(4),
        "scaling": 0.3,
        "output": torch.zeros(2, 3, 2, 4),
        "codes": [],
        "kv_dtype": None,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    return {LISTS.get(name, name): [value] if name in LISTS else value for name, value in arguments.items()}


WRONG = {
    "64 rows": {"query": lambda t: t.repeat(32, 1, 1, 1)},
    "rows of a key": {"new_key": lambda t: t[:1]},
    "heads of a value": {"new_value": lambda t: t[:, :2]},
    "two tokens": {"new_key": lambda t: t.repeat(1, 1, 2, 1)},
    "width of a key": {"new_key": lambda t: t[..., :7]},
    "bfloat16 into float32": {"query": lambda t: t.bfloat16()},
    "keys of another dtype": {"keys": lambda t: t.double()},
    "a dtype without a loop": {name: lambda t: t.double() for name in ("query", "new_key", "new_value", "keys")},
    "keys with holes": {"keys": lambda t: t.repeat(1, 1, 2, 1)[:, :, ::2]},
    "one row for all": {"values": lambda t: t[:1].expand(2, -1, -1, -1)},
    "scores in float64": {"scores": lambda t: t.double()},
    "more scores than heads": {"scores": lambda t: t.repeat(1, 3, 1)},
    "more slots than columns": {"scores": lambda t: t.repeat(1, 1, 2)},
    "no slots": {"scores": lambda t: t[..., :0]},
    "a head beyond the last": {"heads": lambda t: torch.tensor([3, 0])},
    "a head before the first": {"heads": lambda t: torch.tensor([0, -1])},
    "heads in int32": {"heads": lambda t: t.int()},
    "a shorter mask": {"mask": lambda t: t[:, :5].contiguous()},
    "a mask of numbers": {"mask": lambda t: t.float()},
    "a slot before the first": {"slot": lambda t: -t},
    "a slot after the last": {"slot": lambda t: t + 2},
    "several slots": {"slot": lambda t: t.repeat(2)},
    "a smaller output": {"output": lambda t: t[:1].contiguous()},
    "an output of another dtype": {"output": lambda t: t.bfloat16()},
    "another device": {"keys": lambda t: t.to("meta")},
    "an output without numbers": {"output": lambda t: t.to("meta")},
    "fewer dimensions": {"query": lambda t: t[0]},
    "nothing": {"query": lambda t: t[:, :0, :, :]},
}


@needs_compiler
@pytest.mark.parametrize("run", [fused.decode, torch.ops.ssd_cache.decode], ids=["function", "operator"])
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_step_that_does_not_fit_is_refused_before_anything_is_written(changes, run):
    arguments = step(**changes)
    written = [*arguments["keys"], *arguments["values"], *arguments["scores"], arguments["output"]]
    written = [tensor for tensor in written if not tensor.is_meta]
    before = [tensor.clone() for tensor in written]
    with pytest.raises(ValueError, match=r"kernel|heads|slot|columns|dimensions|devices"):
        run(*arguments.values())
    assert all(map(torch.equal, written, before))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("positions", lambda t: t.long()),
        ("ranks", lambda t: t.repeat(1, 2, 1)),  # of more heads than there are
        ("received", lambda t: t[..., :4]),
        ("states", lambda t: [t[0], t[1].transpose(0, 1)]),
        ("states", lambda t: [t[0], t[1].to("meta")]),
        ("positions", lambda t: t.as_subclass(type("Other", (torch.Tensor,), {}))),
        ("scales", lambda t: [torch.ones(2, 3, 7)] * 2),
        ("counts", lambda t: {**t, "num_evict": 9}),
        ("counts", lambda t: {**t, "num_evict": 0}),
    ],
)
def test_an_eviction_that_does_not_fit_is_refused_before_anything_is_written(name, change):
    assert_refused(name, change, ())


@needs_compiler
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("states", lambda t: [t[0].double(), t[1].double()]),
        ("states", lambda t: [t[0], t[1].bfloat16()]),
        ("weights", lambda t: (t[0][:1], *t[1:])),
        ("weights", lambda t: (*t[:2], t[2].mT, t[3])),
        ("weights", lambda t: (*t[:3], t[3].double())),
    ],
)
def test_an_eviction_by_a_learned_score_that_does_not_fit_is_refused_too(name, change):
    weights = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 3, 3), torch.randn(2, 3, 5)
    assert_refused(name, change, weights)


def assert_refused(name, change, weights):
    """A changed argument of an eviction raises an error, and all tensors stay as they are."""
    states = [torch.randn(2, 3, 2 + 8, 4) for _ in range(2)]
    counts = {"num_prompt": 2, "num_evict": 3, "num_seen": 8, "num_recent": 0, "num_sinks": 0}
    given = {"positions": torch.arange(8, dtype=torch.int32).repeat(2, 3, 1), "ranks": torch.rand(2, 2, 8)}
    given |= {"received": torch.rand(2, 2, 8), "states": states, "scales": [], "counts": counts}
    given["weights"] = weights
    before = [tensor.clone() for tensor in (given["positions"], given["received"], *states)]
    with pytest.raises(ValueError, match="evict"):
        cpu_kernels.evict(**{**given, name: change(given[name])})
    assert all(map(torch.equal, (given["positions"], given["received"], *states), before))


@needs_compiler
def test_the_step_itself_fits():
    arguments = step()
    fused.decode(*arguments.values())
    assert torch.equal(arguments["keys"][0][:, :, 7], arguments["new_key"][:, [2, 0], 0])


@needs_compiler
@pytest.mark.parametrize("run", [fused.decode, torch.ops.ssd_cache.decode], ids=["function", "operator"])
@pytest.mark.parametrize("name", ["keys", "values", "scores", "heads", "masks", "slots"])
def test_lists_of_other_lengths_are_refused(name, run):
    for number in (0, 2):
        if (name, number) != ("masks", 0):  # no masks: no padding
            arguments = step()
            arguments[name] = arguments[name] * number
            with pytest.raises(ValueError, match="of as many stores"):
                run(*arguments.values())


@needs_compiler
@pytest.mark.parametrize("name", ["keys", "values", "scores", "heads", "masks", "slots"])
def test_a_store_is_checked_again_when_one_of_its_tensors_is_replaced(name):
    """The first call keeps the addresses of the store's tensors; the loop must not use them for another tensor."""
    arguments = step()
    fused.decode(*arguments.values())
    fitting = dict(arguments)
    fitting[name] = [arguments[name][0].clone()]
    first = arguments["output"].clone()
    arguments[name][0].zero_()  # what the former address holds has no effect
    fused.decode(*fitting.values())
    assert torch.equal(first, fitting["output"])
    spoilt = {**fitting, name: [fitting[name][0][..., None].expand(*fitting[name][0].shape, 2)]}
    with pytest.raises(ValueError, match="kernel got|dimensions"):
        fused.decode(*spoilt.values())


@needs_compiler
def test_a_copied_or_pickled_store_has_no_addresses_of_the_first():
    arguments = step()
    fused.decode(*arguments.values())
    file = io.BytesIO()
    torch.save(arguments, file)
    file.seek(0)
    first = arguments["output"].clone()
    for other in (copy.deepcopy(arguments), torch.load(file, weights_only=False)):
        arguments["keys"][0].zero_()
        fused.decode(*other.values())
        assert torch.equal(other["output"], first)


def test_a_kernel_is_not_concluded_to_fail_from_a_full_device(monkeypatch):
    """A trial that runs out of memory says nothing about the kernel, and is made again for the next image."""
    query, calls = torch.randn(1, 2, 1, 6), []

    def fill(*arguments):
        calls.append(arguments)
        raise torch.OutOfMemoryError("full")

    fused.passes_trial.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_missing", lambda *arguments: None)
        patch.setattr(fused, "_launch", fill)
        assert not fused.can_serve(query, query, query, on_cpu=True)
        assert not fused.can_serve(query, query, query, on_cpu=True)
    assert len(calls) == 2
    if has_compiler():
        assert fused.can_serve(query, query, query, on_cpu=True)
    fused.passes_trial.cache_clear()


@needs_compiler
@pytest.mark.parametrize("what", ["keys", "scores", "mask"])
def test_the_trial_finds_a_kernel_that_errs_in_one_thing(what, monkeypatch):
    """One that leaves out K and V, the scores, or the mask, and is right in all else."""
    launch = fused._launch

    def err(*arguments):
        given = list(arguments)
        if what == "mask":
            given[7] = []
        else:
            at = {"keys": 3, "scores": 5}[what]
            given[at] = [given[at][0].clone()]
        launch(*given)

    fused.passes_trial.cache_clear()
    monkeypatch.setattr(fused, "_launch", err)
    query = torch.randn(1, 2, 1, 8)
    with pytest.warns(
        UserWarning, match={"keys": "K and V wrongly", "scores": "in the scores", "mask": "errs by"}[what]
    ):
        assert not fused.can_serve(query, query, query, on_cpu=True)
    fused.passes_trial.cache_clear()
