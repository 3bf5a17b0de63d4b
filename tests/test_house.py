"""House rules that a reader can rely on: imports run downhill, modules say what they are, no file tells on a machine.

Read from the text with `ast`, so nothing is imported. What code does is for the other tests.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

ORDER = [
    *("_compat", "io", "shapes", "emoji", "layout", "budget", "model_grids", "kernels", "head_map", "cache", "decode"),
    *("models", "enabling", "runs", "prompts", "profiling", "training", "analysis"),
    *("evaluation", "bench", "preparing", "reproducing", "app", "cli"),
]
"""Packages and root modules; each imports only from those before it. CONTRIBUTING.md says what each is for."""

FORBIDDEN = {("ssd_cache.cache.layer", "ssd_cache.cache.attention"), ("ssd_cache.cache.slots", "ssd_cache.cache.layer")}
"""Imports inside a package that would turn its order round."""

MACHINE_TEXT = {
    "an absolute path of a machine": r"(?<![\w.~}*)-])/(?:root|home|work|Users|opt)/\w",
    "a package registry's host": r"\bpypi\.(?:org|python)|python[h]osted\.|download\.pytorch\.|conda\.org",
    "pip configuration": r"index[-_]url\b|find[-_]links|trusted[-_]host",
    "a token": r"\b(?:hf|gh[pousr])_[A-Za-z0-9]{20,}|://[^/\s:@'\"]+:[^/\s@'\"]+@",
}


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted((SOURCE / "ssd_cache").rglob("*.py"))}


def _place(module: str) -> int:
    top = module.split(".")[1]
    assert top in ORDER, f"{module}: give {top!r} a place in ORDER of tests/test_house.py"
    return ORDER.index(top)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(module: str) -> set[str]:
    """Modules of the package that `module` imports when it runs, anywhere in its text."""
    path = MODULES[module]
    found, todo = set(), [ast.parse(path.read_text("utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` needs the module, `from module import name` the module named first
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
        todo.extend(node.orelse if _is_type_checking(node) else ast.iter_child_nodes(node))
    return {name for name in found if name.split(".")[0] == "ssd_cache"} - {module}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "ssd_cache"])
def test_imports_run_downhill(module):
    for imported in _imports(module) - {"ssd_cache"}:  # of which only the version is imported
        assert imported in MODULES, f"{module} imports {imported}, which is not there"
        assert _place(imported) <= _place(module), f"{module} imports {imported}: move the code down, or what it needs"
        assert (module, imported) not in FORBIDDEN


def test_imports_run_in_no_circle():
    graphlib.TopologicalSorter({module: _imports(module) for module in MODULES}).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_private_modules_of_torch_are_imported_where_they_are_used(module):
    """A torch that has moved one costs what needs it, not the import of the package."""
    for node in ast.parse(MODULES[module].read_text("utf-8")).body:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in names if name.startswith("torch._")]


def test_first_screen_is_short():
    assert len((SOURCE / "ssd_cache" / "__init__.py").read_text("utf-8").splitlines()) < 27


@pytest.mark.parametrize(
    "path",
    [*MODULES.values(), *sorted((ROOT / "examples").rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    lines = [line for line in docstring.splitlines() if line.strip()]
    assert 2 <= len(lines) <= 8, f"{path}: open it with 2 to 8 lines on what it is and is not, found {len(lines)}"


def test_no_test_file_imports_another():
    for path in sorted((ROOT / "tests").rglob("*.py")):
        found = re.findall(r"^\s*(?:from|import) (test_\w+|conftest)\b", path.read_text("utf-8"), re.MULTILINE)
        assert not found, f"{path}: move what it uses of {found} to tests/helpers/"


def test_no_file_tells_on_a_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("the list of files is git's, and this is not a checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    found = []
    for path in (ROOT / name for name in names if name):
        try:
            text = path.read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # an image, weights; or deleted and not yet committed
            continue
        for what, pattern in MACHINE_TEXT.items():
            found += [f"{path.relative_to(ROOT)}: {what}: {match[0]!r}" for match in re.finditer(pattern, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("an absolute path of a machine", "see /" + "root/models"),
        ("an absolute path of a machine", "'/" + "home/me/x'"),
        ("a package registry's host", "https://pypi" + ".org/simple"),
        ("a package registry's host", "files.python" + "hosted.org"),
        ("pip configuration", "--extra-index" + "-url x"),
        ("a token", "hf_" + "a1" * 17),
        ("a token", "https://me:secret" + "@host/x"),
    ],
)
def test_machine_text_is_recognised(what, text):
    assert re.search(MACHINE_TEXT[what], text)
