"""Writes files completely or not at all: each first under a temporary name in the same folder, then renamed.

Callers provide the contents and turn an OSError into their own error.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that killed runs left in a folder and below; nobody else may be writing there."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write every file under a temporary name, then rename them in order, so a reader sees only whole files.

    Missing folders are created.

    Raises:
        OSError: a file cannot be written; if none was renamed yet, all older files are unchanged.
    """
    parts = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex}.part") for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with parts[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
