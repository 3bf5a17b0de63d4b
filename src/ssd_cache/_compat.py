"""The versions of transformers that this package works with, refused here when another one is installed.

Where two of them differ, the difference is dealt with in this file and nowhere else. Inside the range there is none.
"""

from __future__ import annotations

import transformers

OLDEST, NEXT = (5, 18), (5, 24)
"""The first version on which the tests pass, and the first on which they do not; pyproject.toml has the same.

5.24 renames the argument `past_key_values` to `cache` in forward and generate, and Janus refuses the old name.
"""


def check_transformers(version: str) -> None:
    """Refuse a version outside the range.

    Raises:
        ImportError: with the version found, the range, and the remedy.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) < NEXT:
        oldest, following = (".".join(map(str, end)) for end in (OLDEST, NEXT))
        raise ImportError(
            f"ssd-cache works with transformers from {oldest} up to, and without, {following}; {version} is installed: "
            f"pip install 'transformers>={oldest},<{following}'"
        )


check_transformers(transformers.__version__)
