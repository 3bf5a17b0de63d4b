"""Headless Chromium for tests of pages, by Playwright. A test file that imports this is skipped without Playwright.

Playwright is not told to install its own Chromium; the one on the PATH is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-app installs it")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

in_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as chromium or google-chrome on the PATH"),
]
"""Marks of every test that starts `chromium`."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser, closed after the block."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
