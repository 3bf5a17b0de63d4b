"""The demo without its page: both images row by row, stops, limits, and what a visitor may send.

A small random Janus and a small random Emu3, whose rows end in a token without pixels. The page is in `test_page.py`.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from helpers.failing import one_line
from helpers.tiny_checkpoint import SIDE, write_checkpoint, write_family
from transformers import DynamicCache
from typer.testing import CliRunner

from ssd_cache.analysis.retention import read_retention
from ssd_cache.app import generation, limits
from ssd_cache.app.drawing import DARKEST, TO_COME, draw_held, held_shares
from ssd_cache.app.generation import FULL, generate_side_by_side
from ssd_cache.app.history import History
from ssd_cache.app.limits import MAX_BODY, Limits, Run, SmallBodies
from ssd_cache.app.models import DemoModel, offered_policies
from ssd_cache.app.request import check_request
from ssd_cache.app.stepping import PausedGeneration
from ssd_cache.cli import app, demo
from ssd_cache.models import BUNDLED_MODELS, find_generator

PROMPT, CELLS, BUDGET = "a photo of a red circle", SIDE * SIDE, 0.4
SETTINGS = {"prompt": PROMPT, "policy": "ssd", "budget": BUDGET, "seed": 3}
NEVER = bool  # returns False


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = find_generator(str(write_checkpoint(tmp_path_factory.mktemp("app") / "model")))
    return DemoModel(checkpoint.load(), *offered_policies(checkpoint))


def request_of(model, **changes):
    return check_request(model, Limits(), **SETTINGS | changes)


def pixels(image):
    return np.asarray(image, dtype=int)


# --- both images


class Yielding(threading.Semaphore):
    """Lets the other thread run as soon as it can."""

    def release(self):
        super().release()
        time.sleep(0.01)


@pytest.mark.parametrize("policy", ["ssd", "online"])
def test_the_images_are_those_of_generate_alone(model, policy, monkeypatch):
    monkeypatch.setattr(threading, "Semaphore", Yielding)
    generator, request = model.generator, request_of(model, policy=policy)
    before = torch.get_rng_state()
    newest = {frame.name: frame for frame in generate_side_by_side(request, NEVER)}
    assert torch.equal(torch.get_rng_state(), before)
    assert list(newest) == [FULL, policy]
    for name, cache in ((FULL, DynamicCache()), (policy, request.make_cache())):
        tokens = generator.generate([PROMPT], cache, seed=3)
        np.testing.assert_array_equal(pixels(newest[name].image), pixels(generator.to_images(tokens)[0]))
        assert newest[name].num_tokens == CELLS
    assert newest[policy].nbytes == cache.nbytes
    assert (pixels(newest[FULL].image) != pixels(newest[policy].image)).any()


def test_a_budget_of_everything_gives_the_same_image_twice(model):
    newest = {frame.name: frame for frame in generate_side_by_side(request_of(model, budget=1), NEVER)}
    np.testing.assert_array_equal(*(pixels(frame.image) for frame in newest.values()))


def test_both_images_grow_in_turn_by_a_row(model, monkeypatch):
    monkeypatch.setattr(generation, "PREVIEW_RATIO", float("inf"))  # decode every row
    frames = list(generate_side_by_side(request_of(model), NEVER))
    assert [frame.name for frame in frames] == [FULL, "ssd"] * (SIDE + 1)
    for number, frame in enumerate(frames):
        row = number // 2
        assert frame.num_tokens == row * SIDE
        if row == 0:
            assert (frame.image, frame.tokens_per_second, frame.held) == (None, None, None)
            continue
        assert frame.tokens_per_second > 0
        is_grey = (pixels(frame.image) == TO_COME).all(axis=(1, 2))
        assert is_grey.tolist() == [y >= row * 16 for y in range(SIDE * 16)]


def test_unfinished_images_are_decoded_less_often_if_decoding_is_slow(model, monkeypatch):
    monkeypatch.setattr(generation, "PREVIEW_RATIO", 0.0)
    frames = [frame for frame in generate_side_by_side(request_of(model), NEVER) if frame.name == FULL]
    images = {id(frame.image) for frame in frames if frame.image is not None}
    assert len(images) == 1  # only the last one: even the first needs time that was not spent yet
    assert not (pixels(frames[-1].image) == TO_COME).all(axis=(1, 2)).any()


def test_the_full_cache_grows_and_the_other_does_not(model):
    frames = list(generate_side_by_side(request_of(model), NEVER))
    full, held = ([frame.nbytes for frame in frames if (frame.name == FULL) == is_full] for is_full in (True, False))
    steps = np.diff(full)
    assert (steps[:-1] == SIDE * 2 * 2 * 2 * 2 * 16 * 4).all()  # K and V, layers, heads, rows, head_dim, bytes
    assert len(set(held[1:])) == 1
    assert held[-1] < full[-1]


def test_held_shares_are_those_of_the_cache(model):
    request = request_of(model)
    frames = [frame for frame in generate_side_by_side(request, NEVER) if frame.held is not None]
    cache = request.make_cache()
    model.generator.generate([PROMPT], cache, seed=3)
    held = read_retention(cache).held
    torch.testing.assert_close(frames[-1].held.float(), held_shares(read_retention(cache)).float())
    everywhere, spatial, semantic = frames[-1].held.float()
    torch.testing.assert_close(spatial, held[0, 0].float())  # the only spatial head
    torch.testing.assert_close(everywhere, held.flatten(0, 1).float().mean(0), atol=1e-3, rtol=0)  # float16
    torch.testing.assert_close(4 * everywhere, spatial + 3 * semantic, atol=5e-3, rtol=0)


def test_the_history_shows_the_tokens_held_after_a_row(model):
    history = History((SIDE, SIDE))
    assert history.draw_held(1, "all heads") is None
    for frame in generate_side_by_side(request_of(model), NEVER):
        history.add(frame)
    image, shares = pixels(history.newest["ssd"].image), history.held[4][0].view(SIDE, SIDE).repeat_interleave(16, 0)
    bright = DARKEST + (1 - DARKEST) * shares.repeat_interleave(16, 1).float().numpy()
    np.testing.assert_allclose(pixels(history.draw_held(5, "all heads")), image * bright[..., None], atol=2)  # rounding
    assert (pixels(history.draw_held(5, "semantic heads")) != pixels(history.draw_held(5, "spatial heads"))).any()
    for row in (0, SIDE + 1, float("nan"), "1", [1], None):
        assert history.draw_held(row, "all heads") is None
    for heads in ("other heads", ["all heads"], None):
        assert history.draw_held(1, heads) is None
    assert [point[0] for point in history.points[::2]] == [100 * row / SIDE for row in range(SIDE + 1)]
    assert history.points[-1][2] == history.newest["ssd"].nbytes / 1e6
    first, *lines = history.progress().splitlines()
    assert first.startswith("finished: ")
    assert [line.partition(":")[0] for line in lines] == [FULL, "ssd"]


def test_columns_without_pixels_are_not_drawn(tmp_path):
    """Emu3 ends every row of tokens with one that has no pixels."""
    checkpoint = find_generator(str(write_family("emu3", tmp_path / "emu3")), (6, 7))
    model = DemoModel(checkpoint.load(), *offered_policies(checkpoint))
    assert "ssd" not in model.policies  # it has no head map
    request = check_request(model, Limits(), **SETTINGS | {"prompt": "a red circle", "policy": "online", "budget": 1})
    history = History((6, 7))
    for frame in generate_side_by_side(request, NEVER):
        history.add(frame)
    np.testing.assert_array_equal(*(pixels(frame.image) for frame in history.newest.values()))
    image = history.newest["online"].image
    assert image.width == image.height
    shares = torch.zeros(6, 7)
    shares[:, 2] = 1
    bright = pixels(draw_held(image, (6, 7), shares.flatten())) == pixels(image)
    third = image.width // 6
    assert bright[:, 2 * third : 3 * third].all()


# --- stopping


class Countdown:
    """`is_stopped` that returns True from its call number `number` on."""

    def __init__(self, number):
        self.left = number

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("number", [0, 1, SIDE + 3, 100])
def test_a_stop_ends_both_images_at_the_next_token(model, number):
    frames = list(generate_side_by_side(request_of(model), Countdown(number)))
    newest = {frame.name: frame for frame in frames}
    assert list(newest) == [FULL, "ssd"]
    assert sum(frame.num_tokens for frame in newest.values()) <= number < 2 * CELLS
    if number == SIDE + 3:  # a row of the full cache's image, its second row in part
        image = pixels(newest[FULL].image)
        assert (image[:16] != TO_COME).any()
        assert (image[16:] == TO_COME).all()


@pytest.mark.parametrize("how", ["stop", "close", "finish"])
def test_nothing_remains_of_a_run(model, monkeypatch, how):
    """Threads have ended, hooks are removed, and K and V are freed without the garbage collector."""
    made, generations = [], []
    own_cache, own_generation = generation.DynamicCache, generation.PausedGeneration
    monkeypatch.setattr(generation, "DynamicCache", lambda: made.append(own_cache()) or made[-1])
    monkeypatch.setattr(
        generation, "PausedGeneration", lambda *given: generations.append(own_generation(*given)) or generations[-1]
    )
    frames = generate_side_by_side(request_of(model), Countdown(20) if how == "stop" else NEVER)
    for _ in range(6):
        next(frames)
    [full] = made
    held = [weakref.ref(tensor) for layer in full.layers for tensor in (layer.keys, layer.values)]
    held += [weakref.ref(store.keys) for layer in generations[1].cache.layers for store in layer.stores]
    assert all(ref() is not None for ref in held)
    made.clear()
    del full
    gc.disable()
    try:
        if how == "close":
            frames.close()
        else:
            list(frames)
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
    assert not any(generation._thread.is_alive() for generation in generations)
    assert not model.generator.visual_embeddings._forward_pre_hooks


def test_an_error_of_the_model_reaches_the_caller_and_ends_both(model, monkeypatch):
    def fail(*_, **__):
        raise ValueError("attention is NaN")

    frames = generate_side_by_side(request_of(model), NEVER)
    next(frames)
    monkeypatch.setattr(model.generator.model.model.generation_head, "forward", fail)
    with pytest.raises(ValueError, match="attention is NaN"):
        list(frames)
    assert not model.generator.visual_embeddings._forward_pre_hooks


@pytest.mark.parametrize("what", ["step", "close", "close by the garbage collector"])
def test_the_run_of_another_visitor_changes_no_random_numbers(model, what):
    """Two runs overlap when the first visitor stops: the next one begins while the first is still ending."""
    request, other = request_of(model), generate_side_by_side(request_of(model, seed=8), NEVER)
    for _ in range(4):
        next(other)
    disturb = threading.Thread(target=other.close if what == "close" else lambda: next(other))
    num_calls = iter(range(1000))

    def is_stopped():
        """Called in the thread that generates, at every token."""
        if next(num_calls) == 20:
            if what == "close by the garbage collector":
                other.close()
            else:
                disturb.start()
                disturb.join(timeout=0.005)  # it has to wait for this row
        return False

    newest = {frame.name: frame for frame in generate_side_by_side(request, is_stopped)}
    if disturb.ident is not None:
        disturb.join()
    other.close()
    for name, cache in ((FULL, DynamicCache()), ("ssd", request.make_cache())):
        image = model.generator.to_images(model.generator.generate([PROMPT], cache, seed=3))[0]
        np.testing.assert_array_equal(pixels(newest[name].image), pixels(image))


def test_a_generation_that_never_began_can_be_closed(model):
    paused = PausedGeneration(model.generator, PROMPT, DynamicCache(), 0, NEVER)
    paused.close()
    assert not paused._thread.is_alive()


def test_a_run_has_to_stop_when_asked_and_when_its_time_is_over(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    run = Run(seconds=60)
    now[0] = 159.0
    assert run.stop_reason is None
    now[0] = 161.0
    assert run.stop_reason == "stopped after 60 seconds, the limit of one run"
    run.stop()
    assert run.stop_reason == "stopped"


# --- what a visitor sends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x" * 301}, "the prompt has 301 characters, and 300 are the most"),
        ({"prompt": "  "}, "none that is empty"),
        ({"prompt": "\ud800"}, "half of a surrogate pair"),
        ({"prompt": None}, "the prompt is a NoneType: give a text"),
        ({"prompt": ["a"]}, "the prompt is a list"),
        ({"policy": "../secret"}, "unknown policy '../secret'; the policies here are ssd, online"),
        ({"policy": "ssd:buffer=1"}, "unknown policy"),
        ({"policy": "full"}, "unknown policy"),
        ({"policy": ["ssd"]}, "unknown policy"),
        ({"budget": 0}, "budget=0 is out of range: give a fraction above 0 and up to 1"),
        ({"budget": float("nan")}, "budget=nan is out of range"),
        ({"budget": "0.2"}, "budget='0.2' is out of range"),
        ({"budget": 1e9}, "out of range"),
        ({"budget": 0.05}, "raise the budget"),
        ({"seed": -1}, "seed=-1 is out of range"),
        ({"seed": 2**63}, "out of range"),
        ({"seed": 1.5}, "seed=1.5 is out of range: give a whole number from 0 up"),
        ({"seed": float("inf")}, "seed=inf is out of range"),
        ({"seed": None}, "seed=None is out of range"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_generated(model, monkeypatch, changes, message):
    monkeypatch.setattr(model.generator, "generate", None)
    with pytest.raises(ValueError, match=message):
        request_of(model, **changes)


def test_a_number_of_a_browser_is_a_seed_and_unknown_words_are_a_note(model):
    request = request_of(model, seed=3.0, prompt="  a <b>zebra</b> ")
    assert (request.seed, request.prompt) == (3, "a <b>zebra</b>")
    assert "does not know '<b>zebra</b>'" in "".join(request.notes)


def test_folders_with_head_maps_are_no_policies_here(model, tmp_path):
    model.head_map.save_pretrained(tmp_path / "map")
    with pytest.raises(ValueError, match="unknown policy"):
        request_of(model, policy=str(tmp_path / "map"))


@pytest.mark.parametrize("values", [{"prompt_characters": 0}, {"seconds": float("nan")}, {"waiting": -1}])
def test_limits_are_checked(values):
    [name] = values
    with pytest.raises(ValueError, match=f"{name}=.* is out of range: give 1 or more"):
        Limits(**values)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 200),
        ([(b"content-length", b"%d" % MAX_BODY)], 200),
        ([(b"content-length", b"%d" % (MAX_BODY + 1))], 413),
        ([(b"content-length", b"%d" % (MAX_BODY + 1)), (b"content-length", b"5")], 413),
        ([(b"content-length", b"9" * 5000)], 413),
        ([(b"content-length", b"0" * 20 + b"99999999")], 413),
        ([(b"content-length", b"-1")], 413),
        ([(b"transfer-encoding", b"chunked")], 413),
    ],
)
def test_large_requests_are_refused_by_their_headers(headers, status):
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    asyncio.run(SmallBodies(inner)({"type": "http", "headers": headers}, None, send))
    assert sent[0]["status"] == status


# --- the command


def test_without_gradio_the_command_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    message = one_line(CliRunner().invoke(app, ["app"]), 2)
    remedy = "pip install -e '.[app]' in a clone of ssd-cache"
    assert message == f"ssd-cache: the demo needs gradio, not installed here: {remedy}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "seconds=0.0 is out of range"),
        (["--head-map", "map"], "--grid and --head-map are for --model: give it too"),
        (["--model", "./no-such-model"], "no such folder"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
    ],
)
def test_wrong_options_are_refused_before_models_are_loaded(monkeypatch, arguments, message):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    monkeypatch.setattr(demo, "load_generator", None)
    result = CliRunner().invoke(app, ["app", *arguments])
    assert message in one_line(result, 2)


def test_models_that_give_no_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    folder = write_family("llama", tmp_path / "llama")
    result = CliRunner().invoke(app, ["app", "--model", str(folder), "--grid", "6x6"])
    assert "cannot decode them" in one_line(result, 2)


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_the_bundled_models_are_offered(name):
    labels, policies = offered_policies(find_generator(name))
    assert policies[0] == "learned"  # what the head map's own settings are
    assert "full" not in policies
    assert labels.learned is not None
