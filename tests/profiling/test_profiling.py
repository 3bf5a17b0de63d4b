"""Profiling: sums against plain loops, planted heads, interruptions, several processes, bad input.

What a trained model's heads look at is not tested here; docs/profiling.md says what was measured.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.attention_reference import compare
from helpers.children import run_cli, run_two
from helpers.models import left_padded_prompts, tiny_janus
from helpers.planted import IS_SPATIAL, LOOKS, SIDE, planted_generator, planted_tokens
from helpers.tiny_checkpoint import load_example, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from ssd_cache import HeadMap, SSDCache, profile_heads
from ssd_cache._compat import CACHE
from ssd_cache.cache.eviction import select_victims
from ssd_cache.cli import app
from ssd_cache.layout import ImageLayout
from ssd_cache.models import GeneratorError, find_generator
from ssd_cache.profiling import measuring
from ssd_cache.profiling.allocation import fit_heads
from ssd_cache.profiling.labels import choose_threshold, label_heads, map_scores, resolve_window
from ssd_cache.profiling.measuring import measure_heads, weights_sha256
from ssd_cache.profiling.observing import HeadObserver, evict
from ssd_cache.profiling.profiling import check_profiling
from ssd_cache.profiling.recorder import CHUNK, RecordingCache
from ssd_cache.profiling.state import load_state, save_state
from ssd_cache.profiling.statistics import HeadStatistics, Level, resolve_levels, widest_window
from ssd_cache.runs import batching
from ssd_cache.runs.run_state import ProfilingError

PROMPTS = ["a photo of a red circle", "a photo of two squares", "a photo of a blue triangle"]
SETTINGS = {"budget": 30, "buffer": 4, "num_recent": 4}
STUDY = load_example("profile_study")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", guidance_scale=3.0)


@pytest.fixture(scope="module")
def generator(folder):
    return find_generator(str(folder)).load()


# --- sums


@pytest.mark.parametrize(
    ("grid", "drafts"), [((4, 5), []), ((5, 3), []), ((1, 9), []), ((4, 3), [(2, 2), (1, 4)]), ((1, 4), [(3, 2)])]
)
@pytest.mark.parametrize("num_queries_short", [1, 0])
def test_sums_equal_plain_loops_over_made_up_attention(grid, drafts, num_queries_short):
    layout = ImageLayout(grid, drafts)
    rows, heads, groups, num_prompt = 3, 2, 2, 2
    cells, columns, before = layout.num_tokens, grid[1], layout.num_draft_tokens
    queries = cells - num_queries_short
    levels = [Level(6, 3, 2, 1), Level(5, 1, 2), Level(4, 4, 0), Level(7, 2, 3, 2), Level(cells, 3, 2)]
    logits = 2 * torch.randn(rows, heads, groups, queries, num_prompt + queries)
    logits[0, ..., 0] = -torch.inf  # padding
    mask = torch.ones(queries, queries).triu(1).bool()
    logits[..., num_prompt:] = logits[..., num_prompt:].masked_fill(mask, -torch.inf)
    weights = logits.softmax(-1)
    observer = HeadObserver(layout, 1, heads, levels, torch.tensor([False, True, True]))
    starts = sorted({0, *range(before % columns, queries, columns)})
    for first, stop in itertools.pairwise([*starts, queries]):
        for part in (slice(0, 2), slice(2, 3)):
            observer.observe(0, weights[part, :, :, first:stop, : num_prompt + stop], num_prompt, part)
    statistics = observer.finish()
    assert statistics.num_images == 1
    for branch, part in (("all", slice(0, 3)), ("conditional", slice(0, 1)), ("unconditional", slice(1, 3))):
        compare(statistics, [weights[part]], num_prompt, resolve_window(layout, None), branch)
    for window in (1, widest_window(layout)) if drafts else (1, 2 * columns, queries - 1):
        compare(statistics, [weights], num_prompt, window, "all")


def test_sums_equal_a_recomputation_from_eager_attention():
    model, layout = tiny_janus(grid_side=6), ImageLayout((6, 6))
    inputs = left_padded_prompts((5, 8, 3))
    levels = resolve_levels(layout, 12, [20, 9], buffer=4, num_recent=0.25, num_sinks=1)
    assert [level.num_slots for level in levels] == [12, 9, 20]
    observer = HeadObserver(layout, 2, 2, levels, torch.arange(6) >= 3)
    cache = RecordingCache(layout, 2, 2, observer)
    tokens = model.generate(**inputs, generation_mode="image", guidance_scale=3.0, do_sample=True, **{CACHE: cache})
    cache.finish()
    # the same rows once more, all at once, with attention weights handed out
    ids = inputs["input_ids"].repeat(2, 1)
    ids[3:][(ids[3:] != 1) & (ids[3:] != 4)] = 0
    generated = model.prepare_embeddings_for_image_generation(tokens[:, :-1].repeat(2, 1))
    mask = torch.cat([inputs["attention_mask"].repeat(2, 1), torch.ones(6, 35, dtype=torch.long)], dim=1)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        attentions = model.model.language_model(
            inputs_embeds=torch.cat([model.get_input_embeddings()(ids), generated], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_attentions=True,
        ).attentions
    layers = [weights[:, :, None, 8:] for weights in attentions]  # one query head to a KV head
    statistics = observer.finish()
    compare(statistics, layers, 8, 7, "all")
    compare(statistics, [weights[:3] for weights in layers], 8, 20, "conditional")
    compare(statistics, [weights[3:] for weights in layers], 8, 1, "unconditional")


@given(st.data())
def test_evicting_on_paper_is_the_caches_own_choice(data):
    slots = data.draw(st.integers(2, 8))
    buffer = data.draw(st.integers(1, slots))
    recent = data.draw(st.integers(0, slots - buffer))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=slots, max_size=slots)), dtype=torch.float)
    on_paper = scores[None, None].clone()
    evict(on_paper, Level(slots, buffer, recent))
    positions = torch.arange(slots)[None, None]
    victims = select_victims(positions, scores[None, None], buffer, num_seen=slots, num_recent=recent)
    assert (on_paper[0, 0] == -torch.inf).nonzero().flatten().tolist() == victims[0, 0].tolist()


def test_tokens_held_on_paper_are_those_that_the_cache_holds():
    model, grid = tiny_janus(grid_side=6), (6, 6)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()  # so that what a cache drops changes no query and no key
    inputs = left_padded_prompts((5, 8, 3))
    settings = {"buffer": 5, "num_recent": 0.25}
    levels = resolve_levels(ImageLayout(grid), 14, **settings)
    observer = HeadObserver(ImageLayout(grid), 2, 2, levels, torch.arange(6) >= 3)
    watching = RecordingCache(ImageLayout(grid), 2, 2, observer)
    caches = {}
    for kind in ("semantic", "spatial"):
        head_map = HeadMap.uniform(kind, num_layers=2, num_kv_heads=2, grid=grid)
        caches[kind] = SSDCache(head_map, 14, **settings)
    generated = []
    for cache in (watching, *caches.values()):
        torch.manual_seed(1)
        generated.append(
            model.generate(**inputs, generation_mode="image", guidance_scale=3.0, do_sample=True, **{CACHE: cache})
        )
    watching.finish()
    assert torch.equal(generated[0], generated[1])
    assert torch.equal(generated[0], generated[2])
    for layer in range(2):
        on_paper = observer.retention[layer][:, :, 0, :35] > -torch.inf
        for kind, cache in caches.items():
            (store,) = cache.layers[layer].stores
            held = torch.zeros(6, 2, 35, dtype=torch.bool)
            held.scatter_(2, store.positions[..., : store.num_stored].long(), True)
            if kind == "semantic":
                assert torch.equal(held, on_paper)
            else:
                assert held[0, 0].nonzero()[0].item() == levels[0].oldest(34)
                assert torch.equal(held, (torch.arange(35) >= levels[0].oldest(34)).expand_as(held))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still live; `peak` is the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.tensors, self.sizes = 0, 0, Counter(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            key = tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None
            if key is None or (key in given and key not in self.sizes):  # a view of what was there before
                continue
            if key not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
            self.tensors[key] += 1
            weakref.finalize(tensor, self.drop, key)
        return result

    def drop(self, key):
        self.tensors[key] -= 1
        if not self.tensors[key]:
            self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("drafts", [(), ((6, 48),)])
def test_recording_holds_little_beside_the_full_cache(drafts):
    heads, dim, rows, prompt, layout = 3, 32, 12, 6, ImageLayout((24, 24), drafts)
    levels, num_fed = resolve_levels(layout, 0.2, [0.1]), layout.num_tokens - 1
    observer = HeadObserver(layout, 1, heads, levels, torch.arange(rows) >= 6)
    cache = RecordingCache(layout, 1, heads, observer)
    (layer,) = cache.layers
    states, live = torch.randn(rows, heads, prompt + num_fed, dim), LiveBytes()
    layer.update(states[:, :, :prompt], states[:, :, :prompt])
    layer.see_prompt(states, None, 0.2, None)
    for token in range(prompt, prompt + num_fed):
        keys, values = layer.update(states[:, :, token : token + 1], states[:, :, token : token + 1])
        layer.attend(states[:, :, token : token + 1], keys, values, 0.2, 0.0)
    with live:
        cache.finish()
    # for each head of a row: the queries of a grid row, and one number a level and cell
    of_row = 4 * heads * (24 * dim + 2 * (num_fed + 1))
    held = layer.queries.nbytes + layer.soundness.nbytes + observer.retention[0].nbytes
    assert rows * of_row <= held < 1.01 * rows * of_row
    # a chunk of softmax weights with its copies, then sums in float64; not the weights of all rows at once
    weights_of_row = 4 * heads * 24 * (prompt + num_fed + 1)
    chunk = max(weights_of_row, 4 * CHUNK)
    assert live.peak <= chunk + max(2.5 * chunk, 13 * weights_of_row)


def test_a_watching_cache_serves_one_batch():
    model = tiny_janus(grid_side=3)
    layout = ImageLayout((2, 2))
    observer = HeadObserver(layout, 2, 2, resolve_levels(layout, 1.0), torch.arange(2) > 0)
    cache = RecordingCache(layout, 2, 2, observer)
    with pytest.raises(ValueError, match="after the 4 of the grid"):
        model.generate(**left_padded_prompts((6,)), generation_mode="image", guidance_scale=3.0, **{CACHE: cache})


# --- planted heads


@pytest.fixture(scope="module")
def planted():
    generator = planted_generator()
    assert torch.equal(generator.generate(PROMPTS[:1], temperature=0)[0], planted_tokens())
    return measure_heads(
        generator, PROMPTS, temperature=0, budget=24, buffer=4, levels=[16, 20, 26], batch_size=2, progress=False
    )


@pytest.mark.parametrize("method", ["coverage", "window"])
@pytest.mark.parametrize("rows", ["all", "conditional", "unconditional"])
def test_planted_heads_are_labelled_rightly(planted, method, rows):
    for slots in (20, 24):
        labels, threshold = label_heads(planted, method=method, rows=rows, num_slots=slots)
        assert torch.equal(labels, IS_SPATIAL)
        assert (threshold is None) == (method == "coverage")


def test_planted_heads_look_where_they_were_made_to(planted):
    offsets, scores = planted.offset_share(), map_scores(planted)
    for layer, looks in enumerate(LOOKS):
        for head, look in enumerate(looks):
            of = {name: score[layer, head].item() for name, score in scores.items()}
            if look == "above":
                assert offsets[layer, head].argmax() == 1 * (2 * SIDE - 1) + SIDE - 1
                assert offsets[layer, head, 1, SIDE - 1] > 0.9
            elif look == "margin":
                assert of["margin"] > 0.95
                assert of["retained_semantic-24"] > of["retained_spatial-24"] + 0.3
            elif look == "first":
                assert of["window_mass"] < 0.01
                assert of["retained_spatial-24"] < 0.1
            else:
                assert of["coverage"] == pytest.approx(0, abs=1e-6)


def test_shuffled_labels_are_noticed(planted):
    retained_attention = STUDY.retained_attention
    right = retained_attention(planted, IS_SPATIAL, 24)
    heads = IS_SPATIAL.numel()
    inverted = retained_attention(planted, ~IS_SPATIAL, 24)
    for spatial in itertools.combinations(range(heads), int(IS_SPATIAL.sum())):
        labels = torch.zeros(heads, dtype=torch.bool)
        labels[list(spatial)] = True
        labels = labels.view_as(IS_SPATIAL)
        if not torch.equal(labels, IS_SPATIAL):
            assert inverted <= retained_attention(planted, labels, 24) < right - 0.01
            assert STUDY.label_agreement(labels, IS_SPATIAL) < 1


def map_of(statistics):
    labels, _ = label_heads(statistics)
    return HeadMap(labels, scores=map_scores(statistics)).with_layout(statistics.layout)


def test_heads_are_fitted_by_what_was_measured(planted):
    fitted = fit_heads(map_of(planted), 24)
    slots = torch.tensor(fitted.slots)
    uniform = STUDY.retained_attention(planted, IS_SPATIAL, 24)
    assert STUDY.retained_attention(planted, fitted.is_spatial, slots) > uniform
    assert slots.sum() <= 24 * IS_SPATIAL.numel()


# --- labels


def filled(seed, grid=(4, 5), images=2, previews=()):
    """Statistics with made-up sums."""
    generator = torch.Generator().manual_seed(seed)
    statistics = HeadStatistics(ImageLayout(grid, previews), 2, 3, [Level(8, 2, 2), Level(12, 2, 2)])
    for value in statistics.sums.values():
        value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64))
    statistics.num_images = images
    return statistics


def test_statistics_add_up_and_come_back_from_their_state(tmp_path):
    first, second = filled(1), filled(2, images=3)
    both = first + second
    assert both.num_images == 5
    torch.testing.assert_close(both.sums["spatial"], first.sums["spatial"] + second.sums["spatial"])
    again, settings = both.empty(), {"num_prompts": 5}
    save_state(tmp_path / "sums", both, 2, settings)
    assert load_state(tmp_path / "sums", again, lambda _: settings) == 2
    assert again.num_images == 5
    with pytest.warns(FutureWarning, match="num_images"):
        assert again.num_pictures == 5
    assert all(torch.equal(value, both.sums[name]) for name, value in again.sums.items())
    assert torch.equal(again.window_mass(6), both.window_mass(6))
    with pytest.raises(ValueError, match="do not add up"):
        first + filled(1, grid=(5, 5))
    with pytest.raises(ValueError, match="do not add up"):
        first + filled(1, previews=[(2, 2)])
    with pytest.raises(ProfilingError, match="not the sums of a profiling run .the tensor .* expected"):
        load_state(tmp_path / "sums", filled(1, grid=(5, 5)), lambda _: settings)
    for name, value in (("offsets", 1e-300), ("evicting", 1e-300)):
        damaged = first + second
        damaged.sums[name].fill_(value)
        save_state(tmp_path / "damaged", damaged, 2, settings)
        with pytest.raises(ProfilingError, match="damaged: not the sums .* have no finite ratio"):
            load_state(tmp_path / "damaged", both.empty(), lambda _: settings)
    with pytest.raises(ProfilingError, match="5 images of 4 prompts"):
        save_state(tmp_path / "sums", both, 2, {"num_prompts": 4})
        load_state(tmp_path / "sums", again, lambda _: {"num_prompts": 4})


def test_after_a_preview_windows_stay_within_the_image():
    statistics = filled(0, previews=[(3, 7)])
    assert resolve_window(statistics.layout, None) == 6  # a row of the image and one
    assert resolve_window(ImageLayout((2, 5), ((3, 7),)), None) == 6  # the last of two rows sees the first, and no more
    assert statistics.window_mass(11).shape == (2, 3)
    with pytest.raises(ValueError, match="window=12 reaches into the draft grid for some queries: give at most 11"):
        statistics.window_mass(12)
    with pytest.raises(ValueError, match="window=12 is out of range: give 1 to 11 visual tokens"):
        label_heads(statistics, method="window", window=12)
    both = statistics + filled(1, previews=[(3, 7)])
    assert both.empty().layout.num_draft_tokens == 21
    retained = both.retained("spatial", 8).maximum(both.retained("semantic", 8)).mean().item()
    of_image = (32 * retained + 8) / 40  # of 21 + 20 tokens all but the last are queries, and 8 of them evict nothing
    labels = both.retained("spatial", 8) > both.retained("semantic", 8)
    assert STUDY.retained_attention(both, labels, 8) == pytest.approx(of_image, rel=1e-6)
    assert fit_heads(map_of(both), 8).previews == ((3, 7),)


def test_what_was_not_measured_is_refused():
    statistics = filled(0)
    with pytest.raises(ValueError, match="num_slots=9 was not measured: give one of .8, 12."):
        statistics.retained("spatial", 9)
    with pytest.raises(ValueError, match="rows='even': give one of 'all'"):
        statistics.prompt_share("even")
    statistics.sums["queries"][:, :, 1] = 0
    with pytest.raises(ValueError, match="this model has no such rows"):
        label_heads(statistics, rows="unconditional")


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(-5, 5)), min_size=1, max_size=8))
def test_the_chosen_threshold_gathers_the_most(heads):
    mass = torch.tensor([float(m) / 8 for m, _ in heads])
    gain = torch.tensor([float(g) for _, g in heads])
    threshold = choose_threshold(mass, gain)
    assert 0 <= threshold <= 1
    cuts = [0.0, *(value + 0.01 for value in mass.tolist())]
    assert gain[mass >= threshold].sum() == max(gain[mass >= cut].sum() for cut in cuts if cut <= 1 or 1 not in mass)


def test_a_map_keeps_the_score_and_threshold_that_its_labels_follow_from():
    for seed in range(20):
        statistics = filled(seed)
        labels, threshold = label_heads(statistics, method="window")
        assert torch.equal(map_scores(statistics)["window_mass"] >= threshold, labels)
        labels, threshold = label_heads(statistics, method="window", threshold=0.4, window=7)
        assert threshold == 0.4
        assert torch.equal(map_scores(statistics, window=7)["window_mass"] >= 0.4, labels)
        labels, _ = label_heads(statistics, method="coverage", num_slots=12)
        gain = statistics.retained("spatial", 12) - statistics.retained("semantic", 12)
        assert torch.equal(labels, gain > 1e-6)


def test_agreement_of_halves_grows_with_what_they_share():
    same = [filled(1)] * 8
    split_half_agreement = STUDY.split_half_agreement
    assert split_half_agreement(same, num_draws=3) == {4: (1.0, 1.0), 8: (1.0, 1.0), 16: (1.0, 1.0)}
    different = split_half_agreement([filled(seed) for seed in range(8)], num_draws=10, method="window")
    assert list(different) == [4, 8, 16]
    assert all(lowest <= mean < 1 for mean, lowest in different.values())


# --- a run


def test_a_map_says_how_it_was_made_and_the_model_stays_as_it_was(folder, generator):
    before = generator.model.config.text_config._attn_implementation
    settings = {"levels": [0.4], "progress": False, "batch_size": 2, **SETTINGS}
    head_map = profile_heads(generator, PROMPTS, seed=5, **settings)
    assert generator.model.config.text_config._attn_implementation == before
    assert head_map.method == "coverage"
    assert head_map.threshold is None
    assert head_map.model_id == str(folder)
    assert head_map.grid == (8, 8)
    assert head_map.profile["num_slots"] == [30, 26]
    assert head_map.profile["num_prompts"] == 3
    assert {"coverage", "window_mass", "prompt", "margin", "retained_spatial-26"} <= head_map.scores.keys()
    assert torch.equal(head_map.scores["coverage"] > 1e-6, head_map.is_spatial)
    assert profile_heads(generator, PROMPTS, seed=5, **settings) == head_map
    assert profile_heads(generator, PROMPTS, seed=6, **settings) != head_map
    by_window = profile_heads(generator, PROMPTS, method="window", progress=False, batch_size=2, seed=5, **SETTINGS)
    assert torch.equal(by_window.scores["window_mass"], head_map.scores["window_mass"])
    assert by_window.method == "window mass, threshold from the data"
    SSDCache(fit_heads(head_map, 30), buffer=4, num_recent=4)


@pytest.mark.parametrize("interrupted_at", [1, 2])
def test_an_interrupted_run_goes_on_from_its_state(generator, tmp_path, monkeypatch, interrupted_at):
    settings = {"progress": False, "batch_size": 1, **SETTINGS}
    whole = profile_heads(generator, PROMPTS, **settings)
    state, generated = tmp_path / "sums", []
    measure = measuring._measure_batch

    def measure_batch(generator, prompts, *args, **kwargs):
        if len(generated) == interrupted_at:
            raise KeyboardInterrupt
        generated.append(prompts)
        return measure(generator, prompts, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_measure_batch", measure_batch)
        with pytest.raises(KeyboardInterrupt):
            profile_heads(generator, PROMPTS, state_file=state, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]
    assert profile_heads(generator, PROMPTS, state_file=state, **settings) == whole
    # no image is missing, so other labels need no generation
    monkeypatch.setattr(measuring, "_measure_batch", lambda *_, **__: pytest.fail("generated again"))
    assert profile_heads(generator, PROMPTS, state_file=state, **settings) == whole
    assert profile_heads(generator, PROMPTS, state_file=state, method="window", **settings).threshold is not None


def test_sums_of_another_run_are_refused(generator, tmp_path):
    state, settings = tmp_path / "sums", {"progress": False, **SETTINGS}
    measure_heads(generator, PROMPTS[:1], state_file=state, **settings)
    before = state.read_bytes()
    with pytest.raises(ProfilingError, match="sums of another run .seed 0 there, 1 now.; give another file"):
        measure_heads(generator, PROMPTS[:1], state_file=state, seed=1, **settings)
    with pytest.raises(ProfilingError, match="num_prompts 1 there, 2 now; prompts_sha256"):
        measure_heads(generator, PROMPTS[:2], state_file=state, **settings)
    assert state.read_bytes() == before
    for content in (b"", before[:-9], b"\0" * 100, (2).to_bytes(8, "little") + b"{}"):
        state.write_bytes(content)
        with pytest.raises(ProfilingError, match="not the sums of a profiling run"):
            measure_heads(generator, PROMPTS[:1], state_file=state, **settings)


def test_further_prompts_extend_a_run_whose_batches_are_full(generator, tmp_path, monkeypatch):
    settings = {"batch_size": 2, "progress": False, **SETTINGS}
    texts = [*PROMPTS, *PROMPTS]
    whole = profile_heads(generator, texts[:6], **settings)
    state, seeds, measure = tmp_path / "sums", [], measuring._measure_batch
    monkeypatch.setattr(measuring, "_measure_batch", lambda *a, **k: seeds.append(k["seed"]) or measure(*a, **k))
    profile_heads(generator, texts[:4], state_file=state, **settings)
    assert profile_heads(generator, texts[:6], state_file=state, **settings) == whole
    assert seeds == [0, 1, 2]
    for other in (texts[:4], [*texts[:5], "a triangle"]):  # fewer prompts, and another one among the finished
        with pytest.raises(ProfilingError, match="prompts_sha256"):
            profile_heads(generator, other, state_file=state, **settings)
    profile_heads(generator, texts[:3], state_file=tmp_path / "odd", **settings)
    with pytest.raises(ProfilingError, match="num_prompts 3 there, 4 now"):  # its last batch has one prompt
        profile_heads(generator, texts[:4], state_file=tmp_path / "odd", **settings)


def test_a_full_disk_leaves_the_older_state(tmp_path, monkeypatch):
    path, settings = tmp_path / "sums", {"num_prompts": 2}
    save_state(path, filled(1), 3, settings)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfilingError, match="sums of the first 4 batches cannot be written .No space left on device"):
        save_state(path, filled(2), 4, settings)
    assert [item.name for item in tmp_path.iterdir()] == ["sums"]
    statistics = filled(0).empty()
    assert load_state(path, statistics, lambda _: settings) == 3
    assert torch.equal(statistics.sums["offsets"], filled(1).sums["offsets"])


# --- bad input


def test_weights_are_told_apart_by_a_few_of_their_numbers(folder, generator, tmp_path):
    state, settings = tmp_path / "sums", {"progress": False, **SETTINGS}
    measure_heads(generator, PROMPTS[:1], state_file=state, **settings)
    before = state.read_bytes()
    other = find_generator(str(folder)).load()
    assert weights_sha256(other.model) == weights_sha256(generator.model)
    with torch.no_grad():
        other.model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(ProfilingError, match="sums of another run .weights '.*' there, '.*' now.; give another file"):
        measure_heads(other, PROMPTS[:1], state_file=state, **settings)
    assert state.read_bytes() == before
    half = find_generator(str(folder)).load(dtype=torch.bfloat16)
    assert len({weights_sha256(one.model) for one in (generator, other, half)}) == 3


def test_prompts_are_refused_before_anything_is_generated(generator, monkeypatch):
    monkeypatch.setattr(generator.model, "generate", lambda *_, **__: pytest.fail("generated"))
    long = "red " * 961  # 1024 positions, 64 of them the image's
    for prompts, message in (
        ([], "at least one prompt, and none that is empty"),
        ("a circle", "give a list"),
        ([*PROMPTS, " "], "none that is empty"),
        ([*PROMPTS, long], "has 1024 positions, and the image leaves 960 for the prompt: shorten it"),
    ):
        with pytest.raises(GeneratorError, match=message):
            profile_heads(generator, prompts, progress=False, **SETTINGS)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_nan_attention_is_named_by_layer_and_head(folder, tmp_path, temperature):
    generator = find_generator(str(folder)).load()
    projection = generator.model.model.language_model.layers[1].self_attn.q_proj
    head_1 = torch.arange(16, 32)
    projection.register_forward_hook(
        lambda _, __, out: out if out.shape[1] > 1 else out.index_fill(2, head_1, torch.inf)
    )
    state = tmp_path / "sums"
    with pytest.raises(ProfilingError, match="the attention of layer 1, KV head 1, is NaN: .* load it in bfloat16"):
        profile_heads(generator, PROMPTS, temperature=temperature, progress=False, state_file=state, **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_that_overflows_is_one_clear_error(folder):
    generator = find_generator(str(folder)).load()
    generator.model.model.language_model.layers[0].register_forward_hook(lambda _, __, out: out * torch.inf)
    with pytest.raises(
        ProfilingError,
        match="gives NaN or infinite numbers, and its attention so far does not show where: .* load it in bfloat16",
    ):
        profile_heads(generator, PROMPTS, temperature=1.0, progress=False, **SETTINGS)


def test_a_model_whose_queries_do_not_arrive_is_refused(folder, monkeypatch):
    generator = find_generator(str(folder)).load()
    generator.model.set_attn_implementation({"text_config": "sdpa"})
    monkeypatch.setattr(generator.model.get_decoder(), "set_attn_implementation", lambda *_: None)
    with pytest.raises(ValueError, match="SSDCache receives no queries from it: its heads cannot be profiled"):
        profile_heads(generator, PROMPTS, progress=False, **SETTINGS)


def test_a_grid_that_the_model_does_not_generate_is_refused(folder, monkeypatch):
    generator = find_generator(str(folder)).load()
    monkeypatch.setattr(type(generator.checkpoint), "layout", ImageLayout((9, 9)))
    with pytest.raises(ProfilingError, match="generated 64 visual tokens, but its grid is 9 x 9"):
        profile_heads(generator, PROMPTS, progress=False, budget=30, buffer=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "guess"}, "method='guess': give one of 'coverage', 'window'"),
        ({"window": 64}, "window=64 is out of range: give 1 to 63 visual tokens"),
        ({"method": "coverage", "threshold": 0.5}, "threshold=0.5: method='coverage' has none"),
        ({"method": "window", "threshold": 1.0}, "threshold=1.0 is out of range"),
        ({"batch_size": 0}, "batch_size=0 is out of range"),
        ({"budget": 0.0}, "budget=0.0 is out of range"),
        ({"budget": 9}, "9 slots are fewer than buffer=8 and num_recent=2 and num_sinks=0 together: give at least 10"),
        ({"levels": [0.5, 5]}, "5 slots are fewer than buffer=8"),
        ({"buffer": 0}, "buffer=0 is out of range"),
        ({"num_recent": 1.5}, "num_recent=1.5 is out of range"),
        ({"num_sinks": -1}, "num_sinks=-1 is out of range"),
    ],
)
def test_settings_out_of_range_are_refused_alike_before_and_in_the_run(generator, settings, message):
    with pytest.raises(ValueError, match=message):
        check_profiling(ImageLayout((8, 8)), **{"budget": 0.4, **settings})
    with pytest.raises(ValueError, match=message):
        profile_heads(generator, PROMPTS, progress=False, **{"budget": 0.4, **settings})


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ((24, 24), {}),
        ((8, 8), {}),
        ((45, 46), {"num_recent": 0.5, "num_sinks": 3}),
        ((6, 6), {"num_recent": 0.9}),  # only the whole grid leaves room for these
    ],
)
def test_small_fractions_are_measured_at_the_least_slots_that_a_cache_holds(grid, settings):
    with pytest.warns(UserWarning, match=r"level 0.03 is") as warned:
        levels = resolve_levels(ImageLayout(grid), 1.0, [0.03, 0.99], **settings)
    least = min(level.num_slots for level in levels)
    assert f"{least} slots are measured instead" in str(warned[0].message)
    own = HeadMap.uniform("semantic", num_layers=1, num_kv_heads=1, grid=grid)
    SSDCache(own, least, **{"buffer": grid[1], "num_recent": 0.25, **settings})
    with pytest.raises(ValueError, match="fewer than buffer"):
        SSDCache(own, least - 1, **settings)


# --- the command line


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def invoke(*arguments):
        options = ["--model", str(folder), "--budget", "30", "--buffer", "4", "--num-recent", "4"]
        return CliRunner().invoke(app, ["profile", *options, *map(str, arguments)])

    return invoke


def test_the_command_writes_the_librarys_own_map(run, generator):
    lines = [json.dumps({"tag": "single_object", "prompt": prompt}) for prompt in PROMPTS]
    Path("metadata.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ("--prompts-file", "metadata.jsonl", "--levels", "0.4,40", "--batch-size", 2, "--resume", "sums")
    result = run(*arguments, "-o", "map")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("wrote map\n")
    head_map = HeadMap.from_pretrained("map")
    assert head_map == profile_heads(generator, PROMPTS, levels=[0.4, 40], batch_size=2, progress=False, **SETTINGS)
    assert sorted(path.name for path in Path().iterdir()) == ["map", "metadata.jsonl", "sums"]
    assert "Loading weights" not in result.stderr
    result = run(*arguments, "--method", "window", "--threshold", "0.5")
    assert result.exit_code == 0, result.output
    by_window = HeadMap.from_pretrained("head-map")
    assert by_window.threshold == 0.5
    assert torch.equal(by_window.is_spatial, by_window.scores["window_mass"] >= 0.5)


def test_short_memory_makes_smaller_batches_and_a_resumed_run_keeps_its_own(run, monkeypatch):
    assert run(*PROMPTS, "--resume", "sums", "-o", "first").exit_code == 0
    assert HeadMap.from_pretrained("first").profile["batch_size"] == 4
    monkeypatch.setattr(batching, "free_memory", lambda device: 4 * 10**5)
    again = run(*PROMPTS, "--resume", "sums", "-o", "again")  # the batch size is that of the sums
    assert again.exit_code == 0, again.output
    assert HeadMap.from_pretrained("again") == HeadMap.from_pretrained("first")
    small = run(*PROMPTS, "-o", "small")
    assert small.exit_code == 0, small.output
    assert HeadMap.from_pretrained("small").profile["batch_size"] < 4
    assert "generated at once instead of 4: the free memory of cpu" in small.stderr


def test_the_documented_levels_work_on_januss_grid(run, tmp_path):
    """5% of 576 tokens are 29 slots, and a cache that evicts a row of 24 at once needs 31."""
    write_checkpoint(tmp_path / "janus", side=24)
    options = ["--model", "janus", "--levels", "0.05,0.1,0.15,0.3,0.5", "--fit", "--output", "fitted"]
    result = CliRunner().invoke(app, ["profile", PROMPTS[0], *options])
    assert result.exit_code == 0, result.output
    assert " ".join(result.stderr.split()).count("31 slots are measured instead") == 1
    fitted = HeadMap.from_pretrained("fitted")
    assert fitted.profile["num_slots"] == [115, 31, 58, 86, 173, 288]
    result = CliRunner().invoke(app, ["generate", PROMPTS[0], "--model", "janus", "--head-map", "fitted"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prompts-file", "bad.jsonl"), 2, 'line 2: not a JSON object with a text under "prompt"'),
        ((PROMPTS[0], "--output", "bad.jsonl"), 2, "--output bad.jsonl is a file; give a folder"),
        ((PROMPTS[0], "--output", "bad.jsonl/map"), 2, "cannot write into bad.jsonl"),
        ((PROMPTS[0], "--resume", "nowhere/sums"), 2, "cannot write into nowhere"),
        ((PROMPTS[0], "--resume", "."), 2, "--resume . is a folder; give a file"),
        ((PROMPTS[0], "--resume", "bad.jsonl"), 2, "bad.jsonl: not the sums of a profiling run"),
        ((PROMPTS[0], "--levels", "0.4,much"), 2, "--levels much: give a fraction"),
        ((PROMPTS[0], "--method", "coverage", "--threshold", "0.5"), 2, "method='coverage' has none"),
        ((PROMPTS[0], "--budget", "5"), 2, "5 slots are fewer than buffer=4"),
        ((PROMPTS[0], "--levels", "30", "--fit"), 2, "attention was measured at the levels [30]"),
        (("red " * 961,), 1, "shorten it"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(run, arguments, code, message):
    Path("bad.jsonl").write_text('{"prompt": "a circle"}\n["a square"]\n')
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("ssd-cache: ")
    assert "Traceback" not in result.stderr
    assert [path.name for path in Path().iterdir()] == ["bad.jsonl"]


def test_a_full_disk_is_one_line_and_no_map(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run(PROMPTS[0], "-o", "first", "--resume", "sums").exit_code == 0
    monkeypatch.setattr(os, "fsync", full)
    result = run(PROMPTS[0], "--resume", "sums")
    assert result.exit_code == 1
    assert "the head map cannot be written" in result.stderr
    assert list(Path("head-map").iterdir()) == []
    result = run(PROMPTS[0])
    assert result.exit_code == 1
    assert "head-map.state: the sums of the first 1 batches cannot be written" in result.stderr


def test_help_fits_80_columns_and_names_every_option(run):
    result = run("--help")
    assert result.exit_code == 0
    options = "method budget levels buffer num-recent num-sinks window threshold resume batch-size guidance seed"
    for name in options.split():
        assert f"--{name} " in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


# --- several processes


def test_two_processes_make_the_map_that_one_makes(folder, tmp_path):
    pytest.importorskip("accelerate")
    arguments = ["--batch-size", "1", "--model", str(folder), "--budget", "30", "--buffer", "4", "--device", "cpu"]

    def command(output):
        return ["profile", *PROMPTS, *arguments, "-o", output, "--resume", f"{output}.sums"]

    both, alone = run_two(command("both"), cwd=tmp_path), run_cli(*command("alone"), cwd=tmp_path)
    assert [code for code, _, _ in (*both, alone)] == [0, 0, 0], (*both, alone)
    for (_, stdout, _), name in ((both[0], "both"), (alone, "alone")):
        assert stdout.count("wrote") == 1
        assert stdout.endswith(f"wrote {name}\n")
    assert both[1][1] == ""  # the main process alone prints and writes
    assert f"{2 * 64}/{2 * 64}" in both[0][2]  # its bar counts its own images, two of the three
    assert f"{3 * 64}/{3 * 64}" in alone[2]
    assert HeadMap.from_pretrained(tmp_path / "both") == HeadMap.from_pretrained(tmp_path / "alone")
    sums, sums_of_both = (load_file(tmp_path / f"{name}.sums") for name in ("alone", "both"))
    assert sums.keys() == sums_of_both.keys()
    assert all(torch.equal(value, sums_of_both[name]) for name, value in sums.items())


def test_several_processes_without_accelerate_are_told_the_remedy(generator, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ProfilingError, match="WORLD_SIZE=2: several processes need accelerate: pip install accelerate"):
        measure_heads(generator, PROMPTS, progress=False, **SETTINGS)
