"""Builds and loads a C++ source of this package as a library, with the compiler and flags that `torch.compile` uses.

Libraries are kept in this user's cache folder (see `private_cache.py`) under a hash of the source, the command and the
processor, so a changed source or another machine with the same home folder builds its own, and a hash of the library,
so a damaged one is found out. Any process may build at any time: a library is built in a folder of its own, loaded from
there, and moved into place whole.
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
    """The library of a C++ source, built where it is not in the cache folder; None where there is no compiler.

    Args:
        source: the file.
        functions: names that the library must export; a cached library that lacks one is built again.

    Raises:
        Exception: of many kinds, where the compiler or the loader fails.

    Warns:
        UserWarning: no cache folder passes the checks, so every process builds for itself.
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
        with contextlib.suppress(OSError, AttributeError):  # not to be trusted, or another library
            private_cache.check(place)
            if place.stem == f"{name}-{_digest(place.read_bytes())}":  # the loader dies of a file cut short
                return _open(place, functions)
        with contextlib.suppress(OSError):
            place.unlink()
    return _build(command, text, functions, folder, name)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _command(source: Path) -> list[str] | None:
    """The compiler call, with file names relative to the folder that it runs in."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions  # take two seconds to import, and few need them
    from torch._inductor.cpu_vec_isa import invalid_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        # -march=native is among the flags, so no vector instruction set has to be named
        options = CppTorchOptions(vec_isa=invalid_vec_isa)
        builder = CppBuilder(name=source.stem, sources=f"{source.stem}.cpp", BuildOption=options)
    except InvalidCxxCompiler:
        return None
    return shlex.split(builder.get_command_line())


def _processor() -> str:
    """What tells processors with other instructions apart: -march=native builds for one of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(kinds)})])


def _build(
    command: list[str], text: str, functions: Sequence[str], folder: Path | None = None, name: str = ""
) -> ctypes.CDLL:
    """Build and load a library; where there is a folder, move it there, under the name and its own digest."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as temporary:
        private_cache.check(Path(temporary))
        library = Path(temporary, command[command.index("-o") + 1])
        library.with_suffix(".cpp").write_text(text)
        done = subprocess.run(command, cwd=temporary, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            reason = next((line for line in lines if "error" in line), *lines[:1] or [f"exit code {done.returncode}"])
            raise RuntimeError(f"the compiler failed: {reason}")
        # from here and not from its place: the loader knows a place by name, and would find a wrong library again there
        found = _open(library, functions)
        if folder is not None:
            library.chmod(0o700)  # the compiler followed the umask, which may let a group write
            with contextlib.suppress(OSError):  # it is loaded all the same; the next process builds it again
                os.replace(library, folder / f"{name}-{_digest(library.read_bytes())}.so")
    return found


def _open(path: Path, functions: Sequence[str]) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in functions:
        getattr(found, name)
    return found
