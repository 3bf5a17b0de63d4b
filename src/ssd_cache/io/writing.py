"""Files written whole or not at all: each beside its place under a temporary name, then renamed.

What is in them, and how a failure is told, is the caller's business.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write every file under a temporary name, then move them to their places in order: a reader sees whole files only.

    Raises:
        OSError: a file can not be written; when none was moved yet, all older files are as they were.
    """
    parts = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.part") for path in contents}
    try:
        for path, content in contents.items():
            with parts[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            if os.path.lexists(part):
                part.unlink()
