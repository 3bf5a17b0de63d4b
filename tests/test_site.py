"""Every page of the documentation site in headless Chromium, on a phone and on a screen: it fits, and no script fails.

The site is served from this process. Tables that fold are opened. What the pages say is for `test_docs.py`.
"""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.browser import chromium, in_browser
from helpers.site import build_site

pytestmark = in_browser


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """The address of every page."""
    folder = tmp_path_factory.mktemp("site")
    pages = [page.relative_to(folder).as_posix() for page in build_site(folder)]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield [f"http://127.0.0.1:{server.server_port}/{page}" for page in pages]
        server.shutdown()


@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_fits_and_no_script_fails(addresses, width):
    wrong = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.on("console", lambda message: message.type == "error" and wrong.append(f"{page.url}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
        for address in addresses:
            page.goto(address)
            page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
            needed = page.evaluate("document.documentElement.scrollWidth")
            if needed > width:
                wrong.append(f"{address} needs {needed} pixels")
    assert len(addresses) > 20
    assert wrong == []
