"""The page of `ssd-cache app` in headless Chromium: generate, another budget, stop, two visitors, a phone.

One server for all tests, with a small random Janus and shapes-janus, whose images take long enough to be stopped.
Needs Gradio, Playwright and Chromium; `make test-app` installs the first two.
"""

from __future__ import annotations

import io
import re
import signal

import numpy as np
import pytest
from helpers.browser import chromium, in_browser
from helpers.children import start_cli
from helpers.tiny_checkpoint import write_checkpoint
from PIL import Image
from transformers import DynamicCache

from ssd_cache.app.models import DemoModel, offered_policies
from ssd_cache.models import BUNDLED, find_generator

pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]', or make test-app")
pytestmark = in_browser

PROMPT = "a photo of a red circle"
PATIENCE = 300_000
"""Milliseconds to wait for an image on a busy machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("page") / "tiny")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    """The address of a server in a process of its own; two runs may wait."""
    place = tmp_path_factory.mktemp("server")
    options = ["--model", folder, "--seconds", 1200, "--waiting", 2]
    environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(place / "files")}
    server = start_cli("app", *options, cwd=place, **environment)
    try:
        line = server.stdout.readline()
        assert "http://" in line, server.communicate(timeout=60)
        yield re.search(r"http://\S+", line)[0].rstrip("/")
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
        assert server.returncode == 0, errors
        assert "Traceback" not in errors
    finally:
        server.kill()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


class Visitor:
    """The page in a window of its own."""

    def __init__(self, page):
        self.page = page
        page.set_default_timeout(60_000)

    def fill(self, model=None, **fields):
        if model is not None:
            self.page.get_by_label("Model").click()
            self.page.get_by_role("option", name=model).click()
        for name, value in fields.items():
            sliders = {"budget": "number input for Budget", "row": "number input for After row"}
            field = self.page.get_by_label(sliders.get(name, name.capitalize()))
            field.fill(str(value))
            field.blur()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    @property
    def status(self):
        return self.page.get_by_label("Status").input_value()

    def wait_for(self, pattern, other_than=None):
        """Wait until the status matches and is another one than before."""
        self.page.wait_for_function(
            """([pattern, before]) => {
                const status = document.querySelector('#status textarea').value;
                return status !== before && new RegExp(pattern).test(status);
            }""",
            arg=[pattern, other_than],
            timeout=PATIENCE,
        )
        return self.status

    def image(self, name):
        """The pixels of an image, as the browser loads it."""
        address = self.page.locator(f"#{name} img").get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(self.page.request.get(address).body())).convert("RGB"), dtype=int)

    def check_image(self, name, wanted):
        """Check the pixels; the browser may show a new image later than the status of the same message."""
        for _ in range(100):
            if np.array_equal(self.image(name), wanted):
                return
            self.page.wait_for_timeout(200)
        np.testing.assert_array_equal(self.image(name), wanted)

    def generate(self, **fields):
        before = self.status
        self.fill(**fields)
        self.press("Generate")
        return self.wait_for("^finished", other_than=before)


@pytest.fixture
def visit(url, browser):
    """`visit()` opens the page as a new visitor; nothing may come from elsewhere, and no script may fail."""
    contexts = []

    def open_page(width=1280, height=900):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: addresses.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return Visitor(page)

    addresses, errors = [], []
    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert [address for address in addresses if not address.startswith((url, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def model(folder):
    checkpoint = find_generator(str(folder))
    return DemoModel(checkpoint.load(), *offered_policies(checkpoint))


def expected(model, cache, seed):
    tokens = model.generator.generate([PROMPT], cache, seed=seed)
    return np.asarray(model.generator.to_images(tokens)[0], dtype=int)


def test_generate_then_change_budget(visit, model):
    visitor = visit()
    first = visitor.generate(prompt=PROMPT, seed=5, budget=0.4)
    visitor.check_image("left", expected(model, DynamicCache(), 5))
    visitor.check_image("right", expected(model, model.make_cache("ssd", 0.4), 5))
    assert visitor.page.locator("#right").get_by_text("ssd, 40%").is_visible()
    for name in ("memory", "speed"):
        for curve in ("full cache", "policy"):
            assert visitor.page.locator(f"#{name} svg").get_by_text(curve, exact=True).is_visible()
    assert visitor.page.locator("#head_map img").is_visible()

    held, address = visitor.image("held"), visitor.page.locator("#held img").get_attribute("src")
    visitor.fill(row=3)
    visitor.page.wait_for_function("before => document.querySelector('#held img').src != before", arg=address)
    assert (visitor.image("held")[-16 * 5 :] < held[-16 * 5 :]).any()  # what came later is not held yet

    second = visitor.generate(budget=1)
    visitor.check_image("right", expected(model, DynamicCache(), 5))
    visitor.check_image("left", visitor.image("right"))
    assert first.splitlines()[0] != second.splitlines()[0]


def test_stop_in_the_middle(visit):
    visitor = visit()
    visitor.fill(model=BUNDLED)
    visitor.press("Generate")
    visitor.wait_for("^row [2-9] ")
    visitor.press("Stop")
    visitor.wait_for("^stopped")
    visitor.page.wait_for_timeout(3000)  # for what was under way
    image = visitor.image("left")
    is_grey = (image == image[-1, -1]).all(axis=(1, 2))
    assert is_grey[-1]
    assert not is_grey[0]
    stopped = visitor.status
    visitor.page.wait_for_timeout(3000)
    assert visitor.status == stopped
    assert (visitor.image("left") == image).all()
    other = visit()  # the machine is free again
    assert other.generate(prompt=PROMPT, budget=0.4).startswith("finished")


def test_two_visitors_at_once(visit, model):
    slow, fast = visit(), visit()
    slow.fill(model=BUNDLED)
    slow.press("Generate")
    slow.wait_for("^row ")
    fast.fill(prompt=PROMPT, seed=7, budget=0.4)
    fast.press("Generate")
    fast.page.get_by_text("queue:").first.wait_for()
    assert fast.status == ""
    slow.wait_for("^row [3-9]")
    assert fast.status == ""
    slow.press("Stop")
    fast.wait_for("^finished")
    fast.check_image("right", expected(model, model.make_cache("ssd", 0.4), 7))
    slow.wait_for("^stopped")


def test_a_visitor_who_waits_can_leave_and_one_who_leaves_stops(visit):
    slow, waiting, next_one = visit(), visit(), visit()
    slow.fill(model=BUNDLED)
    slow.press("Generate")
    slow.wait_for("^row ")
    waiting.press("Generate")
    waiting.page.get_by_text("queue:").first.wait_for()
    waiting.press("Stop")
    waiting.wait_for("^stopped")
    slow.page.close()
    assert next_one.generate(prompt=PROMPT, budget=0.4).startswith("finished")
    assert waiting.status == "stopped"


def test_a_full_queue_refuses(visit):
    visitors = [visit() for _ in range(4)]
    visitors[0].fill(model=BUNDLED)
    visitors[0].press("Generate")
    visitors[0].wait_for("^row ")
    for visitor in visitors[1:3]:
        visitor.press("Generate")
        visitor.page.get_by_text("queue:").first.wait_for()
    visitors[3].press("Generate")
    visitors[3].page.get_by_text("currently busy").first.wait_for()
    for visitor in (*visitors[1:], visitors[0]):
        visitor.press("Stop")
        visitor.wait_for("^stopped")


@pytest.mark.parametrize(
    "text", ["<img src=x onerror='document.title=1'>", "</textarea><script>document.title=1</script>"]
)
def test_prompts_are_text(visit, text):
    visitor = visit()
    status = visitor.generate(prompt=f"a circle {text}", budget=0.4)
    assert text.split()[0] in status  # the model does not know the word
    assert visitor.page.title() == "ssd-cache"  # a script would have made it 1
    assert visitor.page.locator("img[src=x]").count() == 0


def test_errors_are_said(visit):
    visitor = visit()
    visitor.fill(prompt=PROMPT, budget=0.05)
    visitor.press("Generate")
    assert "raise the budget" in visitor.wait_for("budget")


def test_equal_images_have_files_of_their_own(visit):
    """Gradio writes the file of an equal image again, while a browser may load it."""
    visitor = visit()
    visitor.generate(prompt=PROMPT, budget=1)
    visitor.check_image("right", visitor.image("left"))
    left, right = (visitor.page.locator(f"#{name} img").get_attribute("src") for name in ("left", "right"))
    assert left != right


def test_a_phone(visit):
    visitor = visit(390, 844)
    visitor.generate(prompt=PROMPT, budget=0.4)
    left, right = (visitor.page.locator(f"#{name}").bounding_box() for name in ("left", "right"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_large_requests_and_files_are_refused(visit, url):
    request = visit().page.request
    assert request.post(f"{url}/gradio_api/queue/join", data="x" * 70_000).status == 413
    file = {"name": "a.png", "mimeType": "image/png", "buffer": b"x" * 100}
    assert request.post(f"{url}/gradio_api/upload", multipart={"files": file}).status == 413
