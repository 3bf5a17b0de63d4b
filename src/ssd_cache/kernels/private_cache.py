"""A cache folder for compiled code that only this user can write to, checked before anything is loaded from it.

Loading a library runs it. A predictable folder under a shared one, such as torch's default under /tmp, would let
another user of the machine supply that library. This module creates and checks folders; it loads nothing.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

NAME = "ssd-cache"


def find_folder() -> Path:
    """The folder for compiled code, created with mode 0700 where it does not exist.

    It is the first of these folders that passes `check`: `$TORCHINDUCTOR_CACHE_DIR/ssd-cache`, if the user set that
    variable; then `$XDG_CACHE_HOME/ssd-cache`, or `~/.cache/ssd-cache` if XDG_CACHE_HOME is not set.

    Raises:
        OSError: none of them can be created or passes, with the reason for each.
    """
    refused = []
    for parent in _parents():
        folder = parent / NAME
        try:
            _create(folder)
            check(folder)
        except OSError as error:
            refused.append(str(error))
        else:
            return folder
    raise PermissionError("; ".join(refused) or "this user has no home folder")


def check(path: Path) -> None:
    """Refuse a folder or file that another user could have written or can replace.

    Raises:
        OSError: it does not exist, is a symbolic link, belongs to another user, can be written by others, or lies in a
            folder where others can replace it.
    """
    found = path.lstat()
    if not (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)):
        raise PermissionError(f"{path} is neither a folder nor a file, or is a symbolic link")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by other users")
    for parent in {*path.absolute().parents, *path.resolve().parents}:
        above = parent.stat()
        # in a folder with the sticky bit, such as /tmp, others can add files but not replace ours
        is_open = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
        if is_open or above.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{path} lies in {parent}, where other users can replace it")


def _parents() -> list[Path]:
    found = []
    inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    # ignore torch's own default for the variable: torchinductor_<user> in the shared temporary folder
    if inductor.is_absolute() and inductor.parent != Path(tempfile.gettempdir()):
        found.append(inductor)
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if cache_home.is_absolute():  # the specification says to ignore relative paths
        found.append(cache_home)
    else:
        with contextlib.suppress(RuntimeError):  # this user has no entry in the user database
            found.append(Path.home() / ".cache")
    return found


def _create(folder: Path) -> None:
    """Create a folder and the missing ones above it, each with mode 0700 whatever the umask."""
    if not folder.parent.is_dir():
        _create(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
