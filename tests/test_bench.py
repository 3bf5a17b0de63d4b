"""The benchmark: its formulas against real tensors and real steps, its passes on tiny models, its results as files.

How fast anything is, is not tested.
"""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import needs_compiler
from tiny_checkpoint import write_checkpoint
from torch._dynamo.utils import counters
from transformers import (
    AttentionInterface,
    DynamicCache,
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    cache_utils,
)
from typer.testing import CliRunner

from ssd_cache.bench import (
    SHAPES,
    Case,
    Plan,
    Report,
    choose,
    choose_stretches,
    default_cases,
    load_subject,
    product_cases,
    rivals,
    run,
)
from ssd_cache.bench import roofline as roofline_module
from ssd_cache.bench.capacity import find_capacity, most, parse_memory, try_capacity
from ssd_cache.bench.figure import draw_report
from ssd_cache.bench.peak import can_tell_peak, peak_of
from ssd_cache.bench.results import Row, summarize
from ssd_cache.bench.roofline import Machine, StepWork, measure_machine, step_work
from ssd_cache.bench.running import Measurement, measure
from ssd_cache.bench.shapes import TINY_TOWERS, Shape, janus_config, make_model
from ssd_cache.bench.sizes import expected_bytes, held_bytes, mean_tokens_read, weight_bytes
from ssd_cache.bench.split import EVICTING, split_time
from ssd_cache.bench.stretches import Stretch
from ssd_cache.bench.subject import find_head_map
from ssd_cache.bench.tables import all_tables, condition_lines, number, share, to_markdown
from ssd_cache.cache.slots import SlotStore
from ssd_cache.cli import app
from ssd_cache.evaluation.policies import parse_policies

ROOT = Path(__file__).parents[1]

CPU = torch.device("cpu")
HAS_FP8 = hasattr(cache_utils, "Fp8QuantizedLayer")


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


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small shapes by name, a short look at the machine, and one thread: more would wait for each other here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, shape in TINY.items():
        monkeypatch.setitem(SHAPES, name, shape)
    monkeypatch.setitem(roofline_module.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(roofline_module.MATRIX_SIDE, "cpu", 64)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TINY)
def subject(request):
    return load_subject(request.param, torch.float32, CPU)


@pytest.fixture
def janus():
    return load_subject("tiny-janus", torch.float32, CPU)


CASES = [
    Case("DynamicCache"),
    Case("StaticCache"),
    *product_cases(
        parse_policies("full,ssd,ssd:buffer=1,ssd:num_sinks=2,ssd:kv_dtype=int8,h2o,streaming-llm,linear,margin"),
        [0.4, 30],
        is_compiled=False,
    ),
]


# --- models by shape


FACTS = {  # layers, hidden, query heads, KV heads, head_dim, billions of weights, visual tokens
    "small-cpu": (8, 512, 8, 8, 64, 0.035, 576),
    "janus-pro-1b": (24, 2048, 16, 16, 128, 1.9, 576),
    "janus-pro-7b": (30, 4096, 32, 32, 128, 7.0, 576),
    "llamagen-xl": (36, 1280, 20, 20, 64, 0.775, 576),
    "emu3": (32, 4096, 32, 8, 128, 8.5, 8190),
}


@pytest.mark.parametrize("name", FACTS)
def test_shapes_have_the_sizes_of_their_models(name):
    model = make_model(SHAPES[name], torch.bfloat16, torch.device("meta"))
    config = model.config.get_text_config(decoder=True)
    rows, columns = SHAPES[name].grid
    weights = sum(weight.numel() for weight in model.parameters()) / 1e9
    heads = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    layers, hidden, *expected_heads, billions, tokens = FACTS[name]
    assert (config.num_hidden_layers, config.hidden_size, *heads) == (layers, hidden, *expected_heads)
    assert rows * columns == tokens
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


# --- drawing


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=lambda case: case.name)
def test_drawing_goes_on_from_a_filled_cache(subject, case):
    cache, ticks = case.make_cache(subject), []
    attention = subject.config._attn_implementation
    with case.running(subject):
        subject.fill(cache, 2, subject.num_prompt + 20)
        assert int(cache.get_seq_length()) == subject.num_prompt + 20
        subject.draw(cache, 2, 5, lambda: ticks.append(1))
        assert int(cache.get_seq_length()) == subject.num_prompt + 25
        subject.fill(cache, 2, subject.num_prompt + 40)
        subject.draw(cache, 2, 3, lambda: ticks.append(1))
    assert int(cache.get_seq_length()) == subject.num_prompt + 43
    assert len(ticks) == 8
    assert subject.config._attn_implementation == attention
    whole, cells = DynamicCache(), subject.head_map.num_visual_tokens
    subject.draw(whole, 2, cells, lambda: None)
    assert whole.get_seq_length() == subject.length - 1  # the last token is not fed
    assert whole.layers[0].keys.shape[0] == 4  # two rows a picture


def test_janus_draws_whole_pictures_again_afterwards(janus):
    with pytest.raises(ZeroDivisionError):
        janus.draw(DynamicCache(), 1, 3, lambda: 1 / 0)
    assert janus.model.model.vision_model.config.num_image_tokens == 64


def test_stretches_lie_around_the_middles_of_the_quarters():
    assert choose_stretches(576, None) == [Stretch(0, 576)]
    assert choose_stretches(576, 96) == [Stretch(start, 24) for start in (60, 204, 348, 492)]
    mean = sum(sum(stretch.positions) for stretch in choose_stretches(576, 96)) / (4 * 23)
    assert mean == 288
    for tokens in (8, 62):
        stretches = choose_stretches(64, tokens)
        assert all(stretch.start >= 1 and stretch.start + stretch.num_tokens <= 64 for stretch in stretches)
    for tokens in (-1, 7, 64):
        with pytest.raises(ValueError, match=f"{tokens} tokens to draw: give 8 to 63"):
            choose_stretches(64, tokens)


# --- formulas against tensors and steps


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_expected_bytes_are_those_of_the_tensors(subject, case):
    cache = case.make_cache(subject)
    with case.running(subject):
        subject.draw(cache, 2, subject.head_map.num_visual_tokens, lambda: None)
    assert held_bytes(cache) == expected_bytes(subject, case, num_pictures=2)
    one, three = (expected_bytes(subject, case, count).total for count in (1, 3))
    assert three == 3 * one


@pytest.mark.skipif(not HAS_FP8, reason="this version of transformers has no fp8 cache")
def test_a_quantized_cache_is_counted_with_its_scales_and_has_no_formula(janus):
    case = Case("QuantizedCache", backend="fp8")
    cache = case.make_cache(janus)
    janus.fill(cache, 1, 20)
    assert held_bytes(cache).key_value == 2 * 2 * 2 * 2 * 20 * 16  # layers, K and V, rows, heads, tokens, one byte each
    assert expected_bytes(janus, case) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("start", [0, 20])
def test_tokens_read_are_those_that_the_steps_see(subject, case, start):
    cache, seen = case.make_cache(subject), []

    def look():
        if case.is_full:
            return seen.append(int(cache.get_seq_length()))
        stored = [
            store.num_stored for layer in cache.layers for store in layer.stores for _ in range(store.keys.shape[1])
        ]
        return seen.append(subject.num_prompt + sum(stored) / max(1, len(stored)))

    stretch = Stretch(start, subject.head_map.num_visual_tokens - start)
    with case.running(subject):
        if start:
            subject.fill(cache, 1, subject.num_prompt + start)
        subject.draw(cache, 1, stretch.num_tokens, look)
    assert len(seen[1:]) == len(stretch.positions)
    assert mean_tokens_read(subject, case, list(stretch.positions)) == pytest.approx(sum(seen[1:]) / len(seen[1:]))


def test_a_steps_work_is_counted_out():
    subject = load_subject("tiny-llama", torch.float32, CPU)
    cache = DynamicCache()
    subject.fill(cache, 3, subject.num_prompt + 10)  # visual tokens 0 to 9
    work = step_work(subject, Case("DynamicCache"), 3, [9])
    assert work.key_value_bytes == held_bytes(cache).key_value
    products = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64) + 32 * 64  # q, k and v, o, MLP; the head
    norms = 2 * 2 * 32 + 32
    int8 = step_work(subject, Case("ssd:kv_dtype=int8", 1.0), 3, [9])
    slots = 2 * 6 * 2 * 10  # layers, rows, KV heads, slots read; head_dim 8, a byte each, and a scale
    assert int8.key_value_bytes == work.key_value_bytes - slots * 2 * (8 * 4 - 8 - 4)
    assert work.weight_bytes == 4 * (products + norms)
    assert work.operations == 6 * (2 * products + 2 * 4 * 4 * 8 * 11)  # layers, 4 each, heads, head_dim, tokens


def test_a_step_takes_what_its_slower_half_takes():
    work = StepWork(weight_bytes=600, key_value_bytes=400.0, operations=50.0)
    assert work.least_seconds(Machine(copy_speed=100.0, matrix_speed=100.0)) == 10.0  # memory
    assert work.least_seconds(Machine(copy_speed=1000.0, matrix_speed=10.0)) == 5.0  # products
    row = Row("x", 1, step_ms=40.0, least_ms=10.0)
    assert row.roofline_share == 0.25


def test_the_machine_is_measured():
    machine = measure_machine(torch.float32, CPU)
    assert 0 < machine.copy_speed < math.inf
    assert 0 < machine.matrix_speed < math.inf


# --- pictures that fit


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 15 * 10**8), ("80MB", 8 * 10**7)]
)
def test_memory_is_read(text, expected):
    assert parse_memory(text) == expected


@pytest.mark.parametrize("text", ["", "24", "GB", "0GB", "24 apples", "-1GB"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(ValueError, match="is no amount of memory"):
        parse_memory(text)


def test_the_formula_says_how_many_pictures_fit(janus):
    weights = weight_bytes(janus)
    of_picture = 2 * 2 * 2 * 68 * 2 * 16 * 4  # rows, layers, heads, tokens, K and V, head_dim, bytes
    for count in (0, 1, 7):
        found = find_capacity(janus, Case("DynamicCache"), weights + count * of_picture + of_picture - 1)
        assert (found.picture_bytes, found.by_formula, found.by_trying) == (of_picture, count, None)
    assert find_capacity(janus, Case("DynamicCache"), 1).by_formula == 0
    static, ssd = (find_capacity(janus, case, weights + 10**8) for case in (CASES[1], Case("ssd", 0.2)))
    assert ssd.by_formula > 3 * static.by_formula


@pytest.mark.parametrize("at_most", [0, 1, 7, 100])
def test_trying_finds_the_most_that_fits(at_most):
    for limit in range(at_most + 2):
        asked = []

        def fits(number, limit=limit, asked=asked):
            asked.append(number)
            return number <= limit

        assert most(fits, at_most) == min(limit, at_most)
        assert len(asked) == len(set(asked)) <= 1 + math.ceil(math.log2(at_most + 1))


# --- caches to compare


def test_a_checkpoint_is_measured_with_its_maps_own_settings():
    names = [case.name for case in default_cases(True, find_head_map("shapes-janus"))]
    assert names[:5] == [
        "learned 100%",
        "learned 50%",
        "learned 20%",
        "learned 20%, fast_decode",
        "learned:buffer=1 20%",
    ]
    assert names[5:] == ["ssd 20%", "h2o 20%", "streaming-llm 20%"]
    assert [case.name for case in default_cases(True, find_head_map("small-cpu"))] == [
        case.name for case in default_cases()
    ]


def test_names_of_cases_tell_them_apart():
    cases = [*rivals()[0], *default_cases()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {"DynamicCache", "StaticCache", "StaticCache, compiled", "ssd 20%", "ssd 20%, fast_decode"} <= set(names)
    assert choose(cases, ["ssd 20%", "DynamicCache"]) == [Case("DynamicCache"), Case("ssd", 0.2)]
    with pytest.raises(ValueError, match="no cache 'ssd 21%': give names of DynamicCache; "):
        choose(cases, ["ssd 21%"])
    assert not any(case.is_compiled for case in (*rivals(False)[0], *default_cases(False)))


def test_every_policy_comes_at_every_budget():
    cases = product_cases(parse_policies("full,ssd:buffer=4"), [0.5, 20], is_compiled=True)
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


def test_a_quantized_cache_without_a_backend_is_left_out_with_a_line(monkeypatch):
    def quantized():
        cases, left_out = rivals()
        return [case.backend for case in cases if case.cache == "QuantizedCache"], [
            line.split(":")[0] for line in left_out
        ]

    fp8, without_fp8 = (["fp8"], []) if HAS_FP8 else ([], ["QuantizedCache of fp8"])
    monkeypatch.setattr("ssd_cache.bench.cases.QUANTIZED_BACKENDS", {"quanto": "no_such.module"})
    assert quantized() == (fp8, [*without_fp8, "QuantizedCache of 4 bits"])
    monkeypatch.setattr("ssd_cache.bench.cases.QUANTIZED_BACKENDS", {"quanto": "json"})
    assert quantized() == ([*fp8, "quanto"], without_fp8)


# --- running


@needs_compiler
def test_compiled_caches_compile_once_and_leave_nothing(janus):
    cases = [Case("StaticCache"), Case("StaticCache", is_compiled=True), Case("ssd", 0.4, is_compiled=True)]
    counters.clear()
    results = measure(janus, cases, choose_stretches(64, 16), batch_size=2, rounds=2)
    assert counters["stats"]["unique_graphs"] == 2, "one graph for each compiled cache, in the round that warms up"
    assert [result.failure for result in results] == [None] * 3
    assert [len(result.seconds) for result in results] == [2, 2, 2]
    assert "forward" not in vars(janus.model.get_decoder())
    assert results[0].held == results[1].held == expected_bytes(janus, cases[0], 2)
    split = split_time(janus, cases[2], 2, choose_stretches(64, 32))
    assert split.attention is None
    assert split.evicting > 0


@needs_compiler
def test_what_can_not_be_compiled_says_so_and_the_rest_goes_on(janus):
    cases = [Case("StaticCache", is_compiled=True), Case("StaticCache")]
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        broken, fine = measure(janus, cases, choose_stretches(64, 16), batch_size=3, rounds=1)
    assert broken.failure.startswith("can not be compiled here: ")
    assert (broken.seconds, len(fine.seconds)) == ([], 1)
    assert "forward" not in vars(janus.model.get_decoder())
    torch.compiler.reset()


def test_the_time_is_split_into_parts_that_add_up(subject):
    plain = {name: getattr(SlotStore, name) for name in EVICTING}
    attention = dict(AttentionInterface())
    stretches = choose_stretches(subject.head_map.num_visual_tokens, 32)
    for case in (Case("DynamicCache"), Case("ssd:buffer=1", 0.4)):
        split = split_time(subject, case, 1, stretches)
        parts = split.attention, split.storing, split.evicting, split.elsewhere
        assert sum(parts) == pytest.approx(1)
        assert min(split.attention, split.storing, split.elsewhere) > 0
        assert (split.evicting > 0) == (not case.is_full)
    assert {name: getattr(SlotStore, name) for name in EVICTING} == plain
    assert dict(AttentionInterface()) == attention


@pytest.mark.skipif(not can_tell_peak(), reason="this system does not tell the peak of a process")
def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    ballast = torch.ones(2**28)  # 1 GiB here must not be seen there
    small, large = (peak_of(str(folder), torch.float32, Case("DynamicCache"), batch) for batch in (1, 400))
    del ballast
    assert 0 < small.before <= small.peak < 2**30
    grown = 399 * 2 * 2 * 32 * 2 * 4 * 80  # pictures, rows, layers, hidden, K and V, bytes, tokens: at least so much
    assert large.peak > small.peak + grown


@pytest.fixture
def plan(janus):
    cases = [Case("DynamicCache"), Case("StaticCache"), Case("ssd", 0.4)]
    return Plan(cases, [1, 2], choose_stretches(64, None), 2, 10**8, False, "ssd-cache bench --x", ["a line"])


@pytest.fixture
def reports(janus, plan):
    return list(run(janus, plan))


def test_a_run_tells_speed_bytes_time_and_pictures(janus, plan, reports):
    assert [len(report.rows) for report in reports] == [3, 6, 6]  # after each batch size, then the pictures that fit
    report = reports[-1]
    assert [(row.cache, row.batch_size) for row in report.rows] == [
        (case.name, batch) for batch in (1, 2) for case in plan.cases
    ]
    for row, case in zip(report.rows, plan.cases * 2, strict=True):
        assert len(row.seconds) == 2
        assert row.slowest <= row.tokens_per_second <= row.fastest
        assert row.tokens_per_second == pytest.approx(64 * row.batch_size / (sum(row.seconds) / 2))
        assert row.pictures_per_second == pytest.approx(row.tokens_per_second / 64)
        assert [position for position, _ in row.curve] == list(range(63))
        assert row.step_ms == pytest.approx(sum(ms for _, ms in row.curve) / 63, rel=0.01)
        assert len(row.quarters_ms) == 4
        assert (row.key_value, row.bookkeeping) == (
            expected_bytes(janus, case, row.batch_size).key_value,
            expected_bytes(janus, case, row.batch_size).bookkeeping,
        )
        assert row.split.elsewhere > 0
        assert row.least_ms == pytest.approx(1000 * row.work.least_seconds(report.machine))
    assert [entry.cache for entry in report.capacities] == [case.name for case in plan.cases]


def test_seconds_become_speeds_and_growth():
    steps = [[0.010 + 0.0001 * position for position in range(63)] for _ in range(3)]
    steps[1] = [2 * step for step in steps[1]]  # a slow round does not move the medians
    steps[0][20], steps[2][20] = 9.0, 9.0  # nor a slow step, but for the mean
    measured = Measurement(Case("DynamicCache"), 2, seconds=[1.0, 2.0, 0.5], steps=steps)
    row = summarize(measured, choose_stretches(64, None), 64, machine=Machine(1, 1))
    assert (row.slowest, row.tokens_per_second, row.fastest, row.pictures_per_second) == (64, 128, 256, 2)
    assert row.quarters_ms == pytest.approx([10.75, 12.45, 13.95, 15.5])
    assert row.growth_ms == pytest.approx(10, rel=0.02)
    assert row.step_ms == pytest.approx(10 + 0.1 * 31 + (9000 - 12) / 63)


def test_results_survive_json(reports):
    report = reports[-1]
    again = Report.from_json(report.to_json())
    assert again == report
    assert to_markdown(again) == to_markdown(report)
    with pytest.raises(ValueError, match="no result of a bench"):
        Report.from_json("[1]")
    with pytest.raises(ValueError, match="no result of a bench"):
        Report.from_json(report.to_json().replace("bench 1", "bench 2"))


def test_tables_and_plot_tell_the_run(reports):
    report = reports[-1]
    speed, steps, cost, *_, fit = all_tables(report)
    row = report.rows[2]
    cells = dict(zip(speed.heads, speed.rows[2], strict=True))
    assert cells["cache"] == "ssd 40%"
    assert cells["tokens/s"] == number(row.tokens_per_second)
    assert cells["to Dynamic"] == f"{row.tokens_per_second / report.rows[0].tokens_per_second:.2f}x"
    assert len(steps.rows) == len(cost.rows) == len(fit.rows) == 3
    assert dict(zip(steps.heads, steps.rows[2], strict=True))["of it"] == share(row.roofline_share)
    text = to_markdown(report)
    for line in [report.command, *condition_lines(report)[:-1]]:
        assert line in text
    assert draw_report(report).startswith(b"\x89PNG")


def test_a_failure_has_a_row_and_no_place_in_the_plot():
    failed = Row("StaticCache", 4, failure="out of memory")
    report = Report("c", {"weights": 1, "model": "m"}, Machine(1, 1), [failed])
    speed, steps, cost = all_tables(report)
    assert len(steps.rows[0]) == len(steps.heads)
    assert speed.rows[0][:3] == ["StaticCache", "out of memory", "-"]
    assert len(cost.rows[0]) == len(cost.heads)
    assert draw_report(report).startswith(b"\x89PNG")


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
        *("--model", folder, "--batch-size", "2,1", "--tokens", 32, "--rounds", 1, "--memory", "1GB"),
        *("--caches", "DynamicCache;ssd 50%", "--no-peak", "--output", "out"),
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "bench.md", "bench.png"]
    report = Report.from_json((tmp_path / "out" / "bench.json").read_text())
    assert [(row.cache, row.batch_size) for row in report.rows] == [
        ("DynamicCache", 1),
        ("ssd 50%", 1),
        ("DynamicCache", 2),
        ("ssd 50%", 2),
    ]
    assert report.conditions["head map"] == "made up for tests"
    for text in ("Speed, batch 2", "ssd 50%", "to repeat it: ssd-cache bench"):
        assert text in result.stdout
    (tmp_path / "out" / "bench.md").unlink()
    program, command, *arguments = shlex.split(report.command)
    assert (program, command) == ("ssd-cache", "bench")
    assert bench(*arguments).exit_code == 0
    assert report.command in (tmp_path / "out" / "bench.md").read_text()


def test_the_page_on_speed_is_filled_with_what_was_measured(bench, tmp_path):
    """As `make bench-gpu` does; here with a small model on the CPU, twice, on a copy of the page."""
    folder = write_checkpoint(tmp_path / "model")
    docs, results = tmp_path / "docs", tmp_path / "results"
    docs.mkdir()
    page = docs / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    fill = [sys.executable, ROOT / "docs" / "fill_gpu.py", results, "--docs", docs]
    refused = subprocess.run(fill, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "make bench-gpu" in refused.stderr
    arguments = ["--model", folder, "--batch-size", 1, "--tokens", 8, "--rounds", 1, "--caches", "ssd 50%", "--no-peak"]
    for name in ("first", "second"):
        assert bench(*arguments, "--output", results / name).exit_code == 0
        subprocess.run(fill, check=True)
    text = page.read_text()
    assert "Not yet measured on a GPU" not in text
    assert text.count("#### Speed, batch 1") == 2, "each folder once, though the first was there before"
    for name in ("first", "second"):
        report = Report.from_json((docs / f"bench-gpu-{name}.json").read_text())
        assert report.command in text
        assert f"(bench-gpu-{name}.png)" in text
    before, after = (ROOT / "docs" / "performance.md").read_text().split("<!-- /bench-gpu -->")
    assert text.startswith(before.split("<!-- bench-gpu -->")[0])
    assert text.endswith(after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0: give whole numbers from 1 up"),
        (["--batch-size", "1,x"], "--batch-size 1,x: give whole numbers"),
        (["--rounds", "0"], "--rounds 0"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--caches", "ssd 21%"], "--caches: no cache 'ssd 21%'"),
        (["--policies", "sdd"], "unknown policy 'sdd'; did you mean 'ssd'?"),
        (["--policies", "ssd:buffer=1000"], "buffer=1000"),
        (["--budgets", "0.01"], "the budget gives a"),
        (["--budgets", "x"], "give a fraction of the grid"),
        (["--tokens", "7"], "7 tokens to draw: give 8 to 575"),
        (["--memory", "24"], "'24' is no amount of memory"),
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="peaks and pictures that fit are measured on a CUDA device")
def test_a_gpu_tells_its_peak_and_the_pictures_that_fit():
    device = torch.device("cuda")
    subject = load_subject("tiny-janus", torch.bfloat16, device)
    (result,) = measure(subject, [Case("ssd", 0.4)], choose_stretches(64, 32), batch_size=2, rounds=1)
    assert result.peak > weight_bytes(subject) + result.held.total
    memory = torch.cuda.memory_reserved(device) + 2 * 10**8
    expected = find_capacity(subject, Case("ssd", 0.4), memory).by_formula
    assert 0 < try_capacity(subject, Case("ssd", 0.4), memory, expected) <= expected
