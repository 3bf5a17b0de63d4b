"""hub/space/ as the Hub would run it: its front matter, its requirements, and what its program serves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml
from helpers.children import handling_interrupts

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "hub" / "space"


def test_the_front_matter_is_that_of_a_space():
    head = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---\n")[1])
    assert (head["sdk"], head["suggested_hardware"]) == ("gradio", "cpu-basic")
    assert (SPACE / head["app_file"]).is_file()
    assert len(head["short_description"]) <= 60  # the Hub refuses more
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    least, below = re.fullmatch(r"gradio>=([\d.]+),<(\d+)", extras["app"][0]).groups()
    version = [int(part) for part in head["sdk_version"].split(".")]
    assert [int(part) for part in least.split(".")] <= version < [int(below)]
    assert (SPACE / "requirements.txt").read_text("utf-8").split() == ["ssd-cache[app]"]


def test_its_program_serves_the_page(tmp_path):
    pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]', or make test-app")
    environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "GRADIO_SERVER_NAME": "127.0.0.1"}
    with handling_interrupts():
        server = subprocess.Popen(
            [sys.executable, str(SPACE / "app.py")],
            cwd=tmp_path,
            env={**os.environ, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    try:
        line = server.stdout.readline()
        assert "http://127.0.0.1:" in line, server.communicate(timeout=60)
        with urllib.request.urlopen(re.search(r"http://\S+", line)[0], timeout=60) as answer:
            text = answer.read().decode()
        assert "shapes-janus" in text
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.communicate()
