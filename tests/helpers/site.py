"""The documentation site, built as `make docs` does; a test that calls this is skipped without MkDocs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_site(folder: Path) -> list[Path]:
    """Build the site in a folder, in strict mode; its pages but the one of missing pages."""
    pytest.importorskip("mkdocstrings", reason="mkdocs is not installed (pip install -e '.[docs]')")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [file for file in sorted(folder.rglob("*.html")) if file.name != "404.html"]
