"""Runs a Python file as `python FILE` does, in this process, which has imported torch already."""

from __future__ import annotations

import io
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch


def run_script(path: Path, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a file that ends with `SystemExit` or at its last line."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    words = [str(word) for word in (path, *arguments)]
    with patch.object(sys, "argv", words), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    if isinstance(code, str):  # Python prints it and ends with 1
        stderr.write(f"{code}\n")
        code = 1
    return code, stdout.getvalue(), stderr.getvalue()
