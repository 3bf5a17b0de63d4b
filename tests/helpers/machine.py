"""A short look at the machine: measuring its bytes and operations per second with large tensors takes seconds."""

import pytest

from ssd_cache.bench import roofline


def look_shortly(patch: pytest.MonkeyPatch | None = None) -> None:
    """Measure the machine with small tensors, until `patch` is undone, or in all of a child process."""
    patch = patch or pytest.MonkeyPatch()
    patch.setitem(roofline.COPY_BYTES, "cpu", 2**20)
    patch.setitem(roofline.MATRIX_SIDE, "cpu", 64)
