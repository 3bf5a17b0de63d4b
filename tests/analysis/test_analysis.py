"""The paper's phenomena: every number against plain loops on a small random Janus, the margin test on planted data, and
the report as a file that needs nothing else.

Results of a trained model are in docs/analysis.md. The appearance of figures is not tested.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import left_padded_prompts, random_score, tiny_janus
from helpers.tiny_checkpoint import HEADS, LAYERS, SIDE, head_map, write_checkpoint
from typer.testing import CliRunner

from ssd_cache import HeadMap, HeadMapError, SSDCache
from ssd_cache._compat import CACHE
from ssd_cache.analysis import (
    AttentionRecorder,
    analyze,
    as_json,
    choose_heads,
    head_scores,
    margin_test,
    plot_scores,
    read_retention,
    semantic_concentration,
    write_report,
)
from ssd_cache.analysis.plotting import to_png
from ssd_cache.cli import app
from ssd_cache.decode.attention_switch import ssd_attention
from ssd_cache.layout import ImageLayout
from ssd_cache.models import Checkpoint, GeneratorError, find_generator
from ssd_cache.profiling.recorder import RecordingCache, RecordingLayer
from ssd_cache.runs.run_state import ProfilingError

CIRCLE = "a photo of a red circle"
CELLS = SIDE * SIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def generator(folder):
    return find_generator(str(folder)).load()


@pytest.fixture(scope="module")
def analysis(generator):
    return analyze(generator, CIRCLE, head_map(), budget=0.4, num_images=3, seed=3, progress=False)


# --- attention


def recorded(monkeypatch, **settings):
    """Attention recorded while a small Janus generated two images of different prompts, with queries and cache."""
    inputs, grid = left_padded_prompts([4, 7]), (6, 6)
    recorder = AttentionRecorder([(layer, head) for layer in range(2) for head in range(2)], grid, **settings)
    cache = RecordingCache(ImageLayout(grid), 2, 2, recorder)
    queries, attend = {0: [], 1: []}, RecordingLayer.attend

    def spy(self, query, *args):
        queries[self.layer_idx].append(query.double())
        return attend(self, query, *args)

    monkeypatch.setattr(RecordingLayer, "attend", spy)
    tiny_janus(grid_side=6).generate(
        **inputs, generation_mode="image", **{CACHE: cache}, guidance_scale=3.0, do_sample=False
    )
    cache.finish()
    return recorder.result(), cache, queries, inputs["attention_mask"].bool().tolist()


@pytest.mark.parametrize("row", [0, 1, 3])
def test_attention_is_that_of_plain_loops(monkeypatch, row):
    results, cache, queries, seen = recorded(monkeypatch, row=row)
    assert [(result.layer, result.head) for result in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {result.queries for result in results} == {(9, 21, 24, 29)}
    seen = seen[row % 2]  # an unconditional row is masked as its conditional one
    width = len(seen)
    for result in results:
        keys = cache.layers[result.layer].keys[row, result.head].double()
        first_rows = torch.zeros(24, 24, dtype=torch.float64)
        for token in range(35):
            query = queries[result.layer][token][row, result.head, 0]
            logits = []
            for column in range(width + token + 1):
                visible = column >= width or seen[column]
                logits.append(float(query @ keys[column]) / math.sqrt(len(query)) if visible else -math.inf)
            weights = [math.exp(logit - max(logits)) for logit in logits]
            weights = torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)
            if token < 24:
                first_rows[token, : token + 1] = weights[width:]
            if token in result.queries:
                index = result.queries.index(token)
                expected = torch.zeros(36, dtype=torch.float64)
                expected[: token + 1] = weights[width:]
                torch.testing.assert_close(result.weights[index].double(), expected, rtol=1e-4, atol=1e-6)
                assert result.prompt_share[index].item() == pytest.approx(weights[:width].sum().item(), abs=1e-5)
        torch.testing.assert_close(result.first_rows.double(), first_rows, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_attention_that_is_nan_is_named(folder, temperature):
    generator = find_generator(str(folder)).load()
    projection = generator.model.model.language_model.layers[1].self_attn.q_proj
    head_0 = torch.arange(16)
    projection.register_forward_hook(
        lambda _, __, out: out if out.shape[1] > 1 else out.index_fill(2, head_0, torch.inf)
    )
    with pytest.raises(ProfilingError, match="the attention of layer 1, KV head 0, is NaN: .* load it in bfloat16"):
        analyze(generator, CIRCLE, head_map(), budget=0.4, num_images=1, temperature=temperature, progress=False)


def test_an_unfinished_image_has_no_result():
    recorder = AttentionRecorder([(0, 0)], (6, 6))
    recorder.observe(0, torch.full((1, 1, 1, 6, 10), 0.1), 4, slice(0, 1))
    with pytest.raises(ValueError, match=r"attention of 6 visual tokens was recorded.*call finish\(\)"):
        recorder.result()


# --- scores


def test_scores_are_listed_by_name_and_number():
    scores = {f"retained-{slots}": torch.zeros(1, 2) for slots in (115, 29, 86)} | {"coverage": torch.ones(1, 2)}
    listed = head_scores(HeadMap(torch.ones(1, 2, dtype=torch.bool), (6, 6), scores=scores, threshold=0.5)).all
    assert list(listed) == ["coverage", "retained-29", "retained-86", "retained-115"]


def test_the_clearest_heads_are_chosen():
    is_spatial = torch.tensor([[True, False, True], [False, True, False]])
    score = torch.tensor([[0.6, 0.4, 0.9], [0.1, 0.7, 0.3]])
    scores = head_scores(HeadMap(is_spatial, (6, 6), scores=score, threshold=0.5))
    assert choose_heads(scores) == ((0, 2), (1, 0))
    prompt = torch.tensor([[0.1, 0.2, 0.8], [0.9, 0.1, 0.7]])  # heads that look at the prompt come after others
    with_prompt = head_scores(HeadMap(is_spatial, (6, 6), scores={"coverage": score, "prompt": prompt}, threshold=0.5))
    assert choose_heads(with_prompt) == ((1, 1), (0, 1))
    everywhere = HeadMap(is_spatial, (6, 6), scores={"coverage": score, "prompt": torch.ones(2, 3)}, threshold=0.5)
    assert choose_heads(head_scores(everywhere)) == ((0, 2), (1, 0))


def test_maps_without_scores_or_with_one_kind_have_heads_to_show():
    assert choose_heads(head_scores(HeadMap.uniform("spatial", num_layers=2, num_kv_heads=2))) == ((0, 0),)
    scored = HeadMap(torch.ones(2, 2, dtype=torch.bool), scores=torch.tensor([[0.6, 0.9], [0.8, 0.7]]))
    assert choose_heads(head_scores(scored)) == ((0, 1), (0, 0))


def test_the_score_that_the_method_names_is_taken():
    labels = torch.tensor([[True, False]])
    values = {name: torch.zeros(1, 2) for name in ("prompt", "coverage", "window_mass")}
    for method, name in (
        ("fit", "coverage"),
        ("window mass, threshold from the data", "window_mass"),
        (None, "coverage"),
    ):
        scores = head_scores(HeadMap(labels, scores=values, method=method))
        assert (scores.name, next(iter(scores.all)), len(scores.all)) == (name, name, 3)
    assert head_scores(HeadMap(labels, scores={"other": values["prompt"]})).name == "other"


# --- semantic concentration


def full_cache():
    cache = RecordingCache(ImageLayout((6, 6)), 2, 2, AttentionRecorder([(0, 0)], (6, 6)))
    inputs = left_padded_prompts([5, 5, 5])
    settings = {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": False}
    tiny_janus(grid_side=6).generate(**inputs, **{CACHE: cache}, **settings)
    return cache


def share_at_margins(square):
    """0 where nothing differs: the first layer's keys do not know the prompt, but for rounding in threads."""
    return float(square[..., [0, 5]].sum() / square.sum()) if square.any() else 0.0


def test_concentration_is_that_of_plain_loops():
    labels = HeadMap(torch.tensor([[True, False], [False, False]]), (6, 6))
    cache = full_cache()
    result = semantic_concentration(cache, labels, torch.arange(6) >= 3)
    assert [(c.states, c.kind, c.num_heads) for c in result.curves] == [
        (states, kind, number) for states in ("keys", "values") for kind, number in (("spatial", 1), ("semantic", 3))
    ]
    for curve in result.curves:
        heads = {"spatial": [(0, 0)], "semantic": [(0, 1), (1, 0), (1, 1)]}[curve.kind]
        assert curve.difference.shape == (3, 35)
        for image in range(3):
            for token in range(35):
                total = 0.0
                for layer, head in heads:
                    states = getattr(cache.layers[layer], curve.states)[:, head, 5 + token].double()
                    total += sum((c - u) ** 2 for c, u in zip(states[image], states[3 + image], strict=True)) / 16
                assert curve.difference[image, token].item() == pytest.approx(float(total) / len(heads), rel=1e-5)
        rows = curve.difference[:, :30].reshape(3, 5, 6)
        assert curve.margin.share == pytest.approx(share_at_margins(rows))
        assert curve.margin.chance == pytest.approx(1 / 3)
    order = torch.tensor([0, 3, 1, 4, 2, 5])  # rows of guidance side by side, as other models have them
    cache.batch_select_indices(order)
    turned = semantic_concentration(cache, labels, order >= 3)
    for ours, theirs in zip(result.curves, turned.curves, strict=True):
        assert torch.equal(ours.difference, theirs.difference)


def test_the_sentence_says_what_the_numbers_say():
    labels = HeadMap(torch.tensor([[True, False], [False, False]]), (6, 6))
    result = semantic_concentration(full_cache(), labels, torch.arange(6) >= 3)
    keys, values = (c.margin for c in result.curves if c.kind == "semantic")
    sentence = result.sentence("tiny")
    assert sentence.startswith("tiny shows" if result.is_shown else "tiny does not show")
    assert result.is_shown == (min(keys.p_value, values.p_value) <= 0.025)
    for part in (f"{keys.share:.1%}", f"{values.share:.1%}", f"{keys.p_value:.2g}", "chance gives 33.3%", "3 images"):
        assert part in sentence
    spatial = HeadMap.uniform("spatial", num_layers=2, num_kv_heads=2, grid=(6, 6))
    alone = semantic_concentration(full_cache(), spatial, torch.arange(6) >= 3)
    assert "has no semantic head" in alone.sentence("tiny")


def blobs(num_images, generator, rows=24, columns=24):
    """Noise that is similar in neighbouring cells, as in images with objects, `[images, tokens]`."""
    noise = torch.rand(num_images, 1, rows + 6, columns, generator=generator) ** 4
    noise = torch.cat([noise[..., -3:], noise, noise[..., :3]], -1)  # goes round, so that no column is special
    return torch.nn.functional.avg_pool2d(noise, 7, stride=1).flatten(1)


def test_planted_margins_are_found():
    difference = blobs(4, torch.Generator().manual_seed(0)).reshape(4, 24, 24)
    difference[:, :, [0, -1]] *= 2
    test = margin_test(difference.flatten(1), 24)
    assert test.share > 1.8 * test.chance
    assert test.chance == 2 / 24
    assert test.p_value < 0.001
    middle = difference.roll(12, dims=2).flatten(1)
    assert margin_test(middle, 24).p_value > 0.5
    weak = blobs(4, torch.Generator().manual_seed(0)).reshape(4, 24, 24)
    weak[:, :, [0, -1]] *= 0.5
    assert margin_test(weak.flatten(1), 24).p_value > 0.99


@pytest.mark.parametrize("num_images", [4, 1])
def test_without_an_effect_every_p_is_equally_likely(num_images):
    generator = torch.Generator().manual_seed(1)
    values = [margin_test(blobs(num_images, generator), 24, num_shifts=499).p_value for _ in range(400)]
    values = torch.tensor(values)
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        found, error = (values <= level).double().mean().item(), math.sqrt(level * (1 - level) / len(values))
        assert found < level + 3.5 * error  # never too often
        if num_images > 1:  # one image has only 24 shifts, so its p comes in steps
            assert found > level - 3.5 * error


def test_the_margin_test_is_the_count_of_plain_loops():
    difference = torch.tensor([[3.0, 1.0, 1.0, 2.0, 2.0, 1.0, 0.0, 2.0, 9.0]])  # two rows of four, one token over
    test = margin_test(difference, 4, num_shifts=999, seed=5)
    columns = [5.0, 2.0, 1.0, 4.0]
    assert test.share == pytest.approx(9 / 12)
    shifts = torch.randint(4, (1, 999), generator=torch.Generator().manual_seed(5))[0].tolist()
    hits = sum(columns[s] + columns[s - 1] >= 9.0 for s in shifts)
    assert test.p_value == (1 + hits) / 1000
    assert margin_test(difference, 4, num_shifts=999, seed=5) == test
    assert margin_test(difference, 4, num_shifts=9).p_value >= 1 / 10


def test_grids_without_margins_are_refused():
    with pytest.raises(ValueError, match="needs three columns"):
        margin_test(torch.rand(1, 8), 2)
    with pytest.raises(ValueError, match="8 tokens on a grid of 24 columns"):
        margin_test(torch.rand(1, 8), 24)


# --- retention


def read_at(generator, cache, step, prompts=(CIRCLE,), on_read=lambda: None, **settings):
    """Generate with the cache; returns what it held after `step` visual tokens, and the tokens."""
    found = []

    def on_tokens(_):
        if cache.layers[-1].num_visual == step:
            found.append(read_retention(cache))
            on_read()

    tokens = generator.generate(list(prompts), cache, on_tokens=on_tokens, **settings)
    [retention] = found
    return retention, tokens


@pytest.mark.parametrize("policy", ["ssd", "h2o", "streaming-llm"])
@pytest.mark.parametrize("step", [1, 40, 63])
def test_retention_is_read_from_the_caches_own_positions(generator, policy, step):
    cache = SSDCache.from_policy(policy, head_map(), 0.4)
    taken = []

    def on_read():
        taken.extend([held[0].tolist() for held in layer.held_positions()] for layer in cache.layers)

    result, _ = read_at(generator, cache, step, [CIRCLE, "a photo of two squares"], on_read)
    assert result.num_seen == step
    assert [[list(tokens) for tokens in heads] for heads in result.positions] == taken
    assert len(taken) == LAYERS
    held = result.held
    for layer in range(LAYERS):
        for head in range(HEADS):
            assert held[layer, head].nonzero()[:, 0].tolist() == taken[layer][head]
            assert step - 1 in taken[layer][head]
            assert max(taken[layer][head]) < step
    kinds = {"ssd": head_map().is_spatial.tolist(), "h2o": [[False] * 2] * 2, "streaming-llm": [[True] * 2] * 2}
    assert result.is_spatial.tolist() == kinds[policy]
    assert result.mean_held == pytest.approx(sum(len(t) for heads in taken for t in heads) / (LAYERS * HEADS))
    union = {token for heads in taken for tokens in heads for token in tokens}
    assert result.lost_share == pytest.approx(1 - len(union) / step)


def test_streaming_llm_holds_sinks_and_a_window_to_the_token(generator):
    cache = SSDCache.from_policy("streaming-llm", head_map(), 20, buffer=1)
    retention, _ = read_at(generator, cache, 50)
    expected = (0, 1, 2, 3, *range(34, 50))
    assert all(tokens == expected for heads in retention.positions for tokens in heads)


def test_reading_a_cache_that_holds_nothing_or_a_row_that_is_not_there_is_refused(generator):
    cache = SSDCache(head_map(), 0.4)
    with pytest.raises(ValueError, match="holds no visual token"):
        read_retention(cache)
    generator.generate([CIRCLE], cache)
    assert read_retention(cache, row=1).num_seen == CELLS - 1
    with pytest.raises(ValueError, match="row=2 is out of range: the cache holds 2 rows"):
        read_retention(cache, row=2)


# --- analyze and its report


def test_analyze_measures_what_its_parts_measure(generator, analysis):
    cache = SSDCache(head_map(), 0.4)
    retention, tokens = read_at(generator, cache, CELLS * 3 // 4, [CIRCLE] * 3, seed=3)
    assert analysis.retention["ssd"].positions == retention.positions
    assert analysis.memory["ssd"] == cache.memory_stats()
    np.testing.assert_array_equal(analysis.images["ssd"], generator.to_images(tokens)[0])
    shape = generator.checkpoint.layout, LAYERS, HEADS
    full = RecordingCache(*shape, AttentionRecorder([], (SIDE, SIDE)))
    with ssd_attention(generator.language_model):
        generator.generate([CIRCLE] * 3, full, seed=3)
    expected = semantic_concentration(full, head_map(), generator.is_unconditional(3), seed=3)
    for ours, theirs in zip(analysis.concentration.curves, expected.curves, strict=True):
        torch.testing.assert_close(ours.difference, theirs.difference, rtol=1e-4, atol=1e-9)
    assert [(a.layer, a.head) for a in analysis.attention] == [(0, 0), (1, 1)]
    for attention in analysis.attention:
        total = attention.weights.sum(1) + attention.prompt_share
        torch.testing.assert_close(total, torch.ones_like(total))
    assert list(analysis.images) == ["full", "ssd", "h2o", "streaming-llm"]


def test_the_analysis_shows_what_a_map_is_used_with_and_names_it(generator, tmp_path):
    torch.manual_seed(0)
    own = replace(head_map(), budget=[[20, 40], [26, 18]], learned=random_score(2, 2, 16, (SIDE, SIDE)))
    settings = {"seed": 3, "num_images": 1, "progress": False}
    for budget, number in ((None, 26), (0.5, 32)):
        found = analyze(generator, CIRCLE, own, budget=budget, **settings)
        cache = SSDCache(own, budget)
        generator.generate([CIRCLE], cache, seed=3)
        assert list(found.retention) == ["learned", "h2o", "streaming-llm"]
        assert found.memory["learned"] == cache.memory_stats()
        assert found.conditions["policy"] == "learned: fitted slots, learned score"
        assert (found.conditions["budget"], found.conditions["buffer"]) == (budget or number, SIDE // 3)
        [held] = {len(tokens) for layer in found.retention["h2o"].positions for tokens in layer}
        assert number - SIDE < held <= number  # the baselines hold as much
    page, _ = write_report(found, tmp_path / "page")
    assert "learned: fitted slots, learned score" in page.read_text("utf-8")


def test_the_models_attention_is_as_it_was(folder):
    generator = find_generator(str(folder)).load()
    generator.model.set_attn_implementation({"text_config": "sdpa"})
    analyze(generator, CIRCLE, head_map(), budget=0.4, num_images=1, progress=False)
    assert generator.model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "num_images=0 is out of range"),
        ({"budget": 1.5}, "budget=1.5 is out of range"),
        ({"budget": 0.05}, "fewer than buffer=8"),
        ({"guidance_scale": 1.0}, "guidance_scale=1.0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_generated(generator, monkeypatch, settings, message):
    monkeypatch.setattr(type(generator), "_generate_tokens", lambda *_: pytest.fail("it generated"))
    with pytest.raises(ValueError, match=message):
        analyze(generator, CIRCLE, head_map(), **{"budget": 0.4, "progress": False, **settings})


def test_maps_and_prompts_that_cannot_be_used_are_refused(generator, monkeypatch):
    with pytest.raises(HeadMapError, match="grid of 4 x 4"):
        analyze(generator, CIRCLE, HeadMap.uniform("spatial", num_layers=2, num_kv_heads=2, grid=(4, 4)))
    with pytest.raises(HeadMapError, match="online map has no labels"):
        analyze(generator, CIRCLE, HeadMap.online(num_layers=2, num_kv_heads=2, grid=(SIDE, SIDE)))
    monkeypatch.setattr(type(generator), "_generate_tokens", lambda *_: pytest.fail("it generated"))
    for prompt, message in ((" ", "none that is empty"), ("red " * 961, "leaves 960 for the prompt: shorten it")):
        with pytest.raises(GeneratorError, match=message):
            analyze(generator, prompt, head_map(), budget=0.4, progress=False)


def test_a_grid_that_the_model_does_not_generate_is_refused(folder, monkeypatch):
    generator = find_generator(str(folder)).load()
    monkeypatch.setattr(type(generator.checkpoint), "layout", ImageLayout((9, 9)))
    labels = HeadMap.uniform("spatial", num_layers=2, num_kv_heads=2, grid=(9, 9))
    with pytest.raises(ProfilingError, match="generated 64 visual tokens, but its grid is 9 x 9"):
        analyze(generator, CIRCLE, labels, budget=0.4, num_images=1, progress=False)


class Page(HTMLParser):
    """What of a page could load something, its texts, and whether its tags are closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.open, self.texts, self.alts = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.sources += [values[name] for name in ("src", "href", "srcset", "action", "data") if name in values]
        if tag == "img":
            self.alts.append(values["alt"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def report(analysis, tmp_path_factory):
    return write_report(analysis, tmp_path_factory.mktemp("report") / "analysis")


def test_the_page_needs_nothing_else(report):
    text = report[0].read_text("utf-8")
    page = Page(text)
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text))
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == 1 + 2 + 1 + 1 + 6
    assert all(len(alt) > 20 for alt in page.alts)
    assert not {"link", "script"} & set(page.tags)
    assert 'name="viewport"' in text
    assert text.count("<table>") == 3
    assert sum(path.stat().st_size for path in report) < 5_000_000


def test_the_json_holds_the_numbers_and_the_page_says_them(analysis, report):
    numbers = json.loads(report[1].read_text("utf-8"))
    assert numbers == as_json(analysis)
    assert set(numbers) == {"conditions", "scores", "attention", "concentration", "retention", "memory"}
    for ours, theirs in zip(numbers["concentration"]["curves"], analysis.concentration.curves, strict=True):
        assert torch.allclose(torch.tensor(ours["difference"]).double(), theirs.difference, rtol=1e-5)
        assert ours["margin"]["p_value"] == theirs.margin.p_value
    for ours, theirs in zip(numbers["attention"], analysis.attention, strict=True):
        assert torch.allclose(torch.tensor(ours["weights"]), theirs.weights, rtol=1e-5)
        assert torch.allclose(torch.tensor(ours["first_rows"]), theirs.first_rows, rtol=1e-5)
    for policy, retention in analysis.retention.items():
        ours = numbers["retention"][policy]
        assert ours["positions"] == [[list(tokens) for tokens in heads] for heads in retention.positions]
        assert ours["mean_held"] == pytest.approx(retention.mean_held)
    conditions = numbers["conditions"]
    assert conditions["prompt"] == CIRCLE
    assert (conditions["seed"], conditions["step"], conditions["num_images"]) == (3, 48, 3)
    assert (conditions["dtype"], conditions["device"], conditions["budget"]) == ("float32", "cpu", 0.4)
    assert conditions["head_map_digest"] == head_map().digest
    for name in ("model", "revision", "guidance_scale", "temperature", "torch", "transformers", "ssd_cache"):
        assert name in conditions
    text = " ".join("".join(Page(report[0].read_text("utf-8")).texts).split())
    assert analysis.concentration.sentence(conditions["model"]) in text
    for curve in analysis.concentration.curves:
        assert f"{100 * curve.margin.share:.1f}%" in text
    for value in (conditions["torch"], CIRCLE, head_map().digest, "streaming-llm"):
        assert value in text


def test_html_in_prompts_and_names_is_text(analysis, tmp_path):
    evil = "<script>alert('x')</script><img src=x onerror=\"alert(1)\"> & \u201ccaf\u00e9\u201d \U0001f600"
    conditions = analysis.conditions | {"prompt": evil, "model": "</title><b>m"}
    page, numbers = write_report(replace(analysis, conditions=conditions), tmp_path)
    parsed = Page(page.read_text("utf-8"))
    assert not {"script", "b"} & set(parsed.tags)
    assert evil in "".join(parsed.texts)
    assert json.loads(numbers.read_text("utf-8"))["conditions"]["prompt"] == evil


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_while_writing_leaves_what_was_there(analysis, tmp_path, monkeypatch, exists, failing):
    folder = tmp_path / "report"
    if exists:
        folder.mkdir()
        for name in ("report.html", "report.json"):
            (folder / name).write_text("older")
    fsync, calls = os.fsync, []

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            os.ftruncate(descriptor, 2)
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr("ssd_cache.analysis.report.render", lambda _: "page")
    with pytest.raises(OSError, match="No space left"):
        write_report(analysis, folder)
    monkeypatch.undo()
    older = {"report.html": "older", "report.json": "older"} if exists else {}
    assert {path.name: path.read_text() for path in folder.iterdir()} == older


def test_the_same_analysis_gives_the_same_files(analysis, report, tmp_path):
    again = write_report(analysis, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in report]


def test_a_map_without_statistics_has_a_report(analysis, tmp_path):
    scores = head_scores(HeadMap(head_map().is_spatial, (SIDE, SIDE)))
    page, _ = write_report(replace(analysis, scores=scores), tmp_path)
    text = page.read_text("utf-8")
    assert Page(text).alts[0] == "Heat map of labels by layer and KV head, spatial heads marked."
    assert "<td>None</td>" not in text


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_optional_packages_the_remedy_is_told(analysis, tmp_path, monkeypatch, missing):
    monkeypatch.setattr("ssd_cache.analysis.plotting.find_spec", lambda name: None if name == missing else "found")
    with pytest.raises(ImportError, match=rf"{missing}, not installed here: pip install -e '\.\[plot\]'"):
        write_report(analysis, tmp_path)
    if missing == "matplotlib":
        with pytest.raises(ImportError, match="ssd-cache"):
            plot_scores(analysis.scores)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3), (30, 32)])
@pytest.mark.parametrize("scored", [True, False])
def test_score_figures_of_all_sizes_are_plotted(layers, heads, scored):
    scores = torch.rand(layers, heads)
    made = HeadMap(scores > 0.5, (24, 24), scores=scores if scored else None, threshold=0.5)
    assert to_png(plot_scores(head_scores(made)), dpi=40).startswith(b"\x89PNG")


# --- the command line


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments, command="analyze"):
        options = ["--model", str(folder)] if command == "analyze" and "--model" not in arguments else []
        return CliRunner().invoke(app, [command, *map(str, arguments), *options])

    return invoke


def test_the_command_writes_what_the_library_writes(run, generator):
    result = run(CIRCLE, "--budget", "0.4", "--num-images", "2", "--seed", "5", "-o", "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.html", "report.json"]
    numbers = json.loads(Path("out/report.json").read_text("utf-8"))
    expected = analyze(generator, CIRCLE, head_map(), budget=0.4, num_images=2, seed=5, progress=False)
    assert numbers == as_json(expected)
    said = " ".join(result.stdout.split())
    assert expected.concentration.sentence(generator.checkpoint.name) in said
    assert "report.html and report.json" in said
    assert f"{8 * CELLS}/{8 * CELLS}" in result.stderr  # the bar
    assert "Loading weights" not in result.stderr


def test_the_help_of_analyze_fits_80_columns(run):
    result = run("--help")
    assert result.exit_code == 0
    names = "output model head-map dtype device budget buffer num-images guidance temperature seed"
    for name in names.split():
        assert f"--{name} " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Annotated" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" "], "none that is empty"),
        ([CIRCLE, "-o", "a-file"], "--output a-file is a file; give a folder"),
        ([CIRCLE, "--budget", "20%"], "--budget 20%: give a fraction"),
        ([CIRCLE, "--num-images", "0"], "num_images=0"),
        ([CIRCLE, "--guidance", "1"], "guidance_scale=1.0"),
        ([CIRCLE, "--seed", "-1"], "seed=-1"),
        ([CIRCLE, "--dtype", "int8"], "unknown dtype 'int8'"),
        ([CIRCLE, "--head-map", "./nowhere"], "no such folder or file"),
        ([CIRCLE, "--head-map", "online"], "--head-map online has no labels to analyze"),
        ([CIRCLE, "--model", "mapless"], "mapless has no head map in its folder: give --head-map"),
        ([CIRCLE, "--model", "./nowhere"], "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_nothing_is_loaded(run, folder, monkeypatch, arguments, message):
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    Path("a-file").write_text("x")
    Path("mapless").mkdir()
    shutil.copy(folder / "config.json", "mapless")
    before = sorted(Path().rglob("*"))
    result = run("--budget", "0.4", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert message in result.stderr
    assert sorted(Path().rglob("*")) == before


def test_a_prompt_too_long_is_one_line_and_nothing_is_generated(run, generator, monkeypatch):
    monkeypatch.setattr(type(generator), "_generate_tokens", lambda *_: pytest.fail("it generated"))
    result = run("red " * 961, "--budget", "0.4")
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("ssd-cache: prompt 'red red")
    assert "shorten it" in result.stderr
    assert list(Path().iterdir()) == []


def test_without_the_optional_packages_the_command_says_so_in_one_line(run, monkeypatch):
    monkeypatch.setattr("ssd_cache.analysis.plotting.find_spec", lambda name: None)
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))
    result = run(CIRCLE, "--budget", "0.4")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "pip install -e '.[plot]'" in result.stderr


def test_inspect_prints_the_score_of_a_map(run, folder):
    result = run(folder, command="inspect")
    assert result.exit_code == 0, result.output
    assert re.search(r"^\s+0\s+#\.\s+\+0.200 to \+0.900\s*$", result.stdout, re.MULTILINE)
    assert re.search(r"^\s+1\s+\.\.\s+\+0.000 to \+0.100\s*$", result.stdout, re.MULTILINE)
