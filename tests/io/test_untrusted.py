"""Reading files whole: the limit of their size, also where the size is not known before, and their encoding."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ssd_cache.evaluation.export import ExportError, read_settings
from ssd_cache.io.showing import ReadableError
from ssd_cache.io.untrusted import MAX_FILE, read_bytes, read_json_lines, read_text


def test_a_file_of_the_limit_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    assert read_bytes(path, 1000) == path.read_bytes()
    with pytest.raises(ReadableError, match="a: more than 999 bytes, the limit of this file; give a smaller one"):
        read_bytes(path, 999)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless device")
def test_an_endless_file_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("/dev/zero")
    with pytest.raises(ReadableError, match="a: more than 5000000 bytes"):
        read_bytes(tmp_path / "a", 5_000_000)


def test_a_pipe_is_read(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"some text")
    os.close(writing)
    try:
        assert read_bytes(Path(f"/dev/fd/{reading}")) == b"some text"
    finally:
        os.close(reading)


def test_a_file_with_holes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "settings.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE + 1)
    for read in (read_bytes, read_text, read_json_lines):
        with pytest.raises(ReadableError, match="settings.json: more than"):
            read(path)
    with pytest.raises(ExportError, match="settings.json: not the settings of images .*more than"):
        read_settings(tmp_path)


@pytest.mark.parametrize("newline", [None, ""])
def test_a_text_is_read_with_and_without_a_mark(tmp_path, newline):
    for content in ("é\r\nb".encode(), "é\r\nb".encode("utf-8-sig")):
        (tmp_path / "a").write_bytes(content)
        assert read_text(tmp_path / "a", newline) == ("é\nb" if newline is None else "é\r\nb")
    (tmp_path / "a").write_bytes(b"ok \xff")
    with pytest.raises(ReadableError, match=r"a: not in UTF-8 \(invalid start byte at byte 3\); save it as UTF-8"):
        read_text(tmp_path / "a")
