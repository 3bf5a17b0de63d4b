"""Builds and loads a C++ source of this package as a library, with the compiler and flags that `torch.compile` uses.

Libraries are kept in this user's cache folder (see `private_cache.py`). The file name holds two hashes. One covers the
source, the command and the processor, so a changed source, or another machine with the same home folder, gets its own
library. The other covers the library itself and detects damage. Several processes may build at the same time: each
builds in a temporary folder, loads the library from there, and moves it into place in one step.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from ssd_cache.kernels import private_cache


def load(source: Path, functions: Sequence[str]) -> ctypes.CDLL | None:
    """The library of a C++ source, built if it is not in the cache folder; None where there is no compiler.

    Args:
        source: the C++ file.
        functions: names that the library must export; a cached library that lacks one is built again.

    Raises:
        Exception: the compiler or the loader failed; exceptions of many classes.

    Warns:
        UserWarning: no cache folder passes the checks, so every process builds its own library.
    """
    if os.name != "posix":
        raise OSError("they are built on POSIX systems alone")
    command = _command(source)
    if command is None:
        return None
    text = source.read_text()
    key = _digest("\0".join([text, *command, _processor()]).encode())
    try:
        folder = private_cache.find_folder()
    except OSError as error:
        warnings.warn(
            f"ssd-cache builds its loops for the CPU anew in every process: {error}. Set XDG_CACHE_HOME to a folder "
            "that only you can write to.",
            stacklevel=3,
        )
        return _build(command, text, functions)
    name = f"{source.stem}-{key}"
    for place in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, AttributeError):  # an untrusted file, or a library without the functions
            private_cache.check(place)
            if place.stem == f"{name}-{_digest(place.read_bytes())}":  # a truncated file crashes the loader
                return _open(place, functions)
        with contextlib.suppress(OSError):
            place.unlink()
    return _build(command, text, functions, folder, name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


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
    return shlex.split(builder.get_command_line())


def _processor() -> str:
    """A description of the processor and its instruction sets, since -march=native builds for this processor only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kinds)})])


def _build(
    command: list[str], text: str, functions: Sequence[str], folder: Path | None = None, name: str = ""
) -> ctypes.CDLL:
    """Build and load a library; move it to `folder`, if given, under `name` and the library's digest."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as temporary:
        private_cache.check(Path(temporary))
        library = Path(temporary, command[command.index("-o") + 1])
        library.with_suffix(".cpp").write_text(text)
        done = subprocess.run(command, cwd=temporary, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            reason = next((line for line in lines if "error" in line), *lines[:1] or [f"exit code {done.returncode}"])
            raise RuntimeError(f"the compiler failed: {reason}")
        # Load before the move: the loader caches libraries by path, and could return a wrong one from the final path.
        found = _open(library, functions)
        if folder is not None:
            library.chmod(0o700)  # the umask may have let the group write to it
            with contextlib.suppress(OSError):  # the library is already loaded; the next process builds it again
                os.replace(library, folder / f"{name}-{_digest(library.read_bytes())}.so")
    return found


def _open(path: Path, functions: Sequence[str]) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in functions:
        getattr(found, name)
    return found
