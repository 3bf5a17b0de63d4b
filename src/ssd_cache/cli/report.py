"""The table that `generate` prints at the end, and the text form of byte counts.

It formats numbers and measures only the peak memory of this process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.table import Table

from ssd_cache.cli.draw import Drawing


def size(num_bytes: float) -> str:
    """Format a byte count with about three digits: 512 B, 4.3 MB, 60.4 GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if num_bytes >= 100 or unit == "B" else f"{num_bytes:.1f} {unit}"


def table(drawings: Sequence[Drawing], conditions: str) -> Table:
    """Table with one row a policy. `conditions` is the caption: the settings of the measurement."""
    report = Table(box=box.SIMPLE_HEAD, caption=conditions, caption_justify="left", padding=(0, 1, 0, 0))
    report.add_column("policy", no_wrap=True)
    on_gpu = any(drawing.peak_device_bytes is not None for drawing in drawings)
    for title in (
        "visual\ntokens",
        "K and V\nnow",
        "full\ncache",
        "ratio",
        "beside\nK and V",
        "tokens/s",
        "seconds",
        *(["GPU\npeak"] if on_gpu else []),
    ):
        report.add_column(title, justify="right", no_wrap=True)
    for drawing in drawings:
        memory = drawing.memory
        report.add_row(
            drawing.policy,
            f"{drawing.tokens.numel()}",
            size(memory.key_value),
            size(memory.full_cache),
            f"{memory.full_cache / memory.key_value:.1f}x",
            size(memory.bookkeeping),
            f"{drawing.tokens_per_second:.0f}",
            f"{drawing.seconds:.1f}",
            *([size(drawing.peak_device_bytes or 0)] if on_gpu else []),
        )
    return report


def process_peak() -> str:
    """Peak memory of this process so far as text, or an empty string if the system does not report it."""
    try:
        import resource  # not on Windows
    except ImportError:
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"; peak memory of the process {size(peak)}"
