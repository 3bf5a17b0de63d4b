"""The supported versions: the same in pyproject.toml, the code, the Makefile, README.md and docs/install.md.

That the suite passes at both ends is `make test-oldest` and `make test-newest`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from ssd_cache._compat import NEXT, OLDEST, check_transformers

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DEPENDENCIES = PROJECT["dependencies"]
PAGES = ("README.md", "docs/install.md")


def test_the_range_is_that_of_pyproject():
    assert f"transformers>={OLDEST[0]}.{OLDEST[1]},<{NEXT[0]}.{NEXT[1]}" in DEPENDENCIES


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def commands_of(target):
    return subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@needs_make
def test_make_pins_the_oldest_torch_and_transformers():
    dry = commands_of("test-oldest")
    (torch_range,) = (name for name in DEPENDENCIES if re.match(r"torch\W", name))
    oldest_torch = torch_range.removeprefix("torch>=")
    assert f"'torch=={oldest_torch}' 'transformers=={OLDEST[0]}.{OLDEST[1]}'" in dry
    torch_in_words = f"torch {oldest_torch} or newer"
    assert all(torch_in_words in (ROOT / page).read_text("utf-8") for page in PAGES)


@needs_make
def test_make_pins_the_newest_versions_that_the_page_names():
    pins = dict(re.findall(r"\b(torch|transformers|torchvision)==(\d+\.\d+\.\d+)\b", commands_of("test-newest")))
    assert pins.keys() == {"torch", "transformers", "torchvision"}
    assert pins["transformers"].startswith(f"{NEXT[0]}.{NEXT[1] - 1}.")
    text = " ".join((ROOT / "docs" / "install.md").read_text("utf-8").split())
    words = "torch {torch}, transformers {transformers} and torchvision {torchvision}".format_map(pins)
    assert f"`make test-newest` runs it with {words}" in text


def test_the_pages_give_the_ranges_of_pyproject():
    python = PROJECT["requires-python"].removeprefix(">=")
    newest = f"{NEXT[0]}.{NEXT[1] - 1}"
    for page in PAGES:
        text = " ".join((ROOT / page).read_text("utf-8").split())
        assert f"Python {python} or newer" in text, page
        assert f"transformers from {OLDEST[0]}.{OLDEST[1]} up to {newest}" in text, page


def test_the_page_of_versions_lists_the_classifiers_pythons_as_tested():
    text = (ROOT / "docs" / "install.md").read_text("utf-8")
    tested, untested = re.search(r"^\| Python \| (.*) \| (.*) \|$", text, re.MULTILINE).groups()
    classified = {each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)}
    assert classified == set(re.findall(r"3\.\d+", tested))
    assert not classified & set(re.findall(r"3\.\d+", untested))


@pytest.mark.parametrize("version", ["5.18.0", "5.20.0.dev0", "5.24.1"])
def test_versions_inside_pass(version):
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.6", "5.17.0", "5.25.0", "6.0.0rc1", "6.1.dev0"])
def test_versions_outside_are_refused(version):
    with pytest.raises(ImportError, match=f"{version} is installed: pip install 'transformers>=5.18,<5.25'"):
        check_transformers(version)
