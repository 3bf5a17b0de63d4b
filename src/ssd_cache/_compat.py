"""The versions of transformers that this package works with, refused here when another one is installed.

Where two of them differ, the difference is dealt with in this file and nowhere else. So far there is none to deal with.
"""

from __future__ import annotations

import transformers

OLDEST, NEXT = (5, 18), (6, 0)
"""The first version on which the tests pass, and the next major one; pyproject.toml has the same."""


def check_transformers(version: str) -> None:
    """Refuse a version outside the range.

    Raises:
        ImportError: with the version found, the range, and the remedy.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) < NEXT:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"ssd-cache works with transformers from {oldest} up to, and without, {NEXT[0]}; {version} is installed: "
            f"pip install 'transformers>={oldest},<{NEXT[0]}'"
        )


check_transformers(transformers.__version__)
