"""What a visitor of the demo sends: settings, a row of the map of held tokens, the headers of a request.

Each is used or refused before anything is generated, with a message that the page can show. A small random Janus; only
the test of the page itself needs Gradio.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from helpers.fuzzing import LONGEST, WouldWork, check_both, fuzz
from helpers.hostile import MARKUP, ODD, VALUES, text_mutant
from helpers.tiny_checkpoint import SIDE, write_checkpoint
from PIL import Image

from ssd_cache.app.drawing import HEADS
from ssd_cache.app.generation import FULL, Frame, generate_side_by_side
from ssd_cache.app.history import History
from ssd_cache.app.limits import MAX_BODY, Limits, SmallBodies
from ssd_cache.app.models import DemoModel, offered_policies
from ssd_cache.app.request import check_request
from ssd_cache.io.showing import ReadableError, printable
from ssd_cache.models import find_generator

SETTINGS = {"prompt": "a photo of a red circle", "policy": "ssd", "budget": 0.4, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = find_generator(str(write_checkpoint(tmp_path_factory.mktemp("app") / "model")))
    return DemoModel(checkpoint.load(), *offered_policies(checkpoint))


def changed(value, chance):
    """The value as it is, changed, or in its place what a body of JSON may hold."""
    if chance.random() < 0.6:
        return value
    if chance.random() < 0.5:
        return chance.choice(chance.choice((VALUES, VALUES, ODD, MARKUP)))
    if isinstance(value, str):
        return text_mutant(value, chance)
    return value * chance.choice((-1, 0, 0.1, 1.0, 2.5, 1e300, float("nan"), float("inf")))


def check_shown(text):
    """A text that the page shows is bounded and printable."""
    assert len(text) <= LONGEST
    assert all(char.isprintable() or char == "\n" for char in text)


def test_changed_settings_of_a_visitor_are_used_or_refused(model, monkeypatch):
    def begin(*_, **__):
        raise WouldWork

    monkeypatch.setattr(type(model.generator), "generate", begin)

    def attempt(chance):
        settings = {name: changed(value, chance) for name, value in SETTINGS.items()}
        if chance.random() < 0.3:
            settings["policy"] = chance.choice(model.policies)
        try:
            request = check_request(model, Limits(), **settings)
        except ValueError as error:
            raise ReadableError(printable(str(error))) from error  # as the page shows it
        assert request.prompt.encode().strip()
        assert request.policy in model.policies
        assert 0 < request.budget <= 1
        assert type(request.seed) is int
        for note in request.notes:
            check_shown(note)
        next(generate_side_by_side(request, bool))

    check_both(fuzz("request of a visitor", attempt))


def history():
    """A run whose images are finished."""
    found = History((SIDE, SIDE))
    image, shares = Image.new("RGB", (4 * SIDE, 4 * SIDE), "white"), torch.rand(len(HEADS), SIDE * SIDE)
    for row in range(SIDE + 1):
        for name in (FULL, "ssd"):
            held = shares if name != FULL and row > 0 else None
            found.add(Frame(name, row * SIDE, 100, None, image if row > 0 else None, held))
    return found


def test_changed_rows_and_heads_give_an_image_or_none():
    run, drawn = history(), set()

    def attempt(chance):
        row, heads = changed(chance.randint(1, SIDE), chance), changed(chance.choice(HEADS), chance)
        image = run.draw_held(row, heads)
        drawn.add(image is None)
        assert image is None or image.size == (4 * SIDE, 4 * SIDE)

    fuzz("row and heads of a visitor", attempt, errors=())
    assert drawn


def test_changed_settings_reach_no_visitor_as_an_error(model, monkeypatch):
    pytest.importorskip("gradio", reason="needs Gradio: pip install '.[app]', or make test-app")
    page_module = pytest.importorskip("ssd_cache.app.page")

    def begin(*_, **__):
        yield from ()
        raise WouldWork

    monkeypatch.setattr(page_module, "generate_side_by_side", begin)
    page = page_module.Page({"tiny": model}, Limits())
    visitor = SimpleNamespace(session_hash="visitor")

    def attempt(chance):
        settings = [changed(value, chance) for value in SETTINGS.values()]
        row, heads = changed(chance.randint(1, SIDE), chance), changed(HEADS[0], chance)
        page.show_held(chance.choice((None, history())), row, heads)
        try:
            for changes in page.generate("tiny", *settings, heads, visitor):
                check_shown(changes[page.status])
        finally:
            assert page.runs == {}

    fuzz("request of a visitor to the page", attempt, errors=())


NAMES = (b"content-length", b"content-length", b"transfer-encoding", b"x-content-length", b"content-type")


def test_changed_headers_let_no_large_body_in():
    def answer(headers):
        """The status, and whether the application was reached."""
        sent, reached = [], []

        async def application(scope, receive, send):
            reached.append(scope)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "headers": headers}
        asyncio.run(SmallBodies(application)(scope, None, send))
        assert bool(sent) != bool(reached)
        return sent[0]["status"] if sent else 200

    def attempt(chance):
        headers = []
        for _ in range(chance.randint(0, 3)):
            value = str(chance.choice((0, 5, MAX_BODY, MAX_BODY + 1, 10**9)))
            value = "0" * chance.choice((0, 0, 1, 25)) + value
            if chance.random() < 0.3:
                value = text_mutant(value, chance)
            headers.append((chance.choice(NAMES), value.encode("utf-8", "surrogatepass")))
        is_small = all(
            name != b"transfer-encoding"
            and (name != b"content-length" or (value.isdigit() and len(value) <= 20 and int(value) <= MAX_BODY))
            for name, value in headers
        )
        assert answer(headers) == (200 if is_small else 413), headers
        if not is_small:
            raise ReadableError("a large body")

    check_both(fuzz("headers of a request", attempt))
