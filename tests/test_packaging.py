"""Wheel and sdist as hatchling builds them, and what else a release names: versions, workflows, citation.

`make package` does the rest: it installs each of the two in a new environment and generates an image with it, offline.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import ssd_cache

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAX_BYTES = 30 * 10**6
"""Of either file: the two bundled models have 17 MB."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with wheel and sdist."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built):
    (path,) = built.glob("*.whl")
    package = ROOT / "src" / "ssd_cache"
    expected = {
        f"ssd_cache/{file.relative_to(package).as_posix()}"
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(path) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = message_from_bytes(wheel.read(f"ssd_cache-{ssd_cache.__version__}.dist-info/METADATA"))
        scripts = wheel.read(f"ssd_cache-{ssd_cache.__version__}.dist-info/entry_points.txt").decode()
    assert found == expected
    assert {"ssd_cache/py.typed", "ssd_cache/kernels/cpu_loops.cpp", "ssd_cache/prompts/captions.txt"} <= found
    assert {f"ssd_cache/{name}/checkpoint/model.safetensors" for name in ("shapes", "emoji")} <= found
    assert path.stat().st_size < MAX_BYTES
    assert metadata["Version"] == ssd_cache.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert "ssd-cache = ssd_cache.cli:app" in scripts


def test_the_sdist_builds_and_tests_itself(built):
    """It has what `make test` and `make docs` read, and nothing that a run or a tool left behind."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode == 0:
        assert found - {"PKG-INFO"} <= set(listed.stdout.splitlines()), "files that git ignores"
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "mkdocs.yml", "LICENSE", "README.md", "CITATION.cff"):
        assert name in found
    assert {"tests/test_packaging.py", "docs/index.md", "src/ssd_cache/__init__.py"} <= found
    assert path.stat().st_size < MAX_BYTES


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert PROJECT["version"] == ssd_cache.__version__ == citation["version"]


def test_the_versions_of_python_are_those_of_the_workflows():
    classifiers = {name.rpartition(" :: ")[2] for name in PROJECT["classifiers"] if re.search(r" :: 3\.\d+$", name)}
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))["jobs"]
    run = {entry["python"] for entry in jobs["tests"]["strategy"]["matrix"]["include"]}
    minors = sorted(int(version.removeprefix("3.")) for version in run)
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert classifiers <= run
    row = re.search(r"^\| Python \|.*\| (.*) \|$", (ROOT / "docs" / "install.md").read_text("utf-8"), re.MULTILINE)[1]
    assert run - classifiers <= set(re.findall(r"3\.\d+", row))  # the page says that these are untested


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_exist(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    jobs, named = yaml.safe_load(path.read_text("utf-8"))["jobs"], set()
    for job in jobs.values():
        named |= {entry["target"] for entry in job.get("strategy", {}).get("matrix", {}).get("include", [])}
        named |= {match for step in job["steps"] for match in re.findall(r"^make ([a-z-]+)", step.get("run", ""))}
    assert named <= set(targets)
    assert named


def test_make_runs_every_file_that_needs_optional_packages():
    commands = re.search(r"^test-extras:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[1]
    needs = re.compile(r"importorskip\(\"(torchao|peft|bitsandbytes)\b")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if needs.search(path.read_text("utf-8"))]
    assert {path.relative_to(ROOT).as_posix() for path in files} == set(re.findall(r"tests/\S+\.py", commands))


def test_no_token_is_stored_for_a_release():
    """Trusted publishing: only the job that publishes has an identity, and it runs nothing of this repository."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8"))["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in jobs["build"]
    assert all("run" not in step for step in jobs["publish"]["steps"])
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8")
