"""Opens every address on other hosts that the given pages link to, and prints those that do not answer: `make links`.

It needs a network and is not part of the tests. Links between pages are checked by `tests/test_docs.py`.
"""

from __future__ import annotations

import re
import sys
import urllib.request
from pathlib import Path

LINK = re.compile(r"\]\((https?://[^)\s#]+)")


def failure(address: str) -> str | None:
    """Why an address does not answer; None if it does."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0"})  # some hosts refuse Python's
    try:
        with urllib.request.urlopen(request, timeout=30):
            return None
    except OSError as error:  # of the host, the status or the time
        return str(error)


texts = {name: Path(name).read_text("utf-8") for name in sys.argv[1:]}
addresses = sorted({found for text in texts.values() for found in LINK.findall(text)})
broken = {address: reason for address in addresses if (reason := failure(address))}
for address, reason in broken.items():
    print(address, reason, *(name for name, text in texts.items() if address in text), sep="\n  ")
print(f"{len(addresses)} addresses, {len(broken)} do not answer")
sys.exit(bool(broken))
