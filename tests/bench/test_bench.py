"""The benchmark: its formulas against real tensors and real steps, its passes on tiny models, its results as files.

How fast anything is, is not tested.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.compiling import has_compiler, needs_compiler
from helpers.machine import look_shortly
from helpers.scripts import run_script
from helpers.tiny_checkpoint import write_checkpoint
from torch._dynamo.utils import counters
from transformers import DynamicCache, JanusForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from ssd_cache import HeadMap
from ssd_cache._compat import CACHE
from ssd_cache.bench import SHAPES, Case, Report, choose_cases, choose_windows, load_subject, run
from ssd_cache.bench import running as running_module
from ssd_cache.bench.cases import VALID_TOKENS
from ssd_cache.bench.results import Row, number, size
from ssd_cache.bench.roofline import Machine, StepWork, mean_tokens_read, measure_machine, step_work
from ssd_cache.bench.running import Measurement, generate_windows, held_bytes, measure, summarize, timed_positions
from ssd_cache.bench.serving import served_by
from ssd_cache.bench.subject import TINY_TOWERS, Shape, head_map_for, janus_config, make_model
from ssd_cache.cli import app

ROOT = Path(__file__).parents[2]

CPU = torch.device("cpu")


def tiny_janus_config():
    towers = {
        **TINY_TOWERS,
        "vision_config": {**TINY_TOWERS["vision_config"], "image_size": 128, "num_image_tokens": 64},
    }
    return janus_config(32, 64, 2, 2, vocab_size=64, length=256, **towers)


def tiny_llama_config():
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


TINY = {
    "tiny-janus": Shape(JanusForConditionalGeneration, tiny_janus_config, (8, 8), 5),
    "tiny-llama": Shape(LlamaForCausalLM, tiny_llama_config, (6, 9), 1),
}


def make_small(patch):
    """Small shapes by name, and a short look at the machine."""
    for name, shape in TINY.items():
        patch.setitem(SHAPES, name, shape)
    look_shortly(patch)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small shapes and machine, and one thread: more would wait for each other here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make_small(monkeypatch)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TINY)
def subject(request):
    return load_subject(request.param, torch.float32, CPU)


@pytest.fixture
def janus():
    return load_subject("tiny-janus", torch.float32, CPU)


HEAD_MAP = HeadMap(torch.tensor([[True, False], [False, True]]), (8, 8))
POLICIES = "full,ssd,ssd:buffer=1,ssd:num_sinks=2,ssd:kv_dtype=int8,h2o,streaming-llm,linear,margin"
MAP_24 = HEAD_MAP.with_grid((24, 24))
CASES = choose_cases(HEAD_MAP, policies=POLICIES, budgets=[0.4, 30], is_compiled=False)

FULL_CACHES = {
    "DynamicCache": "sdpa, eager",
    "StaticCache": "sdpa, eager",
    "DynamicCache, packed": "sdpa, packed linears, eager",
    "StaticCache, packed": "sdpa, packed linears, eager",
    "StaticCache, compiled": "sdpa, compiled",
    "StaticCache, compiled, packed": "sdpa, packed linears, compiled",
    "full cache, valid tokens only": "CPU loop, packed linears, compiled",
}
"""The rivals in the order of the report, and what runs their steps on a CPU in float32."""


# --- models by shape


FACTS = {  # layers, hidden, query heads, KV heads, head_dim, billions of weights, visual tokens
    "small-cpu": (8, 512, 8, 8, 64, 0.035, 576),
    "janus-pro-1b": (24, 2048, 16, 16, 128, 1.9, 576),
    "janus-pro-7b": (30, 4096, 32, 32, 128, 7.0, 576),
    "llamagen-xl": (36, 1280, 20, 20, 64, 0.775, 576),
    "emu3": (32, 4096, 32, 8, 128, 8.5, 8190),
    "small-emu3": (8, 512, 8, 2, 64, 0.064, 8190),
    "glm-image": (40, 4096, 32, 2, 128, 10, 1280),  # the vision tower's included
    "small-glm-image": (8, 512, 8, 2, 64, 0.04, 1280),
}


@pytest.mark.parametrize("name", FACTS)
def test_shapes_have_the_sizes_of_their_models(name):
    model = make_model(SHAPES[name], torch.bfloat16, torch.device("meta"))
    config = model.config.get_text_config(decoder=True)
    weights = sum(weight.numel() for weight in model.parameters()) / 1e9
    heads = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    layers, hidden, *expected_heads, billions, tokens = FACTS[name]
    assert (config.num_hidden_layers, config.hidden_size, *heads) == (layers, hidden, *expected_heads)
    assert SHAPES[name].layout.num_tokens == tokens
    assert weights == pytest.approx(billions, rel=0.12)  # the figures are rounded, and tied weights told in both ways
    assert SHAPES[name].num_prompt + tokens <= config.max_position_embeddings
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_weights_are_random_repeatable_and_of_the_dtype():
    before = torch.get_rng_state()
    one, two = (make_model(SHAPES["tiny-janus"], torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, other)
    layer = one.get_decoder().layers[0]
    assert layer.mlp.up_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.1)


# --- generating


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=lambda case: case.name)
def test_generation_continues_from_a_filled_cache(subject, case):
    cache, ticks = case.make_cache(subject), []
    attention = subject.config._attn_implementation
    with case.running(subject):
        subject.fill(cache, 2, subject.num_prompt + 20)
        assert int(cache.get_seq_length()) == subject.num_prompt + 20
        subject.generate(cache, 2, 5, lambda: ticks.append(1))
        assert int(cache.get_seq_length()) == subject.num_prompt + 25
        subject.fill(cache, 2, subject.num_prompt + 40)
        subject.generate(cache, 2, 3, lambda: ticks.append(1))
    assert int(cache.get_seq_length()) == subject.num_prompt + 43
    assert len(ticks) == 8
    assert subject.config._attn_implementation == attention
    whole, cells = DynamicCache(), subject.head_map.num_visual_tokens
    subject.generate(whole, 2, cells, lambda: None)
    assert whole.get_seq_length() == subject.length - 1  # the last token is not fed
    assert whole.layers[0].keys.shape[0] == 4  # two rows an image


def test_janus_generates_whole_images_again_afterwards(janus):
    with pytest.raises(ZeroDivisionError):
        janus.generate(DynamicCache(), 1, 3, lambda: 1 / 0)
    assert janus.model.model.vision_model.config.num_image_tokens == 64


def test_windows_lie_around_the_middles_of_the_quarters():
    assert choose_windows(576, None) == [range(576)]
    assert choose_windows(576, 96) == [range(start, start + 24) for start in (60, 204, 348, 492)]
    positions = timed_positions(choose_windows(576, 96))
    assert (len(positions), sum(positions) / len(positions)) == (4 * 23, 288)
    assert timed_positions([range(5)]) == [0, 1, 2, 3], "the first step of an image feeds the prompt"
    for tokens in (8, 62):
        assert all(window.start >= 1 and window.stop <= 64 for window in choose_windows(64, tokens))
    for tokens in (-1, 7, 64):
        with pytest.raises(ValueError, match=f"{tokens} tokens to generate: give 8 to 63"):
            choose_windows(64, tokens)


# --- formulas against tensors and steps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("start", [0, 20])
def test_tokens_read_are_those_that_the_steps_see(subject, case, start):
    cache, seen = case.make_cache(subject), []

    def look():
        if case.is_full:
            return seen.append(int(cache.get_seq_length()) - subject.num_prompt)
        stored = [
            store.num_stored for layer in cache.layers for store in layer.stores for _ in range(store.keys.shape[1])
        ]
        return seen.append(sum(stored) / max(1, len(stored)))

    window = range(start, subject.head_map.num_visual_tokens)
    with case.running(subject):
        if start:
            subject.fill(cache, 1, subject.num_prompt + start)
        subject.generate(cache, 1, len(window), look)
    positions = timed_positions([window])
    assert len(seen[1:]) == len(positions)
    assert mean_tokens_read(subject, case, positions) == pytest.approx(sum(seen[1:]) / len(seen[1:]))


def test_a_steps_work_is_counted_out():
    subject = load_subject("tiny-llama", torch.float32, CPU)
    cache = DynamicCache()
    subject.fill(cache, 3, subject.num_prompt + 10)  # visual tokens 0 to 9
    work = step_work(subject, Case("DynamicCache"), 3, [9])
    assert (work.key_value_bytes, 0) == held_bytes(cache)
    products = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64) + 32 * 64  # q, k and v, o, MLP; the head
    norms = 2 * 2 * 32 + 32
    int8 = step_work(subject, Case("ssd:kv_dtype=int8", 1.0), 3, [9])
    slots = 2 * 6 * 2 * 10  # layers, rows, KV heads, slots read; head_dim 8, a byte each, and a scale
    assert int8.key_value_bytes == work.key_value_bytes - slots * 2 * (8 * 4 - 8 - 4)
    assert work.weight_bytes == 4 * (products + norms)
    assert work.operations == 6 * (2 * products + 2 * 4 * 4 * 8 * 11)  # layers, 4 each, heads, head_dim, tokens


def test_the_store_of_valid_tokens_reads_what_a_full_cache_reads(subject):
    valid, dynamic = (
        step_work(subject, case, 3, [0, 9, 50])
        for case in (Case(VALID_TOKENS, steps="fast_decode"), Case("DynamicCache"))
    )
    assert valid == dynamic


def test_a_steps_work_takes_time_to_read_and_to_execute():
    work = StepWork(weight_bytes=600, key_value_bytes=400.0, operations=50.0)
    assert work.seconds(Machine(copy_speed=100.0, matrix_speed=10.0)) == (10.0, 5.0)


def test_the_machine_is_measured():
    machine = measure_machine(torch.float32, CPU)
    assert 0 < machine.copy_speed < math.inf
    assert 0 < machine.matrix_speed < math.inf


# --- memory


@needs_compiler
@pytest.mark.parametrize("name", ["small-emu3", "small-glm-image"])
def test_small_shapes_step_fast_on_a_cpu(name, monkeypatch):
    """With one layer, as all are alike and take as long to compile."""
    shape = SHAPES[name]

    def make_config():
        config = shape.make_config()
        config.get_text_config(decoder=True).num_hidden_layers = 1
        return config

    monkeypatch.setitem(SHAPES, name, replace(shape, make_config=make_config))
    subject = load_subject(name, torch.float32, CPU)
    case = Case("ssd", 0.2, "fast_decode")
    cache = case.make_cache(subject)
    with case.running(subject):
        subject.generate(cache, 1, 6, lambda: None)
        assert served_by(subject, case, cache) == ("CPU loop, packed linears, compiled", False)
    assert cache.get_seq_length() == subject.num_prompt + 5


@pytest.mark.parametrize("windows", [None, 32], ids=["whole", "windows"])
def test_bytes_are_those_at_the_end_of_an_image(janus, windows):
    cases = [Case("DynamicCache"), Case("StaticCache"), Case("ssd", 16), Case("ssd:kv_dtype=int8", 16)]
    results = measure(janus, cases, choose_windows(64, windows), batch_size=3, rounds=1)
    heads, token = 3 * 2 * 2 * 2, 2 * 16 * 4  # images, rows, layers, heads; K and V, head_dim, bytes
    assert [result.key_value for result in results] == [
        heads * (5 + 63) * token,  # the last token is not fed
        heads * (5 + 64) * token,
        heads * (5 + 16) * token,
        heads * (5 * token + 16 * 2 * (16 + 4)),  # a byte each, and a scale
    ]
    assert [result.bookkeeping > 0 for result in results] == [False, False, True, True]


# --- caches to compare


def test_a_checkpoint_is_measured_with_its_maps_own_settings():
    names = [case.name for case in choose_cases(head_map_for("shapes-janus"))][len(FULL_CACHES) :]
    assert names[:5] == [
        "learned 100%",
        "learned 50%",
        "learned 20%",
        "learned 20%, fast_decode",
        "learned:buffer=1 20%",
    ]
    assert names[5:] == ["ssd 20%", "h2o 20%", "streaming-llm 20%"]
    names = [case.name for case in choose_cases(head_map_for("small-cpu"))][len(FULL_CACHES) :]
    assert names[:5] == ["ssd 100%", "ssd 50%", "ssd 20%", "ssd 20%, fast_decode", "ssd:buffer=1 20%"]
    assert names[5:] == ["h2o 20%", "streaming-llm 20%"]


def test_names_of_cases_tell_them_apart():
    cases = choose_cases(MAP_24)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert names[: len(FULL_CACHES)] == [case.name for case in cases if case.is_rival] == list(FULL_CACHES)
    assert {"ssd 20%", "ssd 20%, fast_decode"} <= set(names)
    chosen = choose_cases(MAP_24, names=["ssd 20%", "DynamicCache"])
    assert chosen == [Case("DynamicCache"), Case("ssd", 0.2)]
    with pytest.raises(ValueError, match="no cache 'ssd 21%': give names of DynamicCache; "):
        choose_cases(MAP_24, names=["ssd 21%"])
    assert not any(case.steps for case in choose_cases(MAP_24, is_compiled=False))
    (varlen,) = set(choose_cases(MAP_24, on_gpu=True)) - set(cases)
    assert (varlen.name, varlen.is_rival) == ("StaticCache, varlen, compiled", True)


@pytest.mark.skipif(shutil.which("make") is None, reason="reads the commands from make")
@pytest.mark.parametrize(("target", "num_parts"), [("bench-gpu", 5), ("bench-gpu-models", 2)])
def test_make_bench_gpu_measures_cases_that_are_there(target, num_parts, tmp_path):
    command = ["make", "--dry-run", target, f"RESULTS={tmp_path}"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ")
    found = [shlex.split(line) for line in lines.splitlines() if "ssd-cache bench" in line]
    assert len(found) == num_parts
    for words in found:
        given = dict(zip(words[2::2], words[3::2], strict=True))
        assert given["--model"] in SHAPES
        names, policies = given["--caches"].split(";"), given.get("--policies")
        budgets = [float(given["--budgets"])] if policies else None
        cases = choose_cases(MAP_24, policies=policies, budgets=budgets, names=names, on_gpu=True)
        assert sorted(case.name for case in cases) == sorted(names)


def test_every_policy_comes_at_every_budget():
    cases = choose_cases(HEAD_MAP, policies="full,ssd:buffer=4", budgets=[0.5, 20])[len(FULL_CACHES) :]
    assert [case.name for case in cases] == [
        "full 100%",
        "full 100%, fast_decode",
        "ssd:buffer=4 50%",
        "ssd:buffer=4 50%, fast_decode",
        "ssd:buffer=4 20",
        "ssd:buffer=4 20, fast_decode",
    ]
    cache = cases[4].make_cache(load_subject("tiny-janus", torch.float32, CPU))
    assert (cache.buffer, cache.layers[0].plan.num_slots) == (4, (20, 20))


# --- running


@needs_compiler
def test_full_caches_generate_the_tokens_of_a_dynamic_cache(janus):
    def generate(case):
        cache, prompt = case.make_cache(janus), torch.arange(10, 20).view(2, 5)
        prompt[:, 0], prompt[:, -1] = 1, 4
        options = {"generation_mode": "image", "do_sample": False, "guidance_scale": 5.0, CACHE: cache}
        with case.running(janus):
            tokens = janus.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
            return tokens, served_by(janus, case, cache)

    with torch.no_grad():
        for weight in janus.model.parameters():
            weight.mul_(5 if weight.dim() > 1 else 1)  # else it repeats one token
    cases = choose_cases(HEAD_MAP, names=list(FULL_CACHES))
    expected, _ = generate(cases[0])
    assert len(expected.unique()) > 20
    for case in cases:
        tokens, served = generate(case)
        assert torch.equal(tokens, expected), case.name
        assert served == (FULL_CACHES[case.name], False)


def test_a_case_that_falls_back_is_marked():
    subject, case = load_subject("tiny-janus", torch.float16, CPU), Case("DynamicCache", steps="packed")
    (result,) = measure(subject, [case], choose_windows(64, 16), batch_size=1, rounds=1)
    assert (result.served_by, result.fell_back) == ("sdpa, eager", True), "no weight in float16 is packed"
    row = summarize(result, choose_windows(64, 16), 64, Machine(1, 1), StepWork(1, 1.0, 1.0))
    tables = Report("c", {"model": "m"}, Machine(1, 1), [row]).tables()
    assert [rows[0][0] for _, _, rows in tables] == 3 * ["DynamicCache, packed *"]
    assert tables[2][0].endswith("(*: without something that the name says)")


def test_a_gpu_falls_back_without_kernel_graph_or_compiler():
    case = Case("ssd", 0.4, "fast_decode")
    cache, decoder = case.make_ssd(HEAD_MAP), SimpleNamespace()
    model = SimpleNamespace(device=torch.device("cuda"), get_decoder=lambda: decoder)
    subject = SimpleNamespace(model=model, config=SimpleNamespace(_attn_implementation="ssd"), step_weights=list)
    cache.num_compiled, cache.num_replayed = 2, 10
    assert served_by(subject, case, cache) == ("torch's attention, compiled, CUDA graph with 10 replays", True)
    for layer in cache.layers:
        layer.has_kernel, layer.device = True, model.device
    assert served_by(subject, case, cache) == ("Triton kernel, compiled, CUDA graph with 10 replays", False)
    cache.num_replayed = 0
    assert served_by(subject, case, cache) == ("Triton kernel, compiled", True)
    cache.num_compiled = 0
    assert served_by(subject, case, cache) == ("Triton kernel, eager", True)


def test_a_recorded_graph_of_the_untimed_tokens_serves_the_timed_image(janus, monkeypatch):
    seen = []

    def generate(subject, cache, batch_size, windows):
        result = generate_windows(subject, cache, batch_size, windows)
        seen.append((windows, cache, getattr(cache, "version", None)))
        return result

    monkeypatch.setattr(running_module, "generate_windows", generate)
    cases = [Case("ssd", 0.4), Case("DynamicCache"), Case("StaticCache")]
    measure(janus, cases, [range(64)], batch_size=1, rounds=1)
    assert [windows for windows, *_ in seen] == 6 * [[range(8)], [range(64)]]
    assert len({id(cache) for _, cache, _ in seen[4:6] + seen[10:12]}) == 1, "compiled steps are tied to a StaticCache"
    for (_, first, first_version), (_, second, second_version) in (seen[0:2], seen[6:8]):
        assert second is first
        assert second_version == first_version, "a recorded graph would be invalid"
    assert seen[2][1] is not seen[3][1], "a DynamicCache cannot be emptied"


@needs_compiler
def test_compiled_caches_compile_once_and_leave_nothing(janus):
    cases = [Case("StaticCache"), Case("StaticCache", steps="compiled"), Case("ssd", 0.4, "fast_decode")]
    counters.clear()
    results = measure(janus, cases, choose_windows(64, 16), batch_size=2, rounds=2)
    assert counters["stats"]["unique_graphs"] == 2, "one graph for each compiled cache, in the round that warms up"
    assert [result.failure for result in results] == [None] * 3
    assert [len(result.seconds) for result in results] == [2, 2, 2]
    assert "forward" not in vars(janus.model.get_decoder())
    assert results[0].key_value == results[1].key_value > results[2].key_value > 0


@needs_compiler
def test_what_cannot_be_compiled_says_so_and_the_rest_goes_on(janus):
    cases = [Case("StaticCache", steps="compiled"), Case("StaticCache")]
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        broken, fine = measure(janus, cases, choose_windows(64, 16), batch_size=3, rounds=1)
    assert broken.failure.startswith("cannot be compiled here: ")
    assert (broken.seconds, len(fine.seconds)) == ([], 1)
    assert "forward" not in vars(janus.model.get_decoder())
    torch.compiler.reset()


RUN_CASES = [Case("DynamicCache"), Case("StaticCache"), Case("ssd", 0.4)]


@pytest.fixture(scope="module")
def reports():
    """The reports of one run, for the tests that read them."""
    sizes = {"batch_sizes": [1, 2], "windows": choose_windows(64, None), "rounds": 2}
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        subject = load_subject("tiny-janus", torch.float32, CPU)
        return list(run(subject, RUN_CASES, **sizes, command="ssd-cache bench --x"))


def test_a_run_gives_speed_and_bytes(reports):
    assert [len(report.rows) for report in reports] == [3, 6], "after each batch size"
    report = reports[-1]
    assert [(row.cache, row.batch_size) for row in report.rows] == [
        (case.name, batch) for batch in (1, 2) for case in RUN_CASES
    ]
    ours = "CPU loop, eager" if has_compiler() else "torch's attention, eager"
    for row in report.rows:
        assert len(row.seconds) == 2
        assert row.slowest <= row.tokens_per_second <= row.fastest
        assert row.tokens_per_second == pytest.approx(64 * row.batch_size / (sum(row.seconds) / 2))
        assert len(row.quarters_ms) == 4
        assert 0 < min(row.quarters_ms) <= max(row.quarters_ms)
        assert row.max_ms == pytest.approx(1000 * max(row.work.seconds(report.machine)))
        assert row.sum_ms == pytest.approx(1000 * sum(row.work.seconds(report.machine)))
        assert row.is_rival == (row.cache != "ssd 40%")
        assert row.served_by == ("sdpa, eager" if row.is_rival else ours)
    dynamic, static, ssd = (row.key_value + row.bookkeeping for row in report.rows[:3])
    assert 1.5 * ssd < dynamic <= static


def test_seconds_become_speeds():
    steps = [[0.010 + 0.0001 * position for position in range(63)] for _ in range(3)]
    steps[1] = [2 * step for step in steps[1]]  # a slow round does not move the medians
    steps[0][20], steps[2][20] = 9.0, 9.0  # nor a slow step, but for the mean
    measured = Measurement(Case("DynamicCache"), 2, seconds=[1.0, 2.0, 0.5], steps=steps, key_value=100)
    row = summarize(measured, choose_windows(64, None), 64, Machine(1, 1), StepWork(1, 1.0, 1.0))
    assert (row.slowest, row.tokens_per_second, row.fastest) == (64, 128, 256)
    assert row.quarters_ms == pytest.approx([10.75, 12.45, 13.95, 15.5])
    assert row.step_ms == pytest.approx(10 + 0.1 * 31 + (9000 - 12) / 63)


def test_tables_and_json_hold_the_run(reports):
    report = reports[-1]
    (title, heads, rows), steps, memory, *others = report.tables()
    best = max(report.rows[:2], key=lambda row: row.tokens_per_second)
    assert title == f"Speed, batch 1; best full cache: {best.cache}"
    row = report.rows[2]
    cells = dict(zip(heads, rows[2], strict=True))
    assert cells["cache"] == "ssd 40%"
    assert cells["tokens/s"] == number(row.tokens_per_second)
    assert cells["to Dynamic"] == f"{row.tokens_per_second / report.rows[0].tokens_per_second:.2f}x"
    assert cells["to best"] == f"{row.tokens_per_second / best.tokens_per_second:.2f}x"
    assert dict(zip(steps[1], steps[2][2], strict=True))["sum / mean"] == f"{100 * row.sum_ms / row.step_ms:.3g}%"
    assert dict(zip(memory[1], memory[2][2], strict=True))["served by"] == row.served_by
    assert len(others) == len(steps[2]) == len(memory[2]) == 3
    assert dict(zip(memory[1], memory[2][2], strict=True))["K and V"] == size(row.key_value)
    text = report.to_markdown()
    for line in [report.command, *report.condition_lines()]:
        assert line in text
    values = json.loads(report.to_json())
    assert values["format"] == "ssd-cache bench 4"
    assert values["rows"][2]["tokens_per_second"] == row.tokens_per_second
    assert values["rows"][2]["work"]["weight_bytes"] == row.work.weight_bytes


def test_a_failure_has_a_row():
    failed = Row("StaticCache", 4, is_rival=True, failure="out of memory")
    report = Report("c", {"model": "m"}, Machine(1, 1), [failed])
    tables = report.tables()
    assert tables[0][2][0][:3] == ["StaticCache", "out of memory", "-"]
    assert all(len(rows[0]) == len(heads) for _, heads, rows in tables)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (99.96, "100.0"), (1234.5, "1234"), (-2.5, "-2.50")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


# --- the command line


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """`bench(*arguments)` in an empty folder; gives typer's result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_command_line_fills_a_folder_and_its_command_repeats_it(bench, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    result = bench(
        *("--model", folder, "--batch-size", "2,1", "--tokens", 32, "--rounds", 1),
        *("--caches", "DynamicCache;ssd 50%", "--output", "out"),
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md"]
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(row["cache"], row["batch_size"]) for row in report["rows"]] == [
        ("DynamicCache", 1),
        ("ssd 50%", 1),
        ("DynamicCache", 2),
        ("ssd 50%", 2),
    ]
    assert report["conditions"]["head map"] == "made up for tests"
    for text in ("Speed, batch 2", "ssd 50%", "to repeat it: ssd-cache bench"):
        assert text in result.stdout
    (tmp_path / "out" / "bench.md").unlink()
    program, command, *arguments = shlex.split(report["command"])
    assert (program, command) == ("ssd-cache", "bench")
    assert bench(*arguments).exit_code == 0
    assert report["command"] in (tmp_path / "out" / "bench.md").read_text()


def test_the_page_on_speed_is_filled_with_what_was_measured(bench, tmp_path):
    """As `make bench-gpu` does; here with a small model on the CPU, twice, on a copy of the page."""
    folder = write_checkpoint(tmp_path / "model")
    docs, results = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    page = docs / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    fill = ROOT / "docs" / "fill_gpu.py", results, "--docs", docs
    code, _, stderr = run_script(*fill)
    assert code == 2
    assert "make bench-gpu" in stderr
    arguments = ["--model", folder, "--batch-size", 1, "--tokens", 8, "--rounds", 1, "--caches", "ssd 50%"]
    for name in ("first", "second"):
        assert bench(*arguments, "--output", results / name).exit_code == 0
        assert run_script(*fill)[0] == 0
    text = page.read_text()
    assert "Not yet measured on a GPU" not in text
    assert text.count("#### Speed, batch 1") == 2, "each folder once, though the first was there before"
    for name in ("first", "second"):
        assert json.loads((docs / f"bench-gpu-{name}.json").read_text())["command"] in text
    before, after = (ROOT / "docs" / "performance.md").read_text().split("<!-- /bench-gpu -->")
    assert text.startswith(before.split("<!-- bench-gpu -->")[0])
    assert text.endswith(after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0: give whole numbers from 1 up"),
        (["--batch-size", "1,x"], "--batch-size 1,x: give whole numbers"),
        (["--rounds", "0"], "--rounds"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--caches", "ssd 21%"], "no cache 'ssd 21%'"),
        (["--policies", "sdd"], "unknown policy 'sdd'; did you mean 'ssd'?"),
        (["--policies", "ssd:buffer=1000"], "buffer=1000"),
        (["--budgets", "0.01"], "the budget gives a"),
        (["--budgets", "x"], "give a fraction of the grid"),
        (["--tokens", "7"], "7 tokens to generate: give 8 to 575"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "meta"], "--device meta: the bench measures on cpu and cuda"),
        (["--output", "file"], "--output file is a file; give a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line_before_anything_is_loaded(bench, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_help_fits_80_columns(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = bench("--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch reports the peak of a CUDA device")
def test_a_gpu_reports_its_peak():
    subject = load_subject("tiny-janus", torch.bfloat16, torch.device("cuda"))
    (result,) = measure(subject, [Case("ssd", 0.4)], choose_windows(64, 32), batch_size=2, rounds=1)
    assert result.served_by.startswith("Triton kernel")
    weights = sum(weight.nbytes for weight in subject.model.parameters())
    assert result.peak > weights + result.key_value + result.bookkeeping
