"""The range of transformers versions: the same in pyproject.toml and in the code, and told when it is left.

That the suite passes at both ends is `make test-oldest` and `make test-newest`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from ssd_cache._compat import NEXT, OLDEST, check_transformers


def test_the_range_is_that_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert f"transformers>={OLDEST[0]}.{OLDEST[1]},<{NEXT[0]}.{NEXT[1]}" in project["dependencies"]


@pytest.mark.parametrize("version", ["5.18.0", "5.20.0.dev0", "5.24.1"])
def test_versions_inside_pass(version):
    check_transformers(version)


@pytest.mark.parametrize("version", ["4.57.6", "5.17.0", "5.25.0", "6.0.0rc1", "6.1.dev0"])
def test_versions_outside_are_refused(version):
    with pytest.raises(ImportError, match=f"{version} is installed: pip install 'transformers>=5.18,<5.25'"):
        check_transformers(version)
