"""The compiled loops come from a folder that only this user can write to, whole and right, or are built again."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings

import pytest
from helpers.compiling import needs_compiler

from ssd_cache.kernels import cpu_library
from ssd_cache.kernels import cpu_loops as cpu_kernels

FUNCTIONS = ("first", "second")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's cache folder, not made yet."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    """A source that compiles faster than the loops."""
    path = tmp_path / "loops.cpp"
    path.write_text("".join(f'extern "C" int {name}() {{ return 7; }}\n' for name in FUNCTIONS))
    return path


def libraries(folder):
    return sorted(folder.rglob("*.so"))


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@needs_compiler
@pytest.mark.parametrize("umask", [0o002, 0o077, 0o000])
def test_it_is_built_once_in_a_folder_of_this_users_own(home, source, umask):
    old = os.umask(umask)
    try:
        assert cpu_library.load(source, FUNCTIONS) is not None
    finally:
        os.umask(old)
    (library,) = libraries(home)
    assert library.parent == home / "ssd-cache"
    assert [mode(path) for path in (home, library.parent)] == [0o700, 0o700]
    cpu_library.check_private(library)
    assert [path.name for path in library.parent.iterdir()] == [library.name], "the folder of the build is gone"
    built = library.stat().st_ino
    assert cpu_library.load(source, FUNCTIONS) is not None
    assert library.stat().st_ino == built


@needs_compiler
@pytest.mark.parametrize("what", ["foreign", "cut short", "empty", "link", "open to all", "folder"])
def test_a_cached_library_that_is_wrong_is_built_again(home, source, what, tmp_path):
    assert cpu_library.load(source, FUNCTIONS) is not None
    (library,) = libraries(home)
    good = library.read_bytes()
    if what == "foreign":  # an old version's, say: a library without our functions
        (tmp_path / "other.c").write_text("int other(void) { return 1; }")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
        prefix = library.stem.rpartition("-")[0]
        library.rename(library.with_name(f"{prefix}-{cpu_library._digest(library.read_bytes())}.so"))
    elif what in ("cut short", "empty"):  # the loader would die of the first
        library.unlink()
        library.write_bytes(good[: len(good) // 2] if what == "cut short" else b"")
    elif what == "link":
        shutil.move(library, tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    elif what == "open to all":
        library.chmod(0o722)
    else:
        library.unlink()
        library.mkdir()
    found = cpu_library.load(source, FUNCTIONS)
    assert found is not None
    assert [getattr(found, name)() for name in FUNCTIONS] == [7, 7]
    libraries_now = [path for path in libraries(home) if not path.is_dir()]
    assert len(libraries_now) == 1
    cpu_library.check_private(libraries_now[0])
    built = libraries_now[0].stat().st_ino
    assert cpu_library.load(source, FUNCTIONS) is not None
    assert libraries_now[0].stat().st_ino == built, "the one that was built again serves"


@needs_compiler
def test_a_library_that_lacks_a_function_even_when_new_is_not_used(home, monkeypatch):
    """`library` goes on without, and says so; it raises nothing."""
    monkeypatch.setattr(cpu_kernels, "DECODERS", {None: "no_such_function"})
    cpu_kernels.library.cache_clear()
    with pytest.warns(UserWarning, match="continues without ssd-cache's CPU kernels.*no_such_function"):
        assert cpu_kernels.library() is None
    cpu_kernels.library.cache_clear()


def test_torch_without_its_private_modules_is_no_error(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.cpp_builder", None)
    cpu_kernels.library.cache_clear()
    with pytest.warns(UserWarning, match="continues without ssd-cache's CPU kernels"):
        assert cpu_kernels.library() is None
    cpu_kernels.library.cache_clear()


@needs_compiler
def test_several_processes_may_build_at_once(home, source):
    code = (
        "from pathlib import Path; from ssd_cache.kernels import cpu_library; "
        f"assert cpu_library.load(Path({str(source)!r}), {FUNCTIONS!r}) is not None"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert 1 <= len(libraries(home)) <= 2  # one each, where neither saw the other's


# Where it is kept


def test_a_relative_cache_home_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cpu_library.find_folder() == tmp_path / ".cache" / "ssd-cache"


WRONG = {
    "open to a group": lambda folder: folder.chmod(0o770),
    "open to all": lambda folder: folder.chmod(0o707),
    "under a folder open to all": lambda folder: folder.parent.chmod(0o777),
    "a link": lambda folder: (folder.rename(folder.parent / "own"), folder.symlink_to(folder.parent / "own")),
    "a file": lambda folder: (folder.rmdir(), folder.touch()),
}


@needs_compiler
@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_folder_that_others_can_write_to_is_not_used(home, spoil):
    folder = cpu_library.find_folder()
    spoil(folder)
    with pytest.raises(OSError, match="ssd-cache.*; set XDG_CACHE_HOME to a folder that only you can write to"):
        cpu_library.find_folder()
    cpu_kernels.library.cache_clear()
    with pytest.warns(UserWarning, match="without ssd-cache's CPU kernels.*XDG_CACHE_HOME"):
        assert cpu_kernels.library() is None
    cpu_kernels.library.cache_clear()
    assert not libraries(home)


@pytest.mark.skipif(os.name == "posix" and os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("is_above", [False, True])
def test_a_folder_of_another_user_is_not_used(home, is_above):
    folder = cpu_library.find_folder()
    os.chown(folder.parent if is_above else folder, 12345, 12345)
    with pytest.raises(OSError, match="another user|other users"):
        cpu_library.find_folder()


def test_a_sticky_folder_above_is_no_objection(home):
    """As /tmp: others can add files there, and not replace ours."""
    folder = cpu_library.find_folder()
    home.chmod(0o1777)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_library.find_folder() == folder


@needs_compiler
def test_folders_with_spaces_in_their_names(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a folder; of 'mine'"))
    assert cpu_library.load(source, FUNCTIONS) is not None
    assert len(libraries(tmp_path)) == 1
