"""The compiled loops come from a folder that only this user can write to, or are not loaded."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings

import pytest
from helpers.compiling import needs_compiler

from ssd_cache.kernels import cpu_library
from ssd_cache.kernels import cpu_loops as cpu_kernels

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
    path.write_text('extern "C" int first() { return 7; }\n')
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
        assert cpu_library.load(source) is not None
    finally:
        os.umask(old)
    (library,) = libraries(home)
    assert library.parent == home / "ssd-cache"
    assert [mode(path) for path in (home, library.parent)] == [0o700, 0o700]
    cpu_library.check_private(library)
    assert [path.name for path in library.parent.iterdir()] == [library.name], "the folder of the build is gone"
    built = library.stat().st_ino
    assert cpu_library.load(source) is not None
    assert library.stat().st_ino == built


@needs_compiler
@pytest.mark.parametrize("what", ["link", "open to all", "folder", "no library"])
def test_a_cached_library_that_is_wrong_is_not_loaded(home, source, what, tmp_path, monkeypatch):
    assert cpu_library.load(source) is not None
    (good,) = libraries(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # the loader returns a path that it knows unread
    library = cpu_library.find_folder() / good.name
    if what == "link":
        library.symlink_to(good)
    elif what == "folder":
        library.mkdir(0o700)
    else:
        library.write_bytes(good.read_bytes() if what == "open to all" else b"no library")
        library.chmod(0o722 if what == "open to all" else 0o700)
    with pytest.raises(OSError, match=str(library)):
        cpu_library.load(source)


@needs_compiler
def test_a_library_that_lacks_a_function_is_not_used(home, monkeypatch):
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
        f"assert cpu_library.load(Path({str(source)!r})) is not None"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert len(libraries(home)) == 1


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
    assert cpu_library.load(source) is not None
    assert len(libraries(tmp_path)) == 1
