"""Builds the C++ loops with the compiler and flags of `torch.compile`, and keeps them in a folder of this user alone.

Loading a library runs it, and another user could supply one in a folder under a shared one, such as torch's default
under /tmp. So folder and library are checked first. The file name holds a hash of source, command and processor.
Processes may build at the same time; each moves its library into place.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-ffp-contract=fast", "-ftree-vectorize")
"""Flags after those of `torch.compile`, which forbid fused multiply-add and vector loops by the compiler."""


def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ source, built if it is not in the cache folder; None where there is no compiler.

    Raises:
        Exception: the folder or the library is not safe, or the compiler or loader failed; exceptions of many classes.
    """
    if os.name != "posix":
        raise OSError("they are built on POSIX systems alone")
    command = _command(source)
    if command is None:
        return None
    text = source.read_bytes()
    key = hashlib.sha256(b"\0".join([text, *map(str.encode, command), _processor().encode()])).hexdigest()[:32]
    place = find_folder() / f"{source.stem}-{key}.so"
    if not place.exists():
        _build(command, text, place)
    check_private(place)
    return ctypes.CDLL(str(place))


def find_folder() -> Path:
    """`$XDG_CACHE_HOME/ssd-cache`, else `~/.cache/ssd-cache`; missing folders are created with mode 0700.

    Raises:
        OSError: it cannot be created, or does not pass `check_private`.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # the specification says to ignore relative paths
        home = Path("~/.cache").expanduser()
    folder = home / "ssd-cache"
    try:
        for path in reversed([folder, *folder.parents]):
            if not path.is_dir():
                path.mkdir(mode=0o700, exist_ok=True)
        check_private(folder)
    except OSError as error:
        raise OSError(f"{error}; set XDG_CACHE_HOME to a folder that only you can write to") from error
    return folder


def check_private(path: Path) -> None:
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


def _command(source: Path) -> list[str] | None:
    """The compiler command, with file names relative to its working folder."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions  # imported here: it takes two seconds
    from torch._inductor.cpu_vec_isa import invalid_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        # the flags include -march=native, so no vector instruction set needs to be named
        options = CppTorchOptions(vec_isa=invalid_vec_isa)
        builder = CppBuilder(name=source.stem, sources=f"{source.stem}.cpp", BuildOption=options)
    except InvalidCxxCompiler:
        return None
    return [*shlex.split(builder.get_command_line()), *FLAGS]


def _processor() -> str:
    """A description of the processor and its instruction sets, since -march=native builds for this processor only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kinds)})])


def _build(command: list[str], text: bytes, place: Path) -> None:
    """Build a library, and move it to `place`."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=place.parent) as temporary:
        library = Path(temporary, command[command.index("-o") + 1])
        library.with_suffix(".cpp").write_bytes(text)
        done = subprocess.run(command, cwd=temporary, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            reason = next((line for line in lines if "error" in line), *lines[:1] or [f"exit code {done.returncode}"])
            raise RuntimeError(f"the compiler failed: {reason}")
        library.chmod(0o700)  # the umask may have let the group write to it
        os.replace(library, place)
