"""The notebooks run: their code in order, in one namespace, with the package that is tested and no plot window.

Lines that begin with % install packages and are skipped. Notebooks are stored without outputs.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def _cells(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_bytes())["cells"] if cell["cell_type"] == kind]


def _code(path: Path) -> list[str]:
    """The code of each cell, without lines for IPython."""
    return [
        "\n".join("" if line.startswith("%") else line for line in cell.split("\n")) for cell in _cells(path, "code")
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_as_jupyter_reads_it(path):
    notebook = json.loads(path.read_bytes())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs before you save"
    for block in "\n".join(_cells(path, "markdown")).split("```python\n")[1:]:
        ast.parse(block.split("```")[0])


def test_the_first_images_run(monkeypatch, tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    path, namespace = FOLDER / "first_images.ipynb", {"__name__": "__main__"}
    for number, cell in enumerate(_code(path)):
        exec(compile(cell, f"{path.name}, code cell {number}", "exec"), namespace)
    assert max(namespace["small_bytes"]) < 0.25 * max(namespace["full_bytes"])
    assert namespace["full_images"][0].size == namespace["small_images"][0].size
    assert {len(images) for images in namespace["found"].values()} == {2}
    assert "budget of 20%: " in capsys.readouterr().out
    assert [len(line.get_ydata()) for line in namespace["axes"].get_lines()] == [576, 576]
